"""Bad input to exports: one clear line, exit 2, nothing half-written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from nvlm.formats import manifest
from tests.conftest import BF16, FP8, Workshop
from tests.support.command import BUILD, CONVERT, one_line_error, refused, run_command

EXPORTS = ("modelopt", "compressed-tensors")


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "calibration.jsonl"
    path.write_text('{"prompt": "How many shapes are there?"}\n')
    return path


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        (("--output_format", "gguf"), ("--output_format", "'gguf'", "modelopt")),
        (("--text_only",), ("--text_only needs --output_format modelopt",)),
        (
            ("--vision_quant_algo", "FP8"),
            ("--vision_quant_algo needs --output_format", "build_engine.py --vision_precision"),
        ),
        (
            ("--output_format", "modelopt", "--vision_quant_algo", "FP8"),
            ("modelopt holds vision in --dtype alone", "--output_format compressed-tensors"),
        ),
        (
            (
                *("--output_format", "compressed-tensors", "--vision_quant_algo", "FP8"),
                "--text_only",
            ),
            ("--vision_quant_algo FP8", "--text_only leaves out"),
        ),
        (
            ("--output_format", "modelopt", "--quant_algo", "none"),
            ("modelopt holds FP8 linears", "--quant_algo none", "use --quant_algo FP8"),
        ),
        (
            ("--output_format", "compressed-tensors", "--tp_size", "2"),
            ("holds the model whole", "--tp_size 2"),
        ),
        (
            ("--output_format", "modelopt", "--projector_norm_eps", "1e-6"),
            ("no place for --projector_norm_eps 1e-06", "expected 1e-05"),
        ),
    ],
)
def test_what_a_format_cannot_hold_is_refused(
    flags: tuple[str, ...], fragments: tuple[str, ...], model_dir: Path, tmp_path: Path
) -> None:
    start = ("--model_dir", model_dir, "--output_dir", tmp_path / "new", "--device", "cpu")
    refused(tmp_path, CONVERT, *start, *flags, fragments=fragments)


def test_fp8_vision_without_pictures_is_refused(
    model_dir: Path, calibration: Path, tmp_path: Path
) -> None:
    start = ("--model_dir", model_dir, "--output_dir", tmp_path / "new", "--device", "cpu")
    chosen = ("--output_format", "compressed-tensors", "--vision_quant_algo", "FP8")
    fragments = ("--vision_quant_algo FP8", "pictures", "--calib_data")
    refused(tmp_path, CONVERT, *start, *chosen, "--calib_data", calibration, fragments=fragments)


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        ((), ("--output_format trtllm", "give --output_format modelopt")),
        (
            ("--output_format", "modelopt", "--dtype", "float16"),
            ("--dtype was chosen when --checkpoint_dir was converted",),
        ),
        (("--output_format", "modelopt", "--dry_run"), ("--dry_run plans a conversion",)),
        (
            ("--output_format", "modelopt", "--model_dir", "x"),
            ("--model_dir and --checkpoint_dir", "give one"),
        ),
    ],
)
def test_flags_beside_a_checkpoint_are_refused(
    flags: tuple[str, ...], fragments: tuple[str, ...], checkpoint_dir: Path, tmp_path: Path
) -> None:
    start = ("--checkpoint_dir", checkpoint_dir, "--output_dir", tmp_path / "new")
    refused(tmp_path, CONVERT, *start, *flags, fragments=fragments)


def test_a_conversion_without_any_input_is_refused(tmp_path: Path) -> None:
    fragments = ("--model_dir is required", "--checkpoint_dir", "--help")
    refused(tmp_path, CONVERT, "--output_dir", tmp_path / "new", fragments=fragments)


def test_a_checkpoint_that_is_not_quantised_or_no_checkpoint_is_refused(
    workshop: Workshop, model_dir: Path, engine_dir: Path, tmp_path: Path
) -> None:
    plain = workshop.checkpoint("bf16_checkpoint", model_dir, BF16)
    end = ("--output_dir", tmp_path / "new", "--output_format", "modelopt")
    fragments = ("--quant_algo none", "convert with --quant_algo FP8")
    refused(tmp_path, CONVERT, "--checkpoint_dir", plain, *end, fragments=fragments)
    for other in (model_dir, engine_dir, tmp_path / "none"):
        line = refused(tmp_path, CONVERT, "--checkpoint_dir", other, *end)
        assert str(other) in line


@pytest.mark.parametrize("flags", [(), ("--text_only",)], ids=["whole", "text"])
@pytest.mark.parametrize("output_format", EXPORTS)
def test_an_export_is_no_model_and_no_checkpoint(
    output_format: str, flags: tuple[str, ...], checkpoint_dir: Path, tmp_path: Path
) -> None:
    """Read back by our own programs: said in one line, also where its manifest is gone."""
    place, root = tmp_path / "export", tmp_path / "root"
    start = ("--checkpoint_dir", checkpoint_dir, "--output_format", output_format)
    assert run_command(CONVERT, *start, *flags, "--output_dir", place).exit_code == 0
    root.mkdir()
    end = ("--output_dir", root / "new", "--device", "cpu")
    fragments = (str(place), "is an export for other engines", "give what it was made from")
    refused(root, CONVERT, "--model_dir", place, *end, fragments=fragments)
    engine = ("--engine_dir", root / "engine")
    fragments = ("kind 'export'", "expected kind 'checkpoint'")
    refused(root, BUILD, "--checkpoint_dir", place, *engine, fragments=fragments)
    (place / manifest.MANIFEST).unlink()
    fragments = (f"quantised already, by {output_format}", "unquantised")
    refused(root, CONVERT, "--model_dir", place, *end, fragments=fragments)


def test_an_export_is_replaced_only_when_asked_and_nothing_else_is(
    checkpoint_dir: Path, tmp_path: Path
) -> None:
    place = tmp_path / "export"
    start = ("--checkpoint_dir", checkpoint_dir, "--output_format", "modelopt")
    arguments = (*start, "--output_dir", place)
    assert run_command(CONVERT, *arguments).exit_code == 0
    refused(tmp_path, CONVERT, *arguments, fragments=("exists", "--overwrite"))
    before = (place / manifest.MANIFEST).stat().st_mtime_ns
    assert run_command(CONVERT, *arguments, "--if_stale").exit_code == 0
    assert (place / manifest.MANIFEST).stat().st_mtime_ns == before
    assert run_command(CONVERT, *arguments, "--overwrite").exit_code == 0
    taken = shutil.copytree(checkpoint_dir, tmp_path / "checkpoint")
    over = (*start, "--output_dir", taken, "--overwrite")
    refused(tmp_path, CONVERT, *over, fragments=("an export directory", "not overwritten"))


def test_a_damaged_checkpoint_is_refused(fresh: Workshop, model_dir: Path) -> None:
    checkpoint = fresh.checkpoint("checkpoint", model_dir, FP8)
    path = checkpoint / "rank0.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    end = ("--output_dir", fresh.root / "new", "--output_format", "modelopt")
    line = refused(fresh.root, CONVERT, "--checkpoint_dir", checkpoint, *end)
    assert "rank0.safetensors has" in line


@pytest.mark.parametrize("output_format", EXPORTS)
def test_a_dry_run_says_what_the_export_takes(
    output_format: str, model_dir: Path, tmp_path: Path
) -> None:
    start = ("--model_dir", model_dir, "--output_format", output_format, "--device", "cpu")
    sizes = []
    for flags in ((), ("--text_only",)):
        place = tmp_path / f"out{len(flags)}"
        planned = run_command(CONVERT, *start, *flags, "--output_dir", place, "--dry_run")
        assert planned.exit_code == 0
        assert not place.exists()
        assert run_command(CONVERT, *start, *flags, "--output_dir", place).exit_code == 0
        real = sum(path.stat().st_size for path in place.iterdir())
        said = json.loads(planned.stdout)["output_bytes"]
        assert real <= said <= real + (65 << 20), "beside the slack for tokenizer and reports"
        sizes.append(said)
    assert sizes[1] < sizes[0]


def test_a_disk_too_small_is_reported(
    checkpoint_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=300_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    start = ("--checkpoint_dir", checkpoint_dir, "--output_dir", tmp_path / "new")
    result = run_command(CONVERT, *start, "--output_format", "modelopt")
    one_line_error(result, "--output_dir", "needs", "its disk has 0.3 MB free")
    assert list(tmp_path.iterdir()) == []
