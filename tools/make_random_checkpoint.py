"""A checkpoint with random weights in the published layout of NVLM-D-72B, of any size.

Same tensor names, F32/BF16 mix, zero dummy heads, sharded safetensors with an index, config.json
and tokenizer. For tests, benchmarks and, until real weights are at hand, for trying the commands.

    python -m tools.make_random_checkpoint --output_dir D [--preset tiny|small|72b] [--seed N]
        [--num_hidden_layers N] [--vision_num_hidden_layers N]    # fewer layers of the real width
"""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from nvlm.formats.tensor_names import StoredTensor
from nvlm.inputs.tokenizer import tokenizer_files
from nvlm.model.config import NUM_DUMMY_HEADS, NVLMConfig
from tools.make_tokenizer import write_tokenizer
from tools.model_dir import Shape, model_config, write_model_dir

_MAX_BLOCK_VALUES = 1 << 26

PRESETS = {
    "tiny": Shape(),
    # Wide enough that time goes where it goes in the real model, small enough for a laptop.
    "small": Shape(
        vision_hidden_size=400,
        vision_intermediate_size=1600,
        vision_num_hidden_layers=4,
        vision_num_attention_heads=25,
        image_size=448,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
    ),
    "72b": Shape(
        vision_hidden_size=3200,
        vision_intermediate_size=12800,
        vision_num_hidden_layers=45,
        vision_num_attention_heads=25,
        image_size=448,
        hidden_size=8192,
        intermediate_size=29568,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=152064,
    ),
}


def write_random_checkpoint(
    model_dir: Path,
    shape: Shape,
    *,
    seed: int = 0,
    max_shard_bytes: int = 4_000_000_000,
    tokenizer_dir: Path | None = None,
    device: str = "cpu",
) -> None:
    """Writes a whole model directory; with `tokenizer_dir`, that tokenizer is copied into it.

    Values are drawn on `device`: a GPU draws others than a CPU, a hundred times faster.
    """
    model_dir.mkdir(parents=True, exist_ok=True)
    if tokenizer_dir is None:
        num_tokens = write_tokenizer(model_dir)
        assert num_tokens <= shape.vocab_size, f"{num_tokens} tokens, {shape.vocab_size} rows"
    else:
        for path in tokenizer_files(tokenizer_dir):
            shutil.copy(path, model_dir)
    generator = torch.Generator(device).manual_seed(seed)
    config = model_config(shape)

    def blocks_of(tensor: StoredTensor) -> Iterator[torch.Tensor]:
        for part in _row_blocks(tensor):
            yield random_tensor(part, config, generator)

    write_model_dir(model_dir, shape, blocks_of, max_shard_bytes)


def _row_blocks(tensor: StoredTensor) -> Iterator[StoredTensor]:
    """Parts of a large tensor that does not fit in memory as float32, in order; else itself."""
    rows = max(1, _MAX_BLOCK_VALUES // math.prod(tensor.shape[1:]))
    if rows >= tensor.shape[0] or tensor.name.startswith("vision_model."):  # dummy heads
        yield tensor
        return
    for start in range(0, tensor.shape[0], rows):
        count = min(rows, tensor.shape[0] - start)
        yield replace(tensor, shape=(count, *tensor.shape[1:]))


def random_tensor(
    tensor: StoredTensor, config: NVLMConfig, generator: torch.Generator
) -> torch.Tensor:
    """Values that keep activations near 1: linears N(0, 1 / fan_in), norms near 1, dummies 0.

    Small embeddings and sharp attention make the answer depend on the whole prompt; otherwise a
    random model soon repeats itself.
    """
    values = torch.randn(tensor.shape, generator=generator, device=generator.device)
    kind = tensor.name.split(".")
    if (len(tensor.shape) == 1 and "norm" in tensor.name) or tensor.name == "mlp1.0.weight":
        values = 1.0 + 0.1 * values
    elif tensor.name.endswith("lm_head.weight"):
        values *= 3.0 * tensor.shape[1] ** -0.5
    elif kind[-2] == "embed_tokens":
        values *= 0.3
    elif kind[-2] in ("q_proj", "k_proj") and len(tensor.shape) == 2:
        values *= 2.0 * tensor.shape[1] ** -0.5
    elif len(tensor.shape) == 2:
        values *= tensor.shape[1] ** -0.5
    elif len(tensor.shape) == 4:
        values *= (3 * tensor.shape[2] * tensor.shape[3]) ** -0.5
    elif kind[-1] in ("bias", "ls1", "ls2"):
        values *= 0.2
    return _zero_dummy_heads(tensor.name, values, config).to(tensor.dtype)


def _zero_dummy_heads(name: str, values: torch.Tensor, config: NVLMConfig) -> torch.Tensor:
    """The last `NUM_DUMMY_HEADS` heads of q, k, v and of the projection's columns are zero."""
    real = config.vision.hidden_size
    assert config.vision.num_dummy_heads == NUM_DUMMY_HEADS
    if name.endswith(("attn.q_norm.weight", "attn.k_norm.weight")):
        values[real:] = 0
    elif name.endswith("attn.qkv.weight"):
        values.view(3, -1, real)[:, real:] = 0
    elif name.endswith("attn.proj.weight"):
        values[:, real:] = 0
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    depths = ("num_hidden_layers", "vision_num_hidden_layers")
    for name in depths:
        parser.add_argument(f"--{name}", type=int, help="instead of the preset's")
    arguments = parser.parse_args()
    given = {name: getattr(arguments, name) for name in depths if getattr(arguments, name)}
    shape = replace(PRESETS[arguments.preset], **given)
    write_random_checkpoint(arguments.output_dir, shape, seed=arguments.seed)


if __name__ == "__main__":
    main()
