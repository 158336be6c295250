"""Calibration without a picture: vision has no scales, and both programs say why."""

from __future__ import annotations

from pathlib import Path

import pytest

from build.conversion.convert import ConvertOptions, convert
from build.engines.specification import BuildOptions, specify
from build.sources.hugging_face import HuggingFaceSource
from nvlm.formats import layout
from nvlm.program.errors import UserError
from tests.conftest import CPU, MEMORY_BYTES


def test_text_alone_leaves_vision_out_and_both_programs_say_why(
    tmp_path: Path, model_dir: Path, checkpoint_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "prompts.txt"
    data.write_text("What is this?\n")
    text = tmp_path / "text"
    cached = tmp_path / "cached"
    for output, options in (
        (text, ConvertOptions(calib_data=data)),
        (cached, ConvertOptions(calib_cache=text / layout.REPORT)),
    ):
        caplog.clear()
        convert(HuggingFaceSource(model_dir), output, options, CPU)
        assert "no calibration sample holds a picture" in caplog.text
        with pytest.raises(UserError, match="its calibration samples held no picture"):
            specify(output, BuildOptions(vision_precision="FP8"), CPU, MEMORY_BYTES)
    caplog.clear()
    with_pictures = ConvertOptions(calib_cache=checkpoint_dir / layout.REPORT)
    convert(HuggingFaceSource(model_dir), tmp_path / "pictures", with_pictures, CPU)
    assert "picture" not in caplog.text
