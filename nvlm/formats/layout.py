"""Names every file and folder of a model, a checkpoint and an engine directory.

    model_dir/        config.json
                      model.safetensors.index.json and its shards, or model.safetensors
                      or latest_checkpointed_iteration.txt and iter_*/mp_rank_*/ (Megatron-Core)
    checkpoint_dir/   manifest.json, config.json, rank{r}.safetensors
                      quantization_report.json, quantization_report.html
        vision/       config.json, model.safetensors, scales.safetensors
        tokenizer/    as published
    engine_dir/       manifest.json
        llm/          config.json and rank{r}.safetensors (target torch)
                      decoder.json, config.json and rank{r}.engine (target tensorrt_llm)
        vision/       config.json, and by target:
                      model.safetensors and scales.safetensors (torch)
                      model.onnx and model.onnx.data (onnxruntime)
                      model.engine and summary.json (tensorrt, tensorrt_rtx)
        tokenizer/    as published
        kernels/      about.json and folders of compiled kernels, in no manifest

No other file spells these names. A tokenizer's own files have the same names everywhere, which
nvlm/inputs/tokenizer.py owns. Hidden files are scaffolding: they go before a directory gets its
name.
"""

from __future__ import annotations

from pathlib import Path

# Folders.
VISION = "vision"
LLM = "llm"
TOKENIZER = "tokenizer"
KERNELS = "kernels"

# In several of them.
MANIFEST = "manifest.json"
CONFIG = "config.json"
"""Describes the folder that it stands in: the keys differ from folder to folder."""
WEIGHTS = "model.safetensors"
"""A whole model, or below vision/ the vision model."""

# In a model directory.
WEIGHTS_INDEX = "model.safetensors.index.json"
SHARDS = "model*.safetensors"
"""The pattern of the published names."""
ANY_WEIGHTS = "*.safetensors"
"""The pattern of every file that may hold weights."""
MEGATRON_TRACKER = "latest_checkpointed_iteration.txt"

# Below vision/.
SCALES = "scales.safetensors"
GRAPH = "model.onnx"
GRAPH_DATA = "model.onnx.data"
"""torch.onnx adds `.data` to the graph's name."""
ENGINE = "model.engine"
SUMMARY = "summary.json"

# In a checkpoint directory.
REPORT = "quantization_report.json"
REPORT_PAGE = "quantization_report.html"

# Below kernels/.
ABOUT_KERNELS = "about.json"
KERNEL_TYPES = "types.json"  # of the arguments of those kernels

# In the folder of --timing_cache.
VISION_TIMINGS = "vision.cache"
DECODER_TIMINGS = "llm.cache"
UNKEPT_TIMINGS = "model.cache"
"""Stands below llm/ while TensorRT-LLM builds without --timing_cache."""

# In a directory that is being written.
UNFINISHED = ".unfinished"
JOURNAL = ".journal"
STATES_PREFIX = ".states-"
"""Begins the names of files of hidden states; a number ends them."""


def shard(number: int, num_shards: int) -> str:
    """Name a file of a model's weights; numbers count from 1."""
    return f"model-{number:05d}-of-{num_shards:05d}.safetensors"


def rank_file(rank: int) -> str:
    """Name the file of a rank's decoder tensors, in a checkpoint directory and below llm/."""
    return f"rank{rank}.safetensors"


def rank_engine(rank: int) -> str:
    """Name the TensorRT-LLM engine of a rank, below llm/."""
    return f"rank{rank}.engine"


def decoder_config_file(target: str) -> str:
    """Name our description of the decoder below llm/.

    Where TensorRT-LLM built the engine, config.json is its own.
    """
    return "decoder.json" if target == "tensorrt_llm" else CONFIG


def staging(final: Path) -> Path:
    """Say where a directory is written before it gets its name."""
    return final.with_name(f"{final.name}.partial")


def replaced(final: Path) -> Path:
    """Say where a directory stands aside until the one that replaces it has its name."""
    return final.with_name(f".{final.name}.replaced")
