"""Names inside an engine directory that both its writer and its reader need."""

from __future__ import annotations


def decoder_config_file(target: str) -> str:
    """Our description of the decoder in `llm/`; `config.json` is TensorRT-LLM's own where it
    built the engine."""
    return "decoder.json" if target == "tensorrt_llm" else "config.json"
