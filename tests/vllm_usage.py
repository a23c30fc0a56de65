"""Which APIs of vLLM a package uses, found by reading the sources of both."""

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import product
from pathlib import Path

from .sources import Class, Function, Sources

Api = tuple[str, str]
"""File below the folder of vLLM, and a name in it: ``Class``, ``function`` or ``Class.member``."""

Listed = Mapping[str, Mapping[str, str | None]]
"""As :data:`mikv_vllm.vllm_api.VLLM_API`."""


@cache
def uses(package: Path, vllm: Path) -> set[Api]:
    """All APIs of vLLM that a package is found to use.

    Args:
        package: folder of ``mikv_vllm``.
        vllm: folder of ``vllm``.
    """
    sources = Sources(mikv_vllm=package, vllm=vllm)
    kinds = (imported, overridden, replaced, called)
    return {api for kind in kinds for api in kind(sources, "mikv_vllm")}


def missing(package: Path, vllm: Path, listed: Listed) -> list[Api]:
    """APIs that a package uses and that are not listed."""
    entries = {(file, name) for file, names in listed.items() for name in names}
    classes = {(file, name.partition(".")[0]) for file, name in entries}
    return sorted(uses(package, vllm) - entries - classes)


def unused(package: Path, vllm: Path, listed: Listed) -> list[Api]:
    """Listed APIs that a package is not found to use, and whose name its sources do not contain."""
    words: set[str] = set()
    for path in package.rglob("*.py"):
        if path.name not in ("vllm_api.py", "compatibility.py"):
            words.update(re.findall(r"\w+", path.read_text()))
    entries = {(file, name) for file, names in listed.items() for name in names}
    candidates = sorted(entries - uses(package, vllm))
    return [(file, name) for file, name in candidates if name.rpartition(".")[2] not in words]


def _api(sources: Sources, classes: list[Class], member: str) -> Api | None:
    """The first class of vLLM in ``classes`` that defines ``member``."""
    for cls in classes:
        if cls.is_vllm and cls.has(member):
            return sources.file(cls.module), f"{cls.name}.{member}"
    return None


def imported(sources: Sources, package: str) -> Iterator[Api]:
    """Each name that the package imports from vLLM.

    It is in the file that the import names and, where that is another, in the file that defines it.
    Of a name that is imported in several ways, for several versions of vLLM, the last one counts,
    whose file may not exist in this version.
    Of a module that is imported as a whole, these are the names that are used.
    """
    for module in sources.walk(package):
        for alias, (source, name) in module.imports.items():
            if source.partition(".")[0] != "vllm":
                continue
            whole = sources.module(f"{source}.{name}" if name else source)
            if whole is None:
                where = sources.module(source)
                absent = source.removeprefix("vllm.").replace(".", "/") + ".py"
                yield (sources.file(where) if where else absent, str(name))
                if where and (found := sources.find(where, str(name))):
                    yield sources.file(found[0]), found[1]
                continue
            for node in ast.walk(module.tree):
                match node:
                    case ast.Attribute(ast.Name(used), attribute) if used == alias:
                        yield sources.file(whole), attribute


def overridden(sources: Sources, package: str) -> Iterator[Api]:
    """Each member of a vLLM class that a subclass in the package overrides.

    A mixin overrides the members of those classes that its subclasses combine it with.
    """
    for module in sources.walk(package):
        for name, node in module.definitions.items():
            if not isinstance(node, ast.ClassDef):
                continue
            order = sources.mro(Class(module, name))
            for position, cls in enumerate(order):
                if cls.is_vllm:
                    continue
                for member in cls.members:
                    if api := _api(sources, order[position + 1 :], member):
                        yield api


def replaced(sources: Sources, package: str) -> Iterator[Api]:
    """Each method of a vLLM object that the package replaces by an assignment.

    The object has to be a parameter that is annotated with its class. Classes of other packages
    than vLLM are left out.
    """
    for module in sources.walk(package):
        for function, target in replaced_methods(module.tree):
            if sources.is_foreign(module, function, target.value):
                continue
            text = f"{module.name}: {ast.unparse(target)}"
            classes = sources.classes_of(module, function, [], target.value)
            yield _api(sources, classes, target.attr) or ("method of an unknown class", text)


def called(sources: Sources, package: str) -> Iterator[Api]:
    """Each member of a vLLM object that the package reads or calls, where its class is known.

    It is known for ``self``, for annotated parameters, for classes themselves, and for members of
    these that are annotated or assigned in a plain way.
    """
    lines = [
        line[start:]
        for module in sources.walk(package)
        for name, node in module.definitions.items()
        if isinstance(node, ast.ClassDef)
        for line in [sources.mro(Class(module, name))]
        for start in range(len(line))
    ]
    for module in sources.walk(package):
        for name, function in module.definitions.items():
            if not isinstance(function, Function):
                continue
            scope, _, _ = name.rpartition(".")
            owners = [line for line in lines if line[0] == Class(module, scope)] or [[]]
            nodes = [node for node in ast.walk(function) if isinstance(node, ast.Attribute)]
            for own, node in product(owners, nodes):
                classes = sources.classes_of(module, function, own, node.value)
                first = next((cls for cls in classes if cls.has(node.attr)), None)
                if first and first.is_vllm:
                    yield sources.file(first.module), f"{first.name}.{node.attr}"


def replaced_methods(tree: ast.Module) -> Iterator[tuple[Function | None, ast.Attribute]]:
    """Assignments of a function to an attribute of an object of another package.

    A function is a ``lambda``, the name of a function or method that the module defines or imports,
    or ``partial(...)`` or ``wraps(...)(...)`` of one. Attributes of ``self``, and of what is
    imported from this package, are left out.

    Returns:
        For each the outermost function that contains it, if one does, and its target.
    """
    functions, own = set(), {"self", "cls"}
    for node in ast.walk(tree):
        match node:
            case (
                ast.FunctionDef(decorator_list=decorators)
                | ast.AsyncFunctionDef(decorator_list=decorators)
            ):
                kinds = tuple(map(ast.unparse, decorators))
                if not any(kind.endswith(("property", ".setter")) for kind in kinds):
                    functions.add(node.name)
            case ast.ImportFrom(module, names):
                local = {alias.asname or alias.name for alias in names}
                functions |= {name for name in local if name.islower()}
                own |= local if module and module.startswith("mikv_vllm") else set()

    def is_function(value: ast.expr) -> bool:
        match value:
            case ast.Lambda():
                return True
            case ast.Name(name) | ast.Attribute(_, name):
                return name in functions
            case ast.Call(ast.Name("partial") | ast.Attribute(_, "partial") | ast.Call(), given):
                return any(map(is_function, given))
        return False

    def assignments(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
        match node:
            case ast.Assign(targets, value):
                yield from ((target, value) for target in targets)
            case ast.AnnAssign(target, _, value) if value is not None:
                yield target, value
            case ast.Call(ast.Name("setattr"), [owner, name, value]):
                attribute = name.value if isinstance(name, ast.Constant) else ast.unparse(name)
                yield ast.copy_location(ast.Attribute(owner, str(attribute)), node), value

    def search(node: ast.AST, function: Function | None) -> Iterator:
        if function is None and isinstance(node, Function):
            function = node
        for target, value in assignments(node):
            match target:
                case ast.Attribute(ast.Name(owner)) if owner in own:
                    pass
                case ast.Attribute() if is_function(value):
                    yield function, target
        for child in ast.iter_child_nodes(node):
            yield from search(child, function)

    yield from search(tree, None)
