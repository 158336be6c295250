"""The one memory plan of every --dry_run and refusal: bytes of a checkpoint or engine."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.formats.checkpoint_tensors import decoder_tensors, vision_linears, vision_tensors
from nvlm.formats.safetensors_reader import TensorInfo, total_bytes
from nvlm.model.config import VisionConfig, exact_div
from nvlm.model.dtypes import TORCH_DTYPES
from nvlm.model.number_formats import UNQUANTIZED, format_named
from nvlm.planning.hopper import num_context_positions, takes_fast_path
from nvlm.planning.limits import EngineLimits
from nvlm.planning.peer_memory import peer_memory_bytes

_MLP_BYTES_PER_VALUE = 22  # 5.5 GB measured for one 72B MLP over 8,192 tokens
_CUDA_CONTEXT_BYTES = 2 << 30  # contexts, cuBLAS and NCCL buffers: an allowance, not measured
_NCCL_BYTES = 1 << 30  # buffers of a rank among several: an allowance, not measured
# CUDA graphs: 0.7 GB measured at a batch of 8, before steps with prompts had
# graphs. What graphs return takes up to 1.0 GB at a batch of 256; what their nodes take is open.
_GRAPH_BYTES = 2 << 30
KV_CACHE_FREE_GPU_MEMORY_FRACTION = 0.9  # TensorRT-LLM's default
_CHECKPOINT_SLACK_BYTES = 64 << 20  # tokenizer, headers, reports


def decoder_weight_bytes(config: CheckpointConfig, rank: int = 0) -> int:
    """Bytes of one rank's weights."""
    return total_bytes(decoder_tensors(config, rank).values())


def decoder_parameter_count(config: CheckpointConfig, rank: int = 0) -> int:
    """Parameters of the decoder on one rank, biases and norms included, scales not."""
    plain = replace(config, quant_algo=None, kv_cache_quant_algo=None)
    return sum(math.prod(info.shape) for info in decoder_tensors(plain, rank).values())


def may_widen(num_parameters: int, device: torch.device, memory_bytes: int) -> bool:
    """Whether weights are widened to float32 once, at load.

    On a CPU where that takes at most a quarter of the memory: vision and decoder are asked apart,
    and the KV cache and everything else need the other half. Otherwise at each use.
    """
    return device.type == "cpu" and 4 * num_parameters <= memory_bytes / 4


def decoder_may_widen(config: CheckpointConfig, device: torch.device, memory_bytes: int) -> bool:
    """`may_widen` for all tensor parallel ranks together: they share a CPU's memory."""
    return may_widen(config.tp_size * decoder_parameter_count(config), device, memory_bytes)


def kv_bytes_per_token(config: CheckpointConfig) -> int:
    """K and V of one position in every layer of a rank."""
    dtype = config.kv_cache_format.stored_dtype(TORCH_DTYPES[config.dtype])
    decoder, mapping = config.decoder, config.mapping()
    row = mapping.local_heads(decoder.num_key_value_heads) * decoder.head_dim * dtype.itemsize
    return 2 * len(mapping.layers(decoder.num_hidden_layers)) * row


def vision_weight_bytes(config: VisionConfig, precision: str) -> int:
    """`precision` is a dtype name or the number format of each layer's linears (the rest
    bfloat16)."""
    number_format = format_named(precision)
    dtype = TORCH_DTYPES[precision] if number_format is UNQUANTIZED else torch.bfloat16
    tensors = vision_tensors(config, dtype)
    for linear in vision_linears(config):
        name = f"{linear}.weight"
        tensors[name] = TensorInfo(number_format.stored_dtype(dtype), tensors[name].shape)
    return total_bytes(tensors.values())


def vision_parameter_count(config: VisionConfig) -> int:
    return vision_weight_bytes(config, "float32") // 4


def checkpoint_bytes(config: CheckpointConfig, vision: VisionConfig) -> int:
    """Disk that a checkpoint directory takes."""
    ranks = sum(decoder_weight_bytes(config, rank) for rank in range(config.world_size))
    return ranks + vision_weight_bytes(vision, config.dtype) + _CHECKPOINT_SLACK_BYTES


def calibration_bytes(
    config: CheckpointConfig, vision: VisionConfig, num_tiles: int, num_tokens: int
) -> int:
    """Disk that calibration takes while it runs: the samples' hidden states before a layer and
    after it."""
    in_vision = 4 * num_tiles * vision.num_positions * vision.hidden_size
    embeddings = 4 * num_tiles * vision.tokens_per_tile * vision.output_size
    in_decoder = TORCH_DTYPES[config.dtype].itemsize * num_tokens * config.decoder.hidden_size
    return 2 * max(in_vision, embeddings, in_decoder)


