"""Which APIs of vLLM a package uses, found by reading the sources of both."""

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import product
from pathlib import Path

from mikv_vllm.compatibility import definitions

Function = ast.FunctionDef | ast.AsyncFunctionDef
Api = tuple[str, str]
"""File below the folder of vLLM, and a name in it: ``Class``, ``function`` or ``Class.member``."""

Listed = Mapping[str, Mapping[str, str | None]]
"""As :data:`mikv_vllm.vllm_api.VLLM_API`."""


def annotations(function: Function) -> dict[str, ast.expr | None]:
    """Annotation of each parameter, those of functions inside included."""
    found: dict[str, ast.expr | None] = {}
    for inner in ast.walk(function):
        if isinstance(inner, Function):
            given = inner.args
            for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs):
                found.setdefault(argument.arg, argument.annotation)
    return found


@dataclass
class Module:
    """One source file. ``imports``: module and name by the name that the file gives it."""

    name: str
    path: Path
    imports: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    stars: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tree = ast.parse(self.path.read_text())
        package = self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom):
                parts = package.split(".")[: package.count(".") + 2 - node.level]
                parents = parts if node.level else []
                module = ".".join([*parents, *filter(None, [node.module])])
                for alias in node.names:
                    if alias.name == "*":
                        self.stars.append(module)
                    else:
                        self.imports[alias.asname or alias.name] = (module, alias.name)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    name = alias.name if alias.asname else alias.name.partition(".")[0]
                    self.imports[alias.asname or name] = (name, None)

    @cached_property
    def definitions(self) -> dict[str, ast.AST]:
        """Names that the file itself defines."""
        found = definitions(self.tree).items()
        return {name: node for name, node in found if not isinstance(node, ast.ImportFrom)}


@dataclass(frozen=True)
class Class:
    """A class and the module that defines it."""

    module: Module
    name: str

    @property
    def is_vllm(self) -> bool:
        return self.module.name.partition(".")[0] == "vllm"

    def has(self, member: str) -> bool:
        return f"{self.name}.{member}" in self.module.definitions

    @property
    def members(self) -> list[str]:
        """Methods and fields that the class itself defines."""
        start = f"{self.name}."
        names = self.module.definitions
        return [name.removeprefix(start) for name in names if name.startswith(start)]

    def parameter(self, name: str) -> ast.expr | None:
        """Annotation of a parameter of ``__init__``."""
        init = self.module.definitions.get(f"{self.name}.__init__")
        return annotations(init).get(name) if isinstance(init, Function) else None

    def __hash__(self) -> int:
        return hash((self.module.name, self.name))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Class) and hash(self) == hash(other)


