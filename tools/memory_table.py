"""Memory of NVLM-D 72B per GPU with TensorRT-LLM, as tables for documents.

    python -m tools.memory_table [--max_batch_size N] [--max_num_images N] [--vision_precision P]

Everything is nvlm/planning/memory_plan.py's; nothing is loaded, so it runs anywhere.
"""

from __future__ import annotations

from pathlib import Path

from build.engines.specification import MAX_TILES_PER_PASS
from nvlm.formats import layout
from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.model.config import NVLMConfig
from nvlm.planning.limits import derive_limits
from nvlm.planning.memory_plan import plan_tensorrt_llm
from nvlm.program.command_line import ArgumentParser, positive_int, run
from tools.make_random_checkpoint import PRESETS
from tools.model_dir import config_json

GPUS = {"H100 80 GB": 78 << 30, "H200 141 GB": 139 << 30}
"""What torch reports as total memory, rounded down."""

_COLUMNS = (
    *("weights, GB", "vision, GB", "prompt table, GB", "workspace, GB", "KV cache, GB"),
    *("KV tokens", "fits"),
)


def table(max_batch_size: int, max_num_images: int, vision_precision: str) -> list[str]:
    """Markdown. Rank 0, which holds most: vision runs there."""
    config = NVLMConfig.from_hf(config_json(PRESETS["72b"]), Path(layout.CONFIG))
    limits = derive_limits(
        config.decoder,
        config.tiling,
        config.vision.tokens_per_tile,
        max_batch_size=max_batch_size,
        max_num_images=max_num_images,
    )
    tiles = min(max_batch_size * config.tiling.max_tiles_per_image, MAX_TILES_PER_PASS)
    rows = [
        f"| GPU | TP | {' | '.join(_COLUMNS)} |",
        f"|---|---|{'---|' * len(_COLUMNS)}",
    ]
    for name, memory_bytes in GPUS.items():
        for tp_size in (1, 2, 4, 8):
            decoder = CheckpointConfig(config.decoder, "bfloat16", "FP8", "FP8", tp_size)
            plan = plan_tensorrt_llm(
                decoder, config.vision, vision_precision, limits, tiles, memory_bytes
            )
            sizes = (
                *(plan.decoder_weight_bytes, plan.vision_weight_bytes),
                *(plan.prompt_table_bytes, plan.workspace_bytes, plan.kv_cache_bytes),
            )
            columns = " | ".join(f"{size / 1e9:.1f}" for size in sizes)
            fits = "yes" if plan.fits(memory_bytes) else "no"
            rows.append(f"| {name} | {tp_size} | {columns} | {plan.kv_cache_tokens:,} | {fits} |")
    return rows


def main() -> None:
    parser = ArgumentParser((__doc__ or "").partition("\n")[0], "python -m tools.memory_table")
    parser.add_argument(
        "--max_batch_size", type=positive_int, default=8, metavar="N", help="requests in a step"
    )
    parser.add_argument(
        "--max_num_images", type=positive_int, default=1, metavar="N", help="images of a request"
    )
    parser.add_argument(
        "--vision_precision",
        choices=("bfloat16", "FP8"),
        default="bfloat16",
        help="number format of vision",
    )
    arguments = parser.parse_args()
    print(
        "\n".join(
            table(arguments.max_batch_size, arguments.max_num_images, arguments.vision_precision)
        )
    )


if __name__ == "__main__":
    run(main)