def mlp_activation_bytes(num_tokens: int, intermediate_size: int) -> int:
    """A step's widest rows: the MLP's halves and their product, in `dtype` and in float32."""
    return _MLP_BYTES_PER_VALUE * num_tokens * intermediate_size


def fast_path_workspace_bytes(config: CheckpointConfig, limits: EngineLimits) -> int:
    """What a rank of decoder `torch` takes beyond weights and cache with the kernels for Hopper:
    the largest step's activations, the CUDA graphs, and what ranks map of one another."""
    decoder = config.decoder
    # Gate and up in two bytes, their product in one; residual, norm, q, k, v and attention.
    row = 5 * exact_div(decoder.intermediate_size, config.tp_size) + 12 * decoder.hidden_size
    activations = _reserved(row * limits.max_num_tokens)
    others = 0
    if config.tp_size > 1:
        others = peer_memory_bytes(config, limits) + _NCCL_BYTES
    contexts = _context_bytes(config, limits)
    return activations + _logits_bytes(config, limits) + contexts + _GRAPH_BYTES + others


def _context_bytes(config: CheckpointConfig, limits: EngineLimits) -> int:
    """Keys and values of a layer that attention of prompts gathers, in two bytes each."""
    decoder = config.decoder
    kv_heads = config.mapping().local_heads(decoder.num_key_value_heads)
    channels = 1 << (decoder.head_dim - 1).bit_length()
    return 2 * 2 * kv_heads * num_context_positions(limits.max_seq_len) * channels


def workspace_bytes(config: CheckpointConfig, limits: EngineLimits) -> int:
    """Activations of a rank's largest step in plain torch."""
    intermediate = exact_div(config.decoder.intermediate_size, config.tp_size)
    activations = mlp_activation_bytes(limits.max_num_tokens, intermediate)
    return activations + _logits_bytes(config, limits)


def _reserved(num_bytes: int) -> int:
    """What torch reserves for tensors of so many bytes at the peak: 1.31 times that measured."""
    return 4 * num_bytes // 3


def _logits_bytes(config: CheckpointConfig, limits: EngineLimits) -> int:
    return 4 * limits.max_batch_size * config.decoder.vocab_size


def decoder_workspace_bytes(
    config: CheckpointConfig, limits: EngineLimits, device: torch.device, memory_bytes: int
) -> int:
    """What decoder `torch` takes of a rank's device beyond weights and cache."""
    if takes_fast_path(config, device):
        return fast_path_workspace_bytes(config, limits)
    if decoder_may_widen(config, device, memory_bytes):
        return workspace_bytes(config, limits)
    # What a linear widened at each use adds; the head is the largest one.
    padded = config.mapping().padded_vocab_size(config.decoder.vocab_size)
    widened = 4 * exact_div(padded, config.tp_size) * config.decoder.hidden_size
    return workspace_bytes(config, limits) + widened


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """Bytes on one rank.

    The KV cache of decoder `torch` holds every place at its longest; that of TensorRT-LLM takes
    what is left.
    """

    decoder_weight_bytes: int  # the rank's shard
    vision_weight_bytes: int  # ViT and projector, whole
    kv_bytes_per_token: int  # keys and values of one position
    kv_cache_bytes: int  # the whole cache
    prompt_table_bytes: int  # embeddings of a whole batch
    workspace_bytes: int  # estimate of the largest step's activations
    limits: EngineLimits  # what the rest was computed from

    @property
    def total_bytes(self) -> int:
        return (
            self.decoder_weight_bytes
            + self.vision_weight_bytes
            + self.kv_cache_bytes
            + self.prompt_table_bytes
            + self.workspace_bytes
        )

    @property
    def kv_cache_tokens(self) -> int:
        return self.kv_cache_bytes // self.kv_bytes_per_token

    def fits(self, memory_bytes: int) -> bool:
        """Whether it does, with a cache that holds at least one request of the longest kind."""
        return self.total_bytes <= memory_bytes and self.kv_cache_tokens >= self.limits.max_seq_len

    def to_json(self) -> dict[str, Any]:
        names = [name for name in self.__slots__ if name != "limits"]
        values = {name: getattr(self, name) for name in names}
        return {**values, "total_bytes": self.total_bytes, "limits": self.limits.to_json()}

    def lines(self) -> list[str]:
        """The plan as lines for people, the largest parts first."""
        rows = [
            ("decoder weights", self.decoder_weight_bytes),
            ("vision weights", self.vision_weight_bytes),
            (f"KV cache ({self.kv_bytes_per_token:,} B per token)", self.kv_cache_bytes),
            ("prompt table", self.prompt_table_bytes),
            ("workspace", self.workspace_bytes),
            ("total", self.total_bytes),
        ]
        limits = ", ".join(f"{name} {value}" for name, value in self.limits.to_json().items())
        return [
            *(f"{name:<36}{value / 1e9:>10.3f} GB" for name, value in rows),
            f"limits: {limits}",
        ]


