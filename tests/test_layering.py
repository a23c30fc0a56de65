"""Packages import in one direction, without cycles; files are short; hooks are in two files."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import mikv_vllm

from .vllm_usage import replaced_methods

PACKAGE = Path(mikv_vllm.__file__).parent
NAME = "mikv_vllm"

ALLOWED = {
    "tiers": set(),
    "kernels": {"tiers"},
    "config": {"tiers"},
    "engine": {"config", "kernels", "tiers", "vllm"},
    "models": set(),
    "vllm_api": set(),
    "compatibility": {"vllm_api"},
    "server": {"compatibility", "config", "models", "tiers", "vllm"},
    "server.refusals": {"kernels"},  # the head sizes that the kernels support
    "evaluation": {"config", "models", "server", "tiers", "vllm"},
    "__init__": {"compatibility", "server"},
}
"""For each package and top-level module of ``mikv_vllm``: the others that it may import, and
``vllm`` if it may import that. An entry for one module extends the entry of its package.

The server names the classes of ``engine`` in strings, because vLLM imports them in other processes.
"""

LONGEST_FILE = 400
"""Lines of a source file of the package, C++ included."""
SHORTER = {"engine/scheduler.py": 200, "engine/block_manager.py": 200}
HOOKS = ("engine/vllm_hooks.py", "server/vllm_hooks.py")


def modules(folder: Path) -> dict[str, Path]:
    """Modules of a package by dotted name, without the name of the package itself."""
    found = {}
    for path in sorted([*folder.rglob("*.py"), *folder.rglob("*.pyi")]):
        parts = path.relative_to(folder).with_suffix("").parts
        is_package = parts[-1] == "__init__" and len(parts) > 1
        found[".".join(parts[:-1] if is_package else parts)] = path
    return found


def imports(folder: Path) -> dict[str, set[str]]:
    """For each module of a package the modules that it imports, those of ``vllm`` as ``vllm``.

    Imports inside functions and under ``TYPE_CHECKING`` are included.
    """
    paths = modules(folder)
    graph: dict[str, set[str]] = {}
    for module, path in paths.items():
        wanted = []
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                wanted += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}: relative imports are not used in this package"
                wanted += [f"{node.module}.{alias.name}" for alias in node.names]
        graph[module] = set()
        for name in wanted:
            top, _, rest = name.partition(".")
            if top == "vllm":
                graph[module].add("vllm")
            elif top == NAME:
                parts = rest.split(".") if rest else []
                longest_first = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
                graph[module].add(next((m for m in longest_first if m in paths), "__init__"))
    return graph


def forbidden_imports(folder: Path) -> list[str]:
    """Imports that :data:`ALLOWED` does not have."""
    found = []
    for module, imported in imports(folder).items():
        package = module.partition(".")[0]
        allowed = {package, *ALLOWED.get(package, ()), *ALLOWED.get(module, ())}
        others = sorted(other for other in imported if other.partition(".")[0] not in allowed)
        found += [f"{module} imports {other}" for other in others]
    return found


def superfluous_permissions(folder: Path) -> list[str]:
    """Entries of :data:`ALLOWED` that no import needs."""
    used = {
        (importer, other.partition(".")[0])
        for module, imported in imports(folder).items()
        for other in imported
        for importer in (module, module.partition(".")[0])
    }
    allowed = {(package, other) for package, others in ALLOWED.items() for other in others}
    return [f"{package} does not import {other}" for package, other in sorted(allowed - used)]


def import_cycle(folder: Path) -> list[str]:
    """Modules that import each other in a circle; empty if there are none."""
    graph = {module: others - {"vllm", module} for module, others in imports(folder).items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def long_files(folder: Path) -> list[str]:
    """Source files with more lines than they may have."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.suffix not in (".py", ".cpp", ".hpp"):
            continue
        file = path.relative_to(folder).as_posix()
        lines = len(path.read_text().splitlines())
        if lines > SHORTER.get(file, LONGEST_FILE):
            found.append(f"{file} has {lines} lines")
    return found


def scattered_hooks(folder: Path) -> list[str]:
    """Assignments outside of :data:`HOOKS` that replace a method of an object."""
    found = []
    for path in modules(folder).values():
        file = path.relative_to(folder).as_posix()
        if file not in HOOKS:
            targets = replaced_methods(ast.parse(path.read_text()))
            found += [f"{file}:{node.lineno} assigns {ast.unparse(node)}" for _, node in targets]
    return found


