"""config.json of a TensorRT-LLM 1.2.1 checkpoint directory for Qwen2.

Keys are those of TensorRT-LLM's PretrainedConfig and QWenConfig (tensorrt_llm/models/
modeling_utils.py, models/qwen/config.py). Its loader warns about keys it does not know and needs
`qwen_type` and `seq_length`, so exactly this list is written and read.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from nvlm.formats.kv_cache import AS_STORED, EngineKVCache
from nvlm.formats.mapping import Mapping, check_divides
from nvlm.formats.tensor_names import ENGINE_LAYER
from nvlm.model.config import DecoderConfig
from nvlm.model.number_formats import QUANTIZED, UNQUANTIZED, NumberFormat, format_named
from nvlm.program.errors import UserError
from nvlm.program.json_files import StrictReader, read_json_object

_FIXED: dict[str, Any] = {
    "architecture": "Qwen2ForCausalLM",
    "qwen_type": "qwen2",
    "hidden_act": "silu",
    "position_embedding_type": "rope_gpt_neox",
    "logits_dtype": "float32",
    "rotary_scaling": None,
    "attn_bias": True,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "use_parallel_embedding": False,
    "embedding_sharding_dim": 0,
    "qk_layernorm": False,
    "use_logn_attn": False,
    "disable_weight_only_quant_plugin": False,
    "moe_intermediate_size": 0,
    "moe_shared_expert_intermediate_size": 0,
    "num_labels": 1,
    "seq_length": 8192,  # QWenConfig's own default, which the model code reads but never uses
}
_EXCLUDED_BUT_HEAD = (
    "*router",
    "*vocab_embedding",
    "*position_embedding",
    "*block_embedding",
    "*shared_expert_gate",
)
"""TensorRT-LLM's own `exclude_modules` without `*lm_head`. A list takes the place of its own, and
some versions read an empty one as none: so the head becomes an FP8Linear in all of them."""


@dataclass(frozen=True, slots=True)
class CheckpointConfig:
    """The decoder as converted: its shape, number types and ranks."""

    decoder: DecoderConfig  # shape of the whole model
    dtype: str  # torch's name of what is not quantised, such as bfloat16
    quant_algo: str | None  # "FP8"; None: linears stay in `dtype`
    kv_cache_quant_algo: str | None  # "FP8"; None: the cache is in `dtype`
    tp_size: int = 1  # tensor parallel ranks
    pp_size: int = 1  # pipeline parallel ranks
    # Patterns (fnmatch) of linears that stay in `dtype`, by their names in the model, such as
    # `transformer.layers.3.mlp.proj`.
    exclude_modules: tuple[str, ...] = ()
    kv_cache: EngineKVCache = AS_STORED  # an engine's own choice, which config.json does not hold
    quantize_lm_head: bool = False  # the head is stored as the linears of the layers are

    def mapping(self, rank: int = 0) -> Mapping:
        return Mapping(self.tp_size, self.pp_size, rank)

    @property
    def weight_format(self) -> NumberFormat:
        """What the linears of the layers are stored in."""
        return format_named(self.quant_algo)

    def linear_format(self, layer: int, linear: str) -> NumberFormat:
        """What a layer's linear, by its name in `DECODER_LINEARS`, is stored in."""
        name = ENGINE_LAYER.format(i=layer) + linear
        is_excluded = any(fnmatchcase(name, pattern) for pattern in self.exclude_modules)
        return UNQUANTIZED if is_excluded else self.weight_format

    @property
    def head_format(self) -> NumberFormat:
        """What the head is stored in."""
        return self.weight_format if self.quantize_lm_head else UNQUANTIZED

    @property
    def stored_kv_format(self) -> NumberFormat:
        """What the weights' files have scales for."""
        return format_named(self.kv_cache_quant_algo)

    @property
    def kv_cache_format(self) -> NumberFormat:
        """What keys and values are held in."""
        return UNQUANTIZED if self.kv_cache.in_dtype else self.stored_kv_format

    @property
    def kv_cache_name(self) -> str:
        """The KV cache's name in records: "FP8", "FP8, K and V by own scales" or the dtype."""
        if self.kv_cache_format is UNQUANTIZED:
            return self.dtype
        own = ", K and V by own scales" if self.kv_cache.scales else ""
        return self.kv_cache_format.name + own

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size

    def to_json(self) -> dict[str, Any]:
        decoder = self.decoder
        patterns = self.exclude_modules + (_EXCLUDED_BUT_HEAD if self.quantize_lm_head else ())
        # Left out where there are none, as older versions wrote it.
        excluded = {"exclude_modules": list(patterns)} if patterns else {}
        return {
            **_FIXED,
            "dtype": self.dtype,
            "hidden_size": decoder.hidden_size,
            "intermediate_size": decoder.intermediate_size,
            "num_hidden_layers": decoder.num_hidden_layers,
            "num_attention_heads": decoder.num_attention_heads,
            "num_key_value_heads": decoder.num_key_value_heads,
            "head_size": decoder.head_dim,
            "vocab_size": decoder.vocab_size,
            "max_position_embeddings": decoder.max_position_embeddings,
            "rotary_base": decoder.rope_theta,
            "norm_epsilon": decoder.rms_norm_eps,
            "mapping": {
                "world_size": self.world_size,
                "tp_size": self.tp_size,
                "pp_size": self.pp_size,
                "cp_size": 1,
            },
            "quantization": {
                "quant_algo": self.quant_algo,
                "kv_cache_quant_algo": self.kv_cache_quant_algo,
                **excluded,
            },
        }

    @classmethod
    def from_json(cls, values: dict[str, Any], path: Path) -> CheckpointConfig:
        reader = StrictReader(values, path)
        for key, value in _FIXED.items():
            reader.one_of(key, (value,))
        reader.require_multiple("hidden_size", 1, "num_attention_heads")
        decoder = DecoderConfig(
            hidden_size=reader.positive_int("hidden_size"),
            intermediate_size=reader.positive_int("intermediate_size"),
            num_hidden_layers=reader.positive_int("num_hidden_layers"),
            num_attention_heads=reader.positive_int("num_attention_heads"),
            num_key_value_heads=reader.positive_int("num_key_value_heads"),
            vocab_size=reader.positive_int("vocab_size"),
            max_position_embeddings=reader.positive_int("max_position_embeddings"),
            rope_theta=reader.positive_float("rotary_base"),
            rms_norm_eps=reader.positive_float("norm_epsilon"),
        )
        mapping, quantization = reader.section("mapping"), reader.section("quantization")
        patterns = _patterns(quantization)
        excluded = patterns[: -len(_EXCLUDED_BUT_HEAD)]
        quantize_lm_head = patterns == excluded + _EXCLUDED_BUT_HEAD
        config = cls(
            decoder,
            dtype=reader.one_of("dtype", ("bfloat16", "float16", "float32")),
            quant_algo=quantization.one_of("quant_algo", (*QUANTIZED, None)),
            kv_cache_quant_algo=quantization.one_of("kv_cache_quant_algo", (*QUANTIZED, None)),
            tp_size=mapping.positive_int("tp_size"),
            pp_size=mapping.positive_int("pp_size"),
            exclude_modules=excluded if quantize_lm_head else patterns,
            quantize_lm_head=quantize_lm_head,
        )
        reader.refuse_unlike(config.to_json())
        try:
            check_divides(decoder, config.tp_size, config.pp_size)
        except UserError as error:
            raise UserError(f"{path}: mapping: {error}") from None
        return config

    @classmethod
    def read(cls, path: Path) -> CheckpointConfig:
        return cls.from_json(read_json_object(path), path)


def _patterns(quantization: StrictReader) -> tuple[str, ...]:
    found = quantization.values.get("exclude_modules") or []
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise quantization.unsupported("exclude_modules", "a list of names of linears")
    return tuple(found)