def vision_workspace_bytes(config: VisionConfig, num_tiles: int) -> int:
    """Activations of one pass in two-byte types: a layer's widest rows and its residual stream."""
    values = 2 * config.intermediate_size + 4 * config.hidden_size
    return 2 * num_tiles * config.num_positions * values


def plan_tensorrt_llm(
    config: CheckpointConfig,
    vision: VisionConfig,
    vision_precision: str,
    limits: EngineLimits,
    max_num_tiles: int,
    memory_bytes: int,
    kv_cache_free_gpu_memory_fraction: float = KV_CACHE_FREE_GPU_MEMORY_FRACTION,
) -> EnginePlan:
    """What TensorRT-LLM takes of a GPU with `memory_bytes`, on rank 0, where vision runs too.

    Its runtime allocates the whole prompt table on every rank, and gives the KV cache a fraction of
    what is free after loading. `max_num_tiles`: the largest vision pass.
    """
    decoder, itemsize = config.decoder, TORCH_DTYPES[config.dtype].itemsize
    intermediate = exact_div(decoder.intermediate_size, config.tp_size)
    # Gate and up halves and a dozen hidden-sized rows (residual, norm, q, k, v, attention and its
    # workspace) of every token in a step, then float32 logits, twice.
    rows = itemsize * (3 * intermediate + 12 * decoder.hidden_size)
    logits = 2 * 4 * limits.max_batch_size * decoder.vocab_size
    fixed = EnginePlan(
        decoder_weight_bytes=decoder_weight_bytes(config),
        vision_weight_bytes=vision_weight_bytes(vision, vision_precision),
        kv_bytes_per_token=kv_bytes_per_token(config),
        kv_cache_bytes=0,
        prompt_table_bytes=limits.max_multimodal_len * decoder.hidden_size * itemsize,
        workspace_bytes=rows * limits.max_num_tokens
        + logits
        + vision_workspace_bytes(vision, max_num_tiles)
        + _CUDA_CONTEXT_BYTES,
        limits=limits,
    )
    free = max(0, memory_bytes - fixed.total_bytes)
    return replace(fixed, kv_cache_bytes=int(free * kv_cache_free_gpu_memory_fraction))


def plan_engine(
    config: CheckpointConfig,
    vision: VisionConfig,
    vision_precision: str,
    limits: EngineLimits,
    device: torch.device,
    memory_bytes: int,
) -> EnginePlan:
    """What the torch executor takes on `device` when it runs at the engine's limits.

    On any rank: each holds vision and the embedding whole.
    """
    decoder, itemsize = config.decoder, TORCH_DTYPES[config.dtype].itemsize
    decoder_weights = decoder_weight_bytes(config)
    vision_weights = vision_weight_bytes(vision, vision_precision)
    workspace = decoder_workspace_bytes(config, limits, device, memory_bytes)
    if decoder_may_widen(config, device, memory_bytes):
        decoder_weights += 4 * decoder_parameter_count(config)  # beside the mapped file
    if may_widen(vision_parameter_count(vision), device, memory_bytes):
        vision_weights = 4 * vision_parameter_count(vision)
    if device.type == "cuda":
        images = limits.max_batch_size * limits.max_num_images
        num_tiles = limits.max_multimodal_len // (images * vision.tokens_per_tile)
        workspace += _reserved(vision_workspace_bytes(vision, num_tiles)) + _CUDA_CONTEXT_BYTES
    per_token = kv_bytes_per_token(config)
    num_tokens = limits.max_batch_size * limits.max_seq_len  # every place at its longest
    dtype, number_format = TORCH_DTYPES[config.dtype], config.kv_cache_format
    held, stored = number_format.cache_dtype(dtype, device), number_format.stored_dtype(dtype)
    return EnginePlan(
        decoder_weight_bytes=decoder_weights,
        vision_weight_bytes=vision_weights,
        kv_bytes_per_token=per_token,
        kv_cache_bytes=exact_div(held.itemsize, stored.itemsize) * per_token * num_tokens,
        prompt_table_bytes=limits.max_multimodal_len * decoder.hidden_size * itemsize,
        workspace_bytes=workspace,
        limits=limits,
    )
