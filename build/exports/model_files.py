"""What stands beside an export's weights: config.json, the tokenizer, the model's own code."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvlm.formats import layout
from nvlm.inputs.tokenizer import IM_END, Tokenizer, tokenizer_files
from nvlm.model.config import NVLMConfig
from nvlm.program.json_files import read_json_object

log = logging.getLogger(__name__)

_BESIDE = ("special_tokens_map.json", "added_tokens.json", "chat_template.*", "LICENSE*")
"""Patterns of what readers take from a published folder, for whichever model."""
_OF_THE_WHOLE = ("*.py", "generation_config.json", "preprocessor_config.json")
"""For NVLM-D alone: the remote code that `auto_map` names, and what its processor reads."""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The small files of an export: configuration, tokenizer and remote code."""

    model: NVLMConfig  # shape of the whole
    dtype: str  # torch's name of what is not quantised
    tokenizer_dir: Path  # folder of the tokenizer's files
    # The folder in Hugging Face's layout that the weights come from; None: they come from another.
    published: Path | None
    has_vision: bool  # whether vision and projector are in it

    def copied(self) -> list[Path]:
        """Files that the export holds as they are."""
        files = tokenizer_files(self.tokenizer_dir)
        if self.published is not None:
            for pattern in _BESIDE + (_OF_THE_WHOLE if self.has_vision else ()):
                files += sorted(self.published.glob(pattern))
        return files

    def config(self) -> dict[str, Any]:
        """config.json without `quantization_config`: the published one where there is one."""
        if not self.has_vision:
            return self._text_config()
        if self.published is None:
            values = self._made_config()
        else:
            values = read_json_object(self.published / layout.CONFIG)
        code = [] if self.published is None else list(self.published.glob("*.py"))
        if not code:
            values.pop("auto_map", None)
            log.warning(
                "the input has no remote code (*.py), so the export has none and no auto_map; for "
                "a reader that asks for it copy nvidia/NVLM-D-72B's configuration_nvlm_d.py and "
                "its auto_map"
            )
        values["torch_dtype"] = self.dtype
        values["llm_config"] = {**values["llm_config"], **self._plain_rope()}
        if "rope_parameters" in values["llm_config"]:
            values["llm_config"]["rope_parameters"] = {
                "rope_type": "default",
                "rope_theta": self.model.decoder.rope_theta,
            }
        for section in ("llm_config", "vision_config"):
            values[section] = {**values[section], "torch_dtype": self.dtype}
        return values

    def _plain_rope(self) -> dict[str, Any]:
        """Newer readers honour the published scaling, which NVLM-D was not trained with; decision
        2 (docs/decisions/model.md)."""
        return {"rope_theta": self.model.decoder.rope_theta, "rope_scaling": None}

    def _decoder(self) -> dict[str, Any]:
        decoder = self.model.decoder
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_size": decoder.hidden_size,
            "intermediate_size": decoder.intermediate_size,
            "num_hidden_layers": decoder.num_hidden_layers,
            "num_attention_heads": decoder.num_attention_heads,
            "num_key_value_heads": decoder.num_key_value_heads,
            "vocab_size": decoder.vocab_size,
            "max_position_embeddings": decoder.max_position_embeddings,
            **self._plain_rope(),
            "rms_norm_eps": decoder.rms_norm_eps,
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
            "torch_dtype": self.dtype,
        }

    def _text_config(self) -> dict[str, Any]:
        eos_token_id = Tokenizer(self.tokenizer_dir).special_id(IM_END)
        return {**self._decoder(), "eos_token_id": eos_token_id}

    def _made_config(self) -> dict[str, Any]:
        """As nvidia/NVLM-D-72B publishes it, of the sizes that the weights have."""
        vision, tiling = self.model.vision, self.model.tiling
        return {
            "architectures": ["NVLM_D"],
            "model_type": "NVLM_D",
            "downsample_ratio": 0.5,
            "dynamic_image_size": True,
            "force_image_size": tiling.image_size,
            "max_dynamic_patch": tiling.max_num_tiles,
            "min_dynamic_patch": 1,
            "ps_version": "v2",
            "select_layer": -1,
            "template": "chatml",
            "use_thumbnail": True,
            "use_backbone_lora": 0,
            "use_llm_lora": 0,
            "llm_config": self._decoder(),
            "vision_config": {
                "architectures": ["InternVisionModel"],
                "model_type": "intern_vit_6b",
                "hidden_size": vision.hidden_size,
                "intermediate_size": vision.intermediate_size,
                "num_hidden_layers": vision.num_hidden_layers,
                "num_attention_heads": vision.num_attention_heads,
                "image_size": vision.image_size,
                "patch_size": vision.patch_size,
                "num_channels": 3,
                "qk_normalization": True,
                "qkv_bias": False,
                "norm_type": "rms_norm",
                "layer_norm_eps": vision.norm_eps,
                "hidden_act": "gelu",
            },
        }
