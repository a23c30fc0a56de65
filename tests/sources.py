"""Modules, classes and base classes of packages, read from their sources without importing them."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

from mikv_vllm.compatibility import definitions

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def annotations(function: Function) -> dict[str, ast.expr | None]:
    """Annotation of each parameter, those of functions inside included."""
    found: dict[str, ast.expr | None] = {}
    for inner in ast.walk(function):
        if isinstance(inner, Function):
            given = inner.args
            for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs):
                found.setdefault(argument.arg, argument.annotation)
    return found


@dataclass(eq=False)
class Module:
    """One source file."""

    name: str
    path: Path
    imports: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    """By local name: the module, and the name in it; None if the module itself is imported."""
    stars: list[str] = field(default_factory=list)
    """Modules from which all names are imported."""

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


class Sources:
    """Modules of some packages, parsed when they are needed.

    Args:
        folders: of each package, by its name.
    """

    def __init__(self, **folders: Path) -> None:
        self.folders = folders
        self._modules: dict[str, Module | None] = {}

    def module(self, name: str) -> Module | None:
        """Return the module with this name, or None if it is in none of the folders."""
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

    def classes_of(
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
                for owner in self.classes_of(module, function, own, value):
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

    def is_foreign(self, module: Module, function: Function | None, node: ast.expr) -> bool:
        """Whether ``node`` is a parameter whose class is in a package without a folder here."""
        if not isinstance(node, ast.Name) or function is None:
            return False
        match annotations(function).get(node.id):
            case ast.Constant(str(name)) | ast.Name(name) if name in module.imports:
                return module.imports[name][0].partition(".")[0] not in self.folders
        return False

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
