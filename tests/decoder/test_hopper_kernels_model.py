"""The fast path with its kernels against the oracle: on a Hopper GPU if there is one, else in
Triton's interpreter (see test_kernels.py), with plain forms in the place of libraries' calls."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from build.conversion.convert import ConvertOptions
from nvlm.planning import hopper
from runtime.decoder.kernels.plain_forms import PlainForms
from runtime.decoder.models.hopper_model import HopperModel
from runtime.decoder.models.hopper_weights import load_hopper_weights
from runtime.decoder.models.plain_model import PlainModel
from runtime.decoder.models.step import DecoderModel
from runtime.decoder.models.torch_weights import load_weights, open_weights
from runtime.engine.engine_dir import EngineDir
from tests.conftest import CPU, Workshop
from tests.decoder import test_kernels
from tests.decoder.test_hopper_model import MAX_SEQ_LEN, NUM_BLOCKS, SCENES, prompt, token
from tests.decoder.test_kernels import rounding  # noqa: F401 - a fixture
from tests.support.tolerances import FAST_PATH_LOGITS, FAST_PATH_ROW, relative_error

DEVICE = test_kernels.DEVICE
DTYPE = {torch.bfloat16: "bfloat16", torch.float16: "float16"}[test_kernels.DTYPE]


# In the interpreter few rows, through every kernel: prompts, chunks and tokens beside each other.
A, C = [3, 0, 9], [7]
SHORT = {
    "a picture": SCENES["a picture"],
    "tokens beside chunks": [
        [prompt(0, 33, A)],
        [prompt(0, 4, C, is_last=False), token(33, A)],
        [token(34, A), prompt(4, 5, C)],
    ],
}
MIXTURES = SCENES if DEVICE.type == "cuda" else SHORT
CHUNK_SIZES = hopper.CHUNK_SIZES if DEVICE.type == "cuda" else (8, 24, 40)  # less padding


class _Forms(test_kernels.TritonForms):
    """What the interpreter cannot run is replaced."""

    if DEVICE.type == "cpu":
        head, linear = PlainForms.head, PlainForms.linear


CACHES: dict[str, tuple[str | None, str, bool]] = {
    "one scale": ("FP8", "one", False),
    "own scales": ("FP8", "own", False),
    "in dtype": (None, "one", False),
    "one scale, FP8 head": ("FP8", "one", True),
}
"""What keys and values are converted to, how they are built, and whether the head is in FP8."""


@pytest.fixture(scope="module", params=CACHES)
def models(
    request: pytest.FixtureRequest, workshop: Workshop, model_dir: Path
) -> dict[str, DecoderModel]:
    """The oracle on the CPU, and the fast path with and without CUDA graphs."""
    algo, scales, has_fp8_head = CACHES[request.param]
    options = ConvertOptions(dtype=DTYPE, kv_cache_quant_algo=algo, quantize_lm_head=has_fp8_head)
    name = f"{DTYPE}_{algo}{'_fp8_head' * has_fp8_head}"
    checkpoint = workshop.checkpoint(f"fp8_{name}", model_dir, options)
    name = f"engine_fp8_{name}_{scales}"
    engine_dir = workshop.engine(name, checkpoint, vision="torch", kv_cache_scales=scales)
    config = EngineDir.read(engine_dir).checkpoint_config
    source = open_weights(engine_dir / "llm", config)
    weights = load_hopper_weights(source, config, DEVICE)

    def fast(use_graphs: bool) -> HopperModel:
        forms = _Forms(DEVICE)
        arguments = (config, 5, MAX_SEQ_LEN, weights, NUM_BLOCKS, DEVICE, forms)
        model = HopperModel(*arguments, chunk_sizes=CHUNK_SIZES)
        if DEVICE.type == "cuda" and use_graphs:
            model.capture_graphs()
        return model

    oracle = PlainModel(config, load_weights(source, config, CPU), NUM_BLOCKS, CPU)
    return {
        "oracle": oracle,
        "graphs": fast(use_graphs=True),
        "launches": fast(use_graphs=False),
    }


@pytest.mark.parametrize("name", MIXTURES)
@torch.inference_mode()
def test_every_mixture_gives_the_oracles_logits(models: dict[str, DecoderModel], name: str) -> None:
    for steps in MIXTURES[name]:
        expected, found = (models[each].forward(steps) for each in ("oracle", "graphs"))
        error = relative_error(found.cpu(), expected) if len(expected) else 0.0
        print(f"{name}: {len(expected)} rows, {error:.4f}")
        assert error < (FAST_PATH_ROW if len(expected) == 1 else FAST_PATH_LOGITS)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("name", SCENES)
@torch.inference_mode()
def test_graphs_and_single_launches_agree_bit_for_bit(
    models: dict[str, DecoderModel], name: str
) -> None:
    for steps in SCENES[name]:
        assert torch.equal(*(models[each].forward(steps) for each in ("graphs", "launches")))
