"""Prompts of the user: files with one JSON object per line."""

import json
from pathlib import Path


def read_texts(path: Path, names: tuple[str, ...], flag: str) -> list[list[str]]:
    """Read the texts with the keys ``names`` from every line.

    Args:
        path: the file.
        names: keys, all required.
        flag: flag of the file, for error messages.

    Raises:
        ValueError: a line does not have these texts, or the file is empty.
    """
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            texts = [json.loads(line)[name] for name in names]
        except (ValueError, KeyError, TypeError):
            texts = []
        if not texts or not all(isinstance(text, str) and text for text in texts):
            wanted = ", ".join(f'"{name}": "…"' for name in names)
            raise ValueError(f"{flag}: line {number} of {path} is not {{{wanted}}}")
        found.append(texts)
    if not found:
        raise ValueError(f"{flag}: {path} is empty")
    return found
