"""Rules on the prose of the code that a program can check; CONTRIBUTING.md states them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.support.command import ROOT
from tools.code_figures import docstrings

PUBLIC = [
    path
    for room in ("nvlm", "build", "runtime", "evaluation", "frontends")
    for path in sorted((ROOT / room).rglob("*.py"))
]


def dataclass_fields(tree: ast.Module) -> Iterator[tuple[str, ast.AnnAssign]]:
    """(class, field) of every dataclass."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef):
            continue
        if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
            for line in node.body:
                if isinstance(line, ast.AnnAssign) and "ClassVar" not in ast.unparse(line):
                    yield node.name, line


def undescribed(source: str) -> list[str]:
    """Fields with neither a comment at the line or above it, nor a `help` of their own."""
    lines = source.splitlines()
    found = []
    for name, field in dataclass_fields(ast.parse(source)):
        own = "\n".join(lines[field.lineno - 1 : field.end_lineno])
        above = lines[field.lineno - 2].strip()
        if "#" not in own and "help=" not in own and not above.startswith("#"):
            found.append(f"{name}.{ast.unparse(field.target)}")
    return found


def test_a_field_without_a_comment_is_found() -> None:
    source = '''
@dataclass(frozen=True)
class Grid:
    """columns: this does not count."""

    columns: int
    rows: int  # without the thumbnail
    # Pixels.
    side: int = 448
    name: str = row(
        help="what it is called",
    )
    NAMES: ClassVar[int] = 3


class Other:
    size: int
'''
    assert undescribed(source) == ["Grid.columns"]


def test_every_field_of_a_dataclass_has_a_comment() -> None:
    found = {
        str(path.relative_to(ROOT)): fields
        for path in PUBLIC
        if (fields := undescribed(path.read_text()))
    }
    assert found == {}


def test_no_docstring_begins_with_of() -> None:
    """A docstring is a sentence with a subject or an imperative."""
    found = []
    for path in ROOT.rglob("*.py"):
        if ".venv" in path.parts or '"""Of ' not in (source := path.read_text()):
            continue
        texts = (doc.value for doc in docstrings(ast.parse(source)))
        found += [f"{path.relative_to(ROOT)}: {text}" for text in texts if str(text)[:3] == "Of "]
    assert found == []


def test_names_of_functions_use_the_words_of_the_field() -> None:
    """report for tell, fix for mend, resume or continue for go on, in flight for under way."""
    own = re.compile(r"(^|_)(told|tells?|mend|mends|mended|lacks|goes_on|go_on|under_way)(_|$)")
    found = [
        f"{path.relative_to(ROOT)}: {node.name}"
        for path in ROOT.rglob("*.py")
        if ".venv" not in path.parts
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and own.search(node.name)
    ]
    assert found == []
