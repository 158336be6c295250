"""The limits an engine is built for. The runtime refuses what exceeds them, in one sentence."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from nvlm.model.config import DecoderConfig, TilingConfig
from nvlm.program.errors import UserError

DEFAULT_MAX_NEW_TOKENS = 1024  # max_new_tokens in the README of nvidia/NVLM-D-72B
_DEFAULT_TEXT_TOKENS = 1024  # room for the question, beside the images
_TAG_TOKENS_PER_TILE = 8  # <tile_global_thumbnail> is 5 tokens, a boundary may add some
_DEFAULT_MAX_NUM_TOKENS = 8192  # TensorRT-LLM's default


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Counts of requests, tokens and images; the names are trtllm-build's."""

    max_batch_size: int  # requests in a step
    max_input_len: int  # tokens of a prompt, virtual ones included
    max_seq_len: int  # tokens of prompt and answer
    max_num_tokens: int  # tokens that a step computes
    max_num_images: int  # images of a request, videos' frames included
    max_multimodal_len: int  # rows of the prompt tables of a whole batch

    def to_json(self) -> dict[str, int]:
        return asdict(self)


def derive_limits(
    decoder: DecoderConfig,
    tiling: TilingConfig,
    tokens_per_tile: int,
    *,
    max_batch_size: int = 8,
    max_num_images: int = 1,
    max_input_len: int | None = None,
    max_seq_len: int | None = None,
    max_num_tokens: int | None = None,
) -> EngineLimits:
    """Fills in what the user left out and refuses what contradicts itself.

    By default a request may hold `max_num_images` images of the largest grid, 1,024 tokens of text
    and 1,024 new tokens. max_multimodal_len counts prompt-table rows for a whole batch.
    max_num_tokens is clipped to max_batch_size * max_seq_len, which no step exceeds; TensorRT-LLM's
    builder does so too.
    """
    rows_per_request = max_num_images * tiling.max_tiles_per_image * tokens_per_tile
    tag_tokens = max_num_images * (tiling.max_tiles_per_image + 1) * _TAG_TOKENS_PER_TILE
    positions = decoder.max_position_embeddings
    tokens_per_image = (rows_per_request + tag_tokens) // max_num_images
    if tokens_per_image >= positions:
        raise UserError(
            f"one image takes {tokens_per_image} tokens with tags, as max_dynamic_patch "
            f"{tiling.max_num_tiles} in the model's config.json allows "
            f"{tiling.max_tiles_per_image} tiles of {tokens_per_tile} tokens, but the model has "
            f"{positions} positions (max_position_embeddings); correct config.json, NVLM-D's "
            "max_dynamic_patch is 6"
        )
    if rows_per_request + tag_tokens >= positions:
        raise UserError(
            f"--max_num_images {max_num_images} takes {rows_per_request + tag_tokens} tokens with "
            f"tags, the model has {positions} positions; lower it"
        )
    if max_seq_len is not None and max_seq_len <= rows_per_request + tag_tokens:
        raise UserError(
            f"--max_seq_len {max_seq_len} does not hold --max_num_images {max_num_images} "
            f"({rows_per_request + tag_tokens} tokens with tags) and an answer; raise it or lower "
            "the images"
        )
    if max_input_len is None:
        needed = rows_per_request + tag_tokens + _DEFAULT_TEXT_TOKENS
        max_input_len = min(needed, (max_seq_len or positions) - 1)
    max_seq_len = max_seq_len or min(max_input_len + DEFAULT_MAX_NEW_TOKENS, positions)
    max_num_tokens = max_num_tokens or max(_DEFAULT_MAX_NUM_TOKENS, max_input_len)
    if max_seq_len > positions:
        raise UserError(
            f"--max_seq_len {max_seq_len} exceeds the model's {positions} positions "
            "(RoPE is not scaled); lower it"
        )
    if max_input_len >= max_seq_len:
        raise UserError(
            f"--max_input_len {max_input_len} leaves no room for an answer in --max_seq_len "
            f"{max_seq_len}; raise --max_seq_len"
        )
    if max_input_len < rows_per_request + tag_tokens:
        raise UserError(
            f"--max_input_len {max_input_len} does not hold --max_num_images {max_num_images} "
            f"({rows_per_request + tag_tokens} tokens with tags); raise it or lower the images"
        )
    if max_num_tokens < max_input_len:
        raise UserError(
            f"--max_num_tokens {max_num_tokens} is below --max_input_len {max_input_len}; a prompt "
            "must fit one step; raise it"
        )
    return EngineLimits(
        max_batch_size=max_batch_size,
        max_input_len=max_input_len,
        max_seq_len=max_seq_len,
        max_num_tokens=min(max_num_tokens, max_batch_size * max_seq_len),
        max_num_images=max_num_images,
        max_multimodal_len=max_batch_size * rows_per_request,
    )