def test_packages_import_only_what_they_may():
    found = forbidden_imports(PACKAGE)
    assert not found, "\n".join(found)


def test_the_table_of_imports_permits_nothing_that_is_not_needed():
    found = superfluous_permissions(PACKAGE)
    assert not found, "\n".join(found)


def test_modules_do_not_import_each_other():
    found = import_cycle(PACKAGE)
    assert not found, " -> ".join(found)


def test_files_are_short():
    found = long_files(PACKAGE)
    assert not found, "\n".join(found)


def test_methods_of_vllm_are_replaced_in_two_files():
    found = scattered_hooks(PACKAGE)
    assert not found, "\n".join(found)


HOOK = """
from functools import partial, wraps
from mikv_vllm.engine.context import context

def install(pool, runner, fast):
    def take(count): ...
    {statement}
"""
"""A function that contains one statement, and with it maybe a hook."""


@pytest.fixture
def write(tmp_path):
    """Writes files of a package into a folder, and returns the folder."""

    def write_files(**texts: str) -> Path:
        for file, text in texts.items():
            path = tmp_path / f"{file.replace('__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write_files


@pytest.mark.parametrize(
    ("importer", "text", "found"),
    [
        ("tiers__plan", "import mikv_vllm.config", "tiers.plan imports config"),
        ("tiers__plan", "def f():\n    import vllm.config", "tiers.plan imports vllm"),
        ("kernels__batch", "from vllm import LLM", "kernels.batch imports vllm"),
        (
            "engine__spec",
            "from mikv_vllm.server.cli import main",
            "engine.spec imports server.cli",
        ),
        (
            "server__cli",
            "if TYPE_CHECKING:\n    from mikv_vllm.engine import spec",
            "server.cli imports engine.spec",
        ),
        ("another", "from mikv_vllm.tiers import plan", "another imports tiers.plan"),
    ],
)
def test_a_forbidden_import_is_found(write, importer, text, found):
    names = ("config", "tiers__plan", "engine__spec", "server__cli")
    folder = write(**dict.fromkeys(names, ""))
    assert forbidden_imports(folder) == []
    assert forbidden_imports(write(**{importer: text})) == [found]


def test_a_permission_without_an_import_is_found(write):
    folder = write(kernels__batch="import mikv_vllm.tiers.plan", tiers__plan="")
    assert "kernels does not import tiers" not in superfluous_permissions(folder)
    assert "config does not import tiers" in superfluous_permissions(folder)


@pytest.mark.parametrize(
    "back",
    [
        "from mikv_vllm.engine.b import x",
        "if TYPE_CHECKING:\n    from mikv_vllm.engine import b",
        "def late():\n    import mikv_vllm.engine.b",
    ],
)
def test_a_cycle_is_found(write, back):
    folder = write(engine__a="", engine__b="import mikv_vllm.engine.a", engine____init__="")
    assert import_cycle(folder) == []
    assert set(import_cycle(write(engine__a=back))) == {"engine.a", "engine.b"}


def test_a_long_file_is_found(write):
    folder = write(a="\n" * 400, engine__scheduler="\n" * 200)
    (folder / "a.hpp").write_text("\n" * 400)
    assert long_files(folder) == []
    (folder / "a.hpp").write_text("\n" * 401)
    write(engine__scheduler="\n" * 201)
    assert long_files(folder) == ["a.hpp has 401 lines", "engine/scheduler.py has 201 lines"]


@pytest.mark.parametrize(
    "statement",
    [
        "pool.take = take",
        "runner.pool.take = take",
        "pool.take = lambda count: None",
        "pool.take = fast.take",
        "pool.take = wraps(pool.take)(take)",
        "pool.take = partial(take, 1)",
        "setattr(pool, 'take', take)",
        "pool.take = partial",
    ],
)
def test_a_replaced_method_is_found_outside_of_the_hooks(write, statement):
    text = HOOK.format(statement=statement)
    folder = write(engine__vllm_hooks=text, server__vllm_hooks=text)
    assert scattered_hooks(folder) == []
    (found,) = scattered_hooks(write(engine__scheduler=text))
    assert found.startswith("engine/scheduler.py:")
    assert found.endswith("pool.take")


@pytest.mark.parametrize(
    "statement",
    ["pool.size = 1", "context.request_ids = lambda: []", "pool.last = pool.first"],
)
def test_other_assignments_are_no_hooks(write, statement):
    assert scattered_hooks(write(engine__scheduler=HOOK.format(statement=statement))) == []
