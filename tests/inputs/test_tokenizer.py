"""tokenizer.json as other software leaves it: with the truncation and padding it last used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as TokenizersTokenizer

from build.conversion.calibration.calibration_set import load_calibration_set
from build.sources.hugging_face import HuggingFaceSource
from nvlm.inputs.tokenizer import TOKENIZER_FILE, Tokenizer
from nvlm.program.errors import UserError

TEXT = "How many shapes are there? " * 20
CUT, FILLED = 8, 4096
TRUNCATION = {"max_length": CUT, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
PADDING = {
    "strategy": {"Fixed": FILLED},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "!",
}
WRITTEN = {
    "truncation": {"truncation": TRUNCATION},
    "padding": {"padding": PADDING},
    "both": {"truncation": TRUNCATION, "padding": PADDING},
}


@pytest.fixture(params=WRITTEN)
def written_dir(model_dir: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """The model's tokenizer, saved after it was used with these settings."""
    shutil.copy(model_dir / "tokenizer_config.json", tmp_path)
    values = json.loads((model_dir / TOKENIZER_FILE).read_text())
    (tmp_path / TOKENIZER_FILE).write_text(json.dumps({**values, **WRITTEN[request.param]}))
    return tmp_path


def test_truncation_and_padding_of_the_file_touch_no_prompt(
    model_dir: Path, written_dir: Path
) -> None:
    in_the_file = TokenizersTokenizer.from_file(str(written_dir / TOKENIZER_FILE))
    assert len(in_the_file.encode(TEXT).ids) in (CUT, FILLED), "the settings do something"
    expected = Tokenizer(model_dir).encode(TEXT)
    assert CUT < len(expected) < FILLED
    assert Tokenizer(written_dir).encode(TEXT) == expected


def test_truncation_and_padding_of_the_file_touch_no_calibration(
    model_dir: Path, written_dir: Path, tmp_path: Path
) -> None:
    data = tmp_path / "prompts.txt"
    data.write_text(f"{TEXT}\nHow many?\n")
    config = HuggingFaceSource(model_dir).config
    found = [
        load_calibration_set(data, 2, config, Tokenizer(folder))
        for folder in (model_dir, written_dir)
    ]
    assert found[0].lengths == found[1].lengths
    assert found[0].sha256 == found[1].sha256


def changed_tokenizer(folder: Path, tokenizer_dir: Path, change: Callable[[Any], object]) -> Path:
    values = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    change(values)
    (folder / "tokenizer.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["model"].update(dropout=0.1), "dropout 0.1, which tokenises at random"),
        (lambda v: v["model"].update(dropout=True), "dropout True"),
        (lambda v: v["model"]["vocab"].pop("!"), "no token for the byte 0x21"),
        (lambda v: v["model"]["vocab"].update({"!": 1}), "one id, 1, for the tokens"),
        (lambda v: v["model"]["vocab"].update({"!": -1}), "the id -1"),
        (lambda v: v["model"]["vocab"].update({"!": True}), "the id True"),
        (lambda v: v["model"]["vocab"].update({"!": 1 << 40}), "the id 1099511627776"),
        (lambda v: v["added_tokens"][0].update(id=0), "one id, 0, for the tokens"),
        (lambda v: v["added_tokens"][0].update(special=1), "special 1"),
        (lambda v: v["added_tokens"][0].update(content=3), "has the token 3"),
        (lambda v: v.update(added_tokens={"a": 1}), "not a whole byte-level BPE"),
    ],
)
def test_a_tokenizer_that_would_make_other_prompts_is_refused(
    model_dir: Path, tmp_path: Path, change: Callable[[Any], object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Tokenizer(changed_tokenizer(tmp_path, model_dir, change))


def test_a_tokenizer_that_loses_text_is_refused(model_dir: Path, tmp_path: Path) -> None:
    def without_spaces(values: Any) -> None:
        pattern = {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed"}
        before = [{**pattern, "invert": False}, values["pre_tokenizer"]]
        values["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": before}

    with pytest.raises(UserError, match="loses text"):
        Tokenizer(changed_tokenizer(tmp_path, model_dir, without_spaces))


def test_a_panic_of_the_library_is_an_error_of_the_file(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stops a library in Rust is a BaseException; Control-C stays what it is."""

    class PanicException(BaseException):
        pass

    for error, expected in ((PanicException("x"), UserError), (KeyboardInterrupt(), None)):

        def fail(*_: Any, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr(TokenizersTokenizer, "from_str", fail)
        with pytest.raises(expected or KeyboardInterrupt):
            Tokenizer(model_dir)
