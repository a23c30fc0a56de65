"""Show what a release of vLLM changes in the APIs that MiKV depends on.

For example ``python scripts/vllm_release.py 0.33.0``. It reads sources only, so the release need
not be installed. It prints

- every API that is missing or has other parameters, and where its name is defined now,
- every API whose code differs from that of the installed vLLM, with the number of changed lines,
  and its parameters if they differ: a method that MiKV overrides has to accept them.

The exit status is 1 if an API is missing or has other parameters.
"""

import argparse
import ast
import difflib
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from vllm_source import unpacked

from mikv_vllm.compatibility import changes, definitions, definitions_in, version
from mikv_vllm.vllm_api import VLLM_API

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def defined(path: Path) -> dict[str, ast.AST]:
    """Return the definitions of a file, empty if there is no such file."""
    return definitions(ast.parse(path.read_text())) if path.exists() else {}


@cache
def listed(folder: Path, file: str) -> dict[str, ast.AST]:
    """Return the definitions of a listed file, wherever a release has them."""
    return definitions_in(folder, file)


def other_places(folder: Path, name: str) -> list[str]:
    """Return the files that define a name now."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        if name.rpartition(".")[2] in path.read_text():
            node = defined(path).get(name)
            if node is not None and not isinstance(node, ast.ImportFrom):
                found.append(str(path.relative_to(folder)))
    return found


def changed_lines(old: ast.AST, new: ast.AST) -> int:
    """Return how many lines of a definition were removed or added; comments do not count."""
    lines = [ast.unparse(node).splitlines() for node in (old, new)]
    return sum(line[0] in "+-" for line in difflib.ndiff(*lines))


def new_parameters(old: ast.AST, new: ast.AST) -> str:
    """Return the parameters of a function in parentheses if they changed, otherwise nothing."""
    if not isinstance(old, Function) or not isinstance(new, Function):
        return ""
    before, after = ast.unparse(old.args), ast.unparse(new.args)
    return "" if before == after else f"({after})"


def main(argv: list[str] | None = None) -> int:
    """Compare a release with the installed vLLM."""
    parser = argparse.ArgumentParser(prog="vllm_release", description=__doc__)
    parser.add_argument("release", help="version of vLLM")
    parser.add_argument("--sdist", type=Path, help="source distribution (default: download it)")
    args = parser.parse_args(argv)

    spec = find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("vLLM is not installed.")
    old = Path(spec.submodule_search_locations[0])
    new = unpacked(args.release, "vllm", args.sdist) / "vllm"

    broken = list(changes(new))
    for entry in broken:
        name = entry.partition(": ")[2]
        places = ", ".join(other_places(new, name)) or "nowhere"
        print(f"missing or other parameters: {entry}; defined in: {places}")
    differing = 0
    for file, names in VLLM_API.items():
        for name in names:
            before, after = listed(old, file).get(name), listed(new, file).get(name)
            if before is None or after is None or isinstance(before, ast.ClassDef):
                continue
            if count := changed_lines(before, after):
                differing += 1
                print(f"{count:4} lines differ: {file}: {name}{new_parameters(before, after)}")
    total = sum(map(len, VLLM_API.values()))
    print(
        f"vLLM {args.release}: of {total} APIs, {len(broken)} are missing or have other "
        f"parameters; the code of {differing} differs from vLLM {version(old)}."
    )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