class Sources:
    """Modules of some packages, parsed when they are needed.

    Args:
        folders: of each package, by its name.
    """

    def __init__(self, **folders: Path) -> None:
        self.folders = folders
        self._modules: dict[str, Module | None] = {}

    def module(self, name: str) -> Module | None:
        """The module of this name; None if no folder has it."""
        if name not in self._modules:
            top, *rest = name.split(".")
            path = self.folders.get(top, Path("/nowhere")).joinpath(*rest)
            files = [path / "__init__.py", path.with_name(f"{path.name}.py")]
            self._modules[name] = next((Module(name, f) for f in files if f.is_file()), None)
        return self._modules[name]

    def find(self, module: Module, name: str) -> tuple[Module, str] | None:
        """Where ``name`` in ``module`` is defined: follows imports within the packages."""
        if name in module.definitions:
            return module, name
        if name in module.imports:
            source, original = module.imports[name]
            other = self.module(source)
            is_elsewhere = other is not None and other is not module
            return self.find(other, original) if is_elsewhere and original else None
        for star in map(self.module, module.stars):
            if star and (found := self.find(star, name)):
                return found
        return None

    def class_of(self, module: Module, node: ast.expr | None) -> Class | None:
        """The class that an expression in ``module``, for example an annotation, names."""
        match node:
            case ast.Constant(str(text)):
                return self.class_of(module, ast.parse(text, mode="eval").body)
            case ast.BinOp(left, ast.BitOr(), right):
                return self.class_of(module, left) or self.class_of(module, right)
            case ast.Subscript(value):  # the parameters of a generic class
                return self.class_of(module, value)
            case ast.Attribute(ast.Name(alias), name) if alias in module.imports:
                source, original = module.imports[alias]
                other = self.module(f"{source}.{original}" if original else source)
                return self.class_of(other, ast.Name(name)) if other else None
            case ast.Name(name) if found := self.find(module, name):
                where, original = found
                defined = where.definitions[original]
                return Class(where, original) if isinstance(defined, ast.ClassDef) else None
        return None

    def mro(self, cls: Class) -> list[Class]:
        """The class and its bases in Python's order; bases of other packages are left out."""
        node = cls.module.definitions[cls.name]
        assert isinstance(node, ast.ClassDef)
        bases = [base for b in node.bases if (base := self.class_of(cls.module, b))]
        lines = [*map(self.mro, bases), bases]
        order = [cls]
        while lines := [line for line in lines if line]:
            heads = (line[0] for line in lines)
            head = next(h for h in heads if not any(h in line[1:] for line in lines))
            order.append(head)
            lines = [[c for c in line if c != head] for line in lines]
        return order

    def result_of(self, module: Module, function: ast.expr) -> Class | None:
        """The class that a call constructs, or that the called function is annotated with."""
        if isinstance(function, ast.Name) and (found := self.find(module, function.id)):
            where, name = found
            defined = where.definitions[name]
            if isinstance(defined, Function):
                return self.class_of(where, defined.returns)
        return self.class_of(module, function)

    def classes(
        self, module: Module, function: Function | None, own: list[Class], node: ast.expr
    ) -> list[Class]:
        """The class of an expression in ``function`` and its bases; nothing if it is unknown.

        Args:
            own: the class of ``self`` and its bases.
        """
        cls = None
        match node:
            case ast.Name("self" | "cls"):
                return own
            case ast.Call(ast.Name("super")):
                return own[1:]
            case ast.Name(name) if function is not None:
                cls = self.class_of(module, annotations(function).get(name, node))
            case ast.Call(called):
                cls = self.result_of(module, called)
            case ast.Attribute(value, member):
                for owner in self.classes(module, function, own, value):
                    if owner.has(member):
                        where = owner.module
                        match where.definitions[f"{owner.name}.{member}"]:
                            case ast.AnnAssign(annotation=annotation):
                                cls = self.class_of(where, annotation)
                            case ast.Assign(value=ast.Call(called)):
                                cls = self.result_of(where, called)
                            case ast.Assign(value=ast.Name(name)):
                                cls = self.class_of(where, owner.parameter(name))
                            case ast.FunctionDef(returns=annotation, decorator_list=[_, *_]):
                                cls = self.class_of(where, annotation)
                        break
        return self.mro(cls) if cls else []

    def api(self, classes: list[Class], member: str) -> Api | None:
        """The first class of vLLM in ``classes`` that defines ``member``."""
        for cls in classes:
            if cls.is_vllm and cls.has(member):
                return self.file(cls.module), f"{cls.name}.{member}"
        return None

    def file(self, module: Module) -> str:
        """Path of a module below the folder of its package."""
        return str(module.path.relative_to(self.folders[module.name.partition(".")[0]]))

    def walk(self, package: str) -> Iterator[Module]:
        """All modules of a package."""
        folder = self.folders[package]
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            module = self.module(name)
            assert module is not None
            yield module


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


def imported(sources: Sources, package: str) -> Iterator[Api]:
    """Each name that the package imports from vLLM.

    It is in the file that the import names and, where that is another, in the file that defines it.
    Of a module that is imported as a whole, these are the names that are used.
    """
    for module in sources.walk(package):
        for alias, (source, name) in module.imports.items():
            if source.partition(".")[0] != "vllm":
                continue
            whole = sources.module(f"{source}.{name}" if name else source)
            if whole is None:
                where = sources.module(source)
                yield (sources.file(where) if where else f"no module {source}", str(name))
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
                    if api := sources.api(order[position + 1 :], member):
                        yield api


def replaced(sources: Sources, package: str) -> Iterator[Api]:
    """Each method of a vLLM object that the package replaces by an assignment.

    The object has to be a parameter that is annotated with its class.
    """
    for module in sources.walk(package):
        for function, target in replaced_methods(module.tree):
            text = f"{module.name}: {ast.unparse(target)}"
            classes = sources.classes(module, function, [], target.value)
            yield sources.api(classes, target.attr) or ("method of an unknown class", text)


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
                classes = sources.classes(module, function, own, node.value)
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
