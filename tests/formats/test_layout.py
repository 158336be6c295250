"""Nothing in the product spells a name on disk again.

nvlm/formats/layout.py owns them, and nvlm/inputs/tokenizer.py those of a tokenizer's own files.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvlm.formats import layout
from nvlm.inputs import tokenizer
from tests.support.command import ROOT

PRODUCT = ("nvlm", "build", "runtime", "frontends", "evaluation", "tools", "bench")
OWNERS = {Path(layout.__file__), Path(tokenizer.__file__)}
FOLDERS = {layout.VISION, layout.LLM, layout.TOKENIZER, layout.KERNELS}
NAMES = [value for name, value in vars(layout).items() if name.isupper()]
FILES = {*NAMES, layout.decoder_config_file("tensorrt_llm"), *tokenizer.PUBLISHED_FILES} - FOLDERS
RANKS = re.compile(r"(rank.*)?\.(safetensors|engine)")


def second_spellings(code: str) -> Iterator[str]:
    """File names anywhere but in prose; folders, which are everyday words, only in paths."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        match node:
            case ast.BinOp(op=ast.Div(), right=ast.Constant(value=str(name))) if name in FOLDERS:
                yield f"line {node.lineno}: / {name!r}"
            case ast.Constant(value=str(text)):
                parts = text.split("/")
                is_path = len(parts) > 1 and parts[0] in FOLDERS
                is_file = parts[-1] in FILES or RANKS.fullmatch(parts[-1])
                if is_path or is_file:
                    yield f"line {node.lineno}: {text!r}"


def test_each_name_is_written_once() -> None:
    files = [path for folder in PRODUCT for path in (ROOT / folder).rglob("*.py")]
    files += ROOT.glob("*.py")
    assert len(files) > 200
    found = {
        f"{path.relative_to(ROOT)}, {spelling}"
        for path in files
        if path not in OWNERS
        for spelling in second_spellings(path.read_text())
    }
    assert not found, sorted(found)


def test_no_two_names_of_the_layout_are_the_same() -> None:
    assert sorted(NAMES) == sorted(set(NAMES))


@pytest.mark.parametrize(
    "code",
    [
        'path / "config.json"',
        'path / "vision"',
        '"vision/" + name',
        'path / f"rank{rank}.safetensors"',
        'path / "rank0.engine"',
        'path.glob("*.safetensors")',
        'open("llm/decoder.json")',
    ],
)
def test_a_second_spelling_is_found(code: str) -> None:
    assert list(second_spellings(code))


@pytest.mark.parametrize(
    "code", ['{"vision": 1}', '"config.json asks for more"', 'getLogger("torch.onnx")']
)
def test_words_and_prose_are_no_spellings(code: str) -> None:
    assert not list(second_spellings(code))
