"""What a model directory's config.json says, as frozen dataclasses.

`NVLMConfig.from_hf` is the only place that knows Hugging Face spellings. Keys that alter the
computation must have the value this project implements; others are ignored.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nvlm.program.errors import UserError, shown
from nvlm.program.json_files import StrictReader

NUM_DUMMY_HEADS = 7
"""Heads that modeling_intern_vit.py appends as zeros so that 25 + 7 = 32 divides by 8 ranks."""

PROJECTOR_NORM_EPS = 1e-5
"""torch's LayerNorm default, which the Hugging Face model uses in `mlp1.0`."""


MOST_SIZE, MOST_TILES = 1 << 20, 1024
"""Bounds of a size and of a number of tiles in files that say them: far beyond any model's."""


def exact_div(dividend: int, divisor: int) -> int:
    """`dividend / divisor` where a remainder would be a bug (heads per rank, patches per side)."""
    quotient, remainder = divmod(dividend, divisor)
    assert remainder == 0, f"{dividend} is not a multiple of {divisor}"
    return quotient


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """InternViT and the projector after it."""

    hidden_size: int  # width of the ViT
    intermediate_size: int  # width of its MLP
    num_hidden_layers: int  # of the ViT
    num_attention_heads: int  # real heads
    num_dummy_heads: int  # zero heads, stored after the real ones
    image_size: int  # side of a tile, in pixels
    patch_size: int  # side of a patch, in pixels
    norm_eps: float  # of the ViT's RMS norms
    projector_hidden_size: int  # width of the projector's MLP
    output_size: int  # width of an embedding: the decoder's hidden_size
    projector_norm_eps: float = PROJECTOR_NORM_EPS  # of the projector's layer norm

    @property
    def head_dim(self) -> int:
        return exact_div(self.hidden_size, self.num_attention_heads)

    @property
    def num_stored_heads(self) -> int:
        return self.num_attention_heads + self.num_dummy_heads

    @property
    def attention_size(self) -> int:
        """Channels of q, of k and of v: all stored heads."""
        return self.num_stored_heads * self.head_dim

    @property
    def patches_per_side(self) -> int:
        return exact_div(self.image_size, self.patch_size)

    @property
    def num_positions(self) -> int:
        """Patches and the class token."""
        return self.patches_per_side**2 + 1

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens after the pixel shuffle, which merges 2 x 2 patches."""
        return exact_div(self.patches_per_side, 2) ** 2

    @property
    def projector_input_size(self) -> int:
        return 4 * self.hidden_size


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """The Qwen2 language model. RoPE is never scaled: decision 2 (docs/decisions/model.md)."""

    hidden_size: int  # width of the residual stream
    intermediate_size: int  # width of the MLP
    num_hidden_layers: int  # layers of the whole model
    num_attention_heads: int  # heads of Q
    num_key_value_heads: int  # heads of K and V, each shared by several of Q
    vocab_size: int  # rows of embedding and head; larger ids are virtual tokens
    max_position_embeddings: int  # longest context, in tokens
    rope_theta: float  # base of the rotary frequencies
    rms_norm_eps: float  # of all its norms

    @property
    def head_dim(self) -> int:
        return exact_div(self.hidden_size, self.num_attention_heads)


@dataclass(frozen=True, slots=True)
class TilingConfig:
    """How an image becomes tiles: a grid, then the thumbnail."""

    image_size: int  # side of a tile, in pixels
    max_num_tiles: int  # most tiles of the grid, without the thumbnail

    @property
    def max_tiles_per_image(self) -> int:
        """Tiles of the largest grid plus the thumbnail; a single tile has no thumbnail."""
        return self.max_num_tiles + 1 if self.max_num_tiles > 1 else 1


@dataclass(frozen=True, slots=True)
class NVLMConfig:
    vision: VisionConfig  # InternViT and projector
    decoder: DecoderConfig  # Qwen2
    tiling: TilingConfig  # how images become tiles

    def with_projector_norm_eps(self, value: float) -> NVLMConfig:
        return replace(self, vision=replace(self.vision, projector_norm_eps=value))

    @classmethod
    def from_hf(cls, values: dict[str, Any], path: Path) -> NVLMConfig:
        """Reads the object of nvidia/NVLM-D-72B's config.json; `path` is for the messages."""
        top = StrictReader(values, path)
        if values.get("model_type") != "NVLM_D":
            raise UserError(
                f"{path}: model_type is {shown(values.get('model_type'))}, expected 'NVLM_D': "
                "this is not an NVLM-D checkpoint"
            )
        # The published file's name, and the class that transformers saves.
        top.one_of("architectures", (["NVLM_D"], ["NVLM_D_Model"]))
        for part in (top, top.section("llm_config"), top.section("vision_config")):
            for key in ("quantization_config", "compression_config"):
                if part.values.get(key):
                    raise part.unsupported(key, "none: give the unquantised checkpoint")
        top.one_of("min_dynamic_patch", (1,))
        top.one_of("use_backbone_lora", (0,), 0)
        top.one_of("use_llm_lora", (0,), 0)
        top.one_of("ps_version", ("v2",))
        top.one_of("select_layer", (-1,))
        top.one_of("downsample_ratio", (0.5,))
        top.one_of("use_thumbnail", (True,))
        decoder = _decoder_from_hf(top.section("llm_config"))
        vision = _vision_from_hf(top.section("vision_config"), decoder)
        image_size = top.positive_int("force_image_size")
        if image_size != vision.image_size:
            raise UserError(
                f"{path}: force_image_size is {image_size} but vision_config.image_size is "
                f"{vision.image_size}; they must be equal"
            )
        tiling = TilingConfig(image_size, top.positive_int("max_dynamic_patch"))
        return cls(vision, decoder, tiling)


