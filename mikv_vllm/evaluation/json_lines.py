"""Users' own prompts: files of JSON lines."""

import json
from pathlib import Path


def read_texts(path: Path, names: tuple[str, ...], flag: str) -> list[list[str]]:
    """The texts called ``names`` of every line.

    Args:
        flag: what the file was given to, for the message.

    Raises:
        ValueError: a line has no such texts, or there is no line.
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
        raise ValueError(f"{flag}: {path} has no line")
    return found
