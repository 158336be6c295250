"""The digest of the code that makes artefacts: what other code made is stale.

Only the meaning of the code counts, so a corrected comment does not convert 72B again. Each module
is a syntax tree without positions, comments, docstrings and statements that do nothing. An import
of one of our modules counts by the content of that module, not by its path: renaming a module and
rewriting its imports leaves the digest as it is.

`ast.dump` differs between versions of Python, so `_Writer` writes the tree itself: it leaves out
absent and empty fields, which newer versions add, and writes every constant in ASCII.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

_PACKAGES = ("nvlm", "build")
_NO_MEANING = frozenset({"ctx", "kind", "type_comment", "type_ignores"})
_EMPTY_MODULE = "(Module)"
_PLACE = "@"  # stands in the text where an import of ours does; strings are quoted


@cache
def code_digest() -> str:
    """Returns the SHA-256, in hexadecimal, of the code that this process runs to make artefacts."""
    return digest_of(Path(__file__).resolve().parents[2])


def digest_of(root: Path) -> str:
    """Returns the SHA-256, in hexadecimal, of what the modules of nvlm/ and build/ mean.

    `root` is the folder that holds both. A module's digest covers those of its imports, and imports
    may form a circle. So every module starts with the digest of its own text, and each round adds
    the digests of its imports. The rounds end when one distinguishes no more modules than the last.
    """
    paths = {
        _module_name(path.relative_to(root)): path
        for package in _PACKAGES
        for path in root.glob(f"{package}/**/*.py")
    }
    modules = {name: _read(name, path, paths.keys()) for name, path in paths.items()}
    before = {name: module.digest for name, module in modules.items()}
    while True:
        after = {name: module.with_imports(before) for name, module in modules.items()}
        if len(set(after.values())) == len(set(before.values())):
            break
        before = after
    digests = sorted(after[name] for name, module in modules.items() if not module.is_empty)
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@dataclass(frozen=True, slots=True)
class _Import:
    """A module of ours, or a name in it, as a file imports it."""

    module: str  # dotted path
    name: str = ""  # in the module; empty: the module itself
    # The name that it gets. Empty: every use is replaced by a place of its own, as for a module,
    # whose name follows the path.
    local: str = ""

    @property
    def bound(self) -> str:
        """The name that the statement binds: `import nvlm.model.fp8` binds nvlm."""
        return self.local.partition(".")[0]

    @property
    def bound_module(self) -> str:
        return self.bound if "." in self.local else self.module


@dataclass(frozen=True, slots=True)
class _Module:
    """One of our modules, read."""

    digest: str  # SHA-256 of its own text
    is_empty: bool  # whether nothing but comments and docstrings is in it
    places: list[list[_Import]]  # what it imports of ours, by place in its text

    def with_imports(self, digests: dict[str, str]) -> str:
        """Returns a digest that covers the `digests` of the imported modules.

        The order of imports at one place does not count.
        """
        places = [
            sorted(f"{digests[each.module]} {each.name} {each.local}" for each in place)
            for place in self.places
        ]
        return hashlib.sha256(f"{self.digest} {places}".encode()).hexdigest()


def _read(name: str, path: Path, ours: Collection[str]) -> _Module:
    tree = ast.parse(path.read_bytes(), str(path))
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    writer = _Writer(ours, package)
    writer.find_aliases(tree)
    writer.write(tree)
    text = "".join(writer.text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return _Module(digest, text == _EMPTY_MODULE, writer.places)


@dataclass(slots=True)
class _Writer:
    """Writes one syntax tree as text, without the names of our modules."""

    ours: Collection[str]  # names of all our modules
    package: str  # the package of the tree's module, from which relative imports start
    text: list[str] = field(default_factory=list)  # pieces, in order
    places: list[list[_Import]] = field(default_factory=list)  # imports of each place in the text
    aliases: dict[str, str] = field(default_factory=dict)  # local names of our modules

    def find_aliases(self, tree: ast.Module) -> None:
        """Finds the names whose every use is replaced: only one of our modules is bound to them.

        A name that is bound to anything else too, anywhere in the file, keeps its name. A field of
        a class is no such binding: methods do not see it.
        """
        bound: dict[str, set[str]] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                for each in self._split(node)[0]:
                    if not each.name:
                        bound.setdefault(each.bound, set()).add(each.bound_module)
        if bound:
            others = set(self._other_names(tree))
            self.aliases = {
                name: next(iter(modules))
                for name, modules in bound.items()
                if len(modules) == 1 and name not in others
            }

    def write(self, node: Any) -> None:
        """Writes a node, a list of them or a constant."""
        if isinstance(node, ast.AST):
            if module := self._module_at(node):
                self._write_place([_Import(module)])
            elif isinstance(node, ast.Constant):
                self.text.append(f"(Constant {node.value!a})")
            elif isinstance(node, ast.JoinedStr):
                self._write_joined(node)
            else:
                self._write_fields(node)
        elif isinstance(node, list) and node and isinstance(node[0], ast.stmt):
            self._write_statements(node)
        elif isinstance(node, list):
            self.text.append("[")
            for each in node:
                self.write(each)
            self.text.append("]")
        else:
            self.text.append(ascii(node) + ",")

    def _write_fields(self, node: ast.AST) -> None:
        self.text.append(f"({type(node).__name__}")
        for name in node._fields:
            value = getattr(node, name, None)
            if name not in _NO_MEANING and value is not None and value != []:
                start = len(self.text)
                self.text.append(f" {name}=")
                self.write(value)
                if len(self.text) == start + 1:  # statements without effect
                    self.text.pop()
        self.text.append(")")

    def _write_statements(self, statements: list[ast.stmt]) -> None:
        """Imports of ours come first, in no order. What does nothing is left out."""
        place: list[_Import] = []
        others: list[ast.stmt | str] = []
        for statement in statements:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                ours, foreign = self._split(statement)
                place += ours
                others += foreign
            elif not _does_nothing(statement):
                others.append(statement)
        if place:
            self._write_place(
                [
                    each if each.name or each.bound not in self.aliases else _Import(each.module)
                    for each in place
                ]
            )
        for other in others:
            if isinstance(other, str):
                self.text.append(other)
            else:
                self.write(other)

    def _write_joined(self, node: ast.JoinedStr) -> None:
        """Versions of Python cut the constant parts of an f-string in different places."""
        self.text.append("(JoinedStr")
        constant = ""
        for part in [*node.values, None]:
            if isinstance(part, ast.Constant):
                constant += str(part.value)
                continue
            if constant:
                self.text.append(ascii(constant))
                constant = ""
            if part is not None:
                self.write(part)
        self.text.append(")")

    def _write_place(self, imports: list[_Import]) -> None:
        self.text.append(_PLACE)
        self.places.append(imports)

    def _module_at(self, node: ast.AST) -> str | None:
        """The module of ours that an expression such as `fp8` or `nvlm.model.fp8` is."""
        if isinstance(node, ast.Name):
            return self.aliases.get(node.id) if isinstance(node.ctx, ast.Load) else None
        if isinstance(node, ast.Attribute) and (outer := self._module_at(node.value)):
            inner = f"{outer}.{node.attr}"
            return inner if inner in self.ours else None
        return None

    def _split(self, node: ast.Import | ast.ImportFrom) -> tuple[list[_Import], list[str]]:
        """What a statement imports of ours, and the text of what else it imports."""
        ours: list[_Import] = []
        foreign: list[str] = []
        source = None
        if isinstance(node, ast.ImportFrom):
            above = self.package.split(".")
            above = above[: len(above) + 1 - node.level] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
        for alias in node.names:
            full = alias.name if source is None else f"{source}.{alias.name}"
            if full in self.ours:
                ours.append(_Import(full, "", alias.asname or alias.name))
            elif source in self.ours:
                assert source is not None
                ours.append(_Import(source, alias.name, alias.asname or alias.name))
            else:
                foreign.append(f"(import {source} {alias.name} {alias.asname})")
        return ours, foreign

    def _other_names(self, tree: ast.Module) -> Iterator[str]:
        """The names that anything but an import of one of our modules binds, all over a file."""
        fields: set[ast.Name] = set()
        for node in ast.walk(tree):  # a class comes before its fields
            match node:
                case ast.ClassDef(name=name):
                    yield name
                    fields.update(_fields(node))
                case ast.Import() | ast.ImportFrom():
                    ours, _ = self._split(node)
                    yield from (each.local for each in ours if each.name)
                    known = {each.local for each in ours}
                    names = (each.asname or each.name for each in node.names)
                    yield from (each.partition(".")[0] for each in names if each not in known)
                case ast.Name(id=name, ctx=ast.Store() | ast.Del()) if node not in fields:
                    yield name
                case ast.arg(arg=name):
                    yield name
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                    yield name
                case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)):
                    yield name
                case ast.MatchStar(name=str(name)) | ast.MatchMapping(rest=str(name)):
                    yield name
                case ast.Global(names=names) | ast.Nonlocal(names=names):
                    yield from names


def _does_nothing(statement: ast.stmt) -> bool:
    """Whether a statement is a docstring, another bare constant, or `pass`."""
    return isinstance(statement, ast.Pass) or (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    )


def _fields(node: ast.ClassDef) -> Iterator[ast.Name]:
    """The annotated names of a class that its own body, which alone sees them, does not read."""
    read = {
        each.id
        for statement in node.body
        for part in _evaluated_in_class(statement)
        for each in ast.walk(part)
        if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Load)
    }
    for statement in node.body:
        match statement:
            case ast.AnnAssign(target=ast.Name(id=name) as target) if name not in read:
                yield target


def _evaluated_in_class(statement: ast.stmt) -> list[ast.AST]:
    """The parts of a class's statement that see its names: all but the body of a method."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
        returned = [statement.returns] if statement.returns else []
        return [*statement.decorator_list, statement.args, *returned]
    return [statement]