def _decoder_from_hf(llm: StrictReader) -> DecoderConfig:
    # llm_config.model_type is a stale "llama" in the published file; the architecture decides,
    # which a configuration that transformers made by itself leaves out.
    if llm.values.get("architectures") is None:
        llm.one_of("model_type", ("qwen2",))
    else:
        llm.one_of("architectures", (["Qwen2ForCausalLM"],))
    llm.one_of("hidden_act", ("silu",))
    llm.one_of("tie_word_embeddings", (False,), False)
    llm.one_of("use_sliding_window", (False,), False)
    kinds = llm.values.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise llm.unsupported("layer_types", "'full_attention' for every layer")
    config = DecoderConfig(
        hidden_size=llm.positive_int("hidden_size"),
        intermediate_size=llm.positive_int("intermediate_size"),
        num_hidden_layers=llm.positive_int("num_hidden_layers"),
        num_attention_heads=llm.positive_int("num_attention_heads"),
        num_key_value_heads=llm.positive_int("num_key_value_heads"),
        vocab_size=llm.positive_int("vocab_size"),
        max_position_embeddings=llm.positive_int("max_position_embeddings"),
        rope_theta=_rope_theta_from_hf(llm),
        rms_norm_eps=llm.positive_float("rms_norm_eps"),
    )
    # RoPE rotates pairs of channels, so a head has an even number of them.
    llm.require_multiple("hidden_size", 2, "num_attention_heads")
    llm.require_multiple("num_attention_heads", 1, "num_key_value_heads")
    return config


_PUBLISHED_SCALING = {"type": "dynamic", "factor": 3.0}
"""It is dropped: decision 2 (docs/decisions/model.md). Another would mean another model."""


def _rope_theta_from_hf(llm: StrictReader) -> float:
    """RoPE's base. transformers 5 saves base and scaling together, as `rope_parameters`; later
    releases of 4 spell the scaling's `type` as `rope_type`, or both ways."""
    for key in ("rope_scaling", "rope_parameters"):
        if llm.values.get(key) is None:
            continue
        scaling = dict(llm.section(key).values)
        if key == "rope_parameters":
            scaling.pop("rope_theta", None)
        kind = scaling.pop("rope_type", scaling.get("type", "default"))
        if scaling.setdefault("type", kind) != kind or scaling not in (
            {"type": "default"},
            _PUBLISHED_SCALING,
        ):
            raise llm.unsupported(key, f"no scaling, or the published {_PUBLISHED_SCALING}")
    together = llm.values.get("rope_parameters") or {}
    if "rope_theta" not in together:
        return llm.positive_float("rope_theta")
    theta = llm.section("rope_parameters").positive_float("rope_theta")
    if llm.values.get("rope_theta", theta) != theta:
        raise llm.unsupported("rope_theta", f"{theta}, as in rope_parameters")
    return theta


def _vision_from_hf(vision: StrictReader, decoder: DecoderConfig) -> VisionConfig:
    vision.one_of("qk_normalization", (True,))
    vision.one_of("qkv_bias", (False,))
    vision.one_of("norm_type", ("rms_norm",))
    vision.one_of("hidden_act", ("gelu",))
    vision.one_of("num_channels", (3,), 3)
    config = VisionConfig(
        hidden_size=vision.positive_int("hidden_size"),
        intermediate_size=vision.positive_int("intermediate_size"),
        num_hidden_layers=vision.positive_int("num_hidden_layers"),
        num_attention_heads=vision.positive_int("num_attention_heads"),
        num_dummy_heads=NUM_DUMMY_HEADS,
        image_size=vision.positive_int("image_size"),
        patch_size=vision.positive_int("patch_size"),
        norm_eps=vision.positive_float("layer_norm_eps"),
        # modeling_nvlm_d.py: the projector is as wide as the language model's MLP.
        projector_hidden_size=decoder.intermediate_size,
        output_size=decoder.hidden_size,
    )
    vision.require_multiple("hidden_size", 1, "num_attention_heads")
    # The pixel shuffle merges 2 x 2 patches, so a tile has an even number of them per side.
    vision.require_multiple("image_size", 2, "patch_size")
    return config
