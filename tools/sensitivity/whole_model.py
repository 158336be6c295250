"""The decoder in memory, layer by layer as published, any of its parts in FP8 for one run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from build.conversion.report.quantization_report import QuantizationReport
from nvlm.formats import layout
from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.formats.checkpoint_tensors import decoder_tensors, open_checked
from nvlm.formats.tensor_names import ENGINE_LAYER, ENGINE_LAYER_TENSORS
from nvlm.model.decoder import (
    DecoderLayer,
    causal_attention,
    embed,
    rms_norm,
    rope_tables,
)
from nvlm.model.linear import QuantizableLinear
from nvlm.model.number_formats import FP8, LinearScales
from tools.sensitivity.parts import KV_CACHE, Part


@dataclass(slots=True)
class SequenceAttention:
    """`Attention` of one sequence that grows; layers with a scale store K and V in FP8."""

    scales: Mapping[int, float]
    past: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def forward(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        if (scale := self.scales.get(layer)) is not None:
            k, v = (FP8.dequantize(FP8.quantize(x, scale), scale) for x in (k, v))
        if layer in self.past:
            keys, values = self.past[layer]
            k, v = torch.cat((keys, k)), torch.cat((values, v))
        self.past[layer] = k, v
        return causal_attention(q, k, v, len(k) - len(q)).to(q.dtype)


class WholeModel:
    """Reads an unquantised checkpoint of one rank. report: the scales of its FP8 conversion."""

    def __init__(
        self,
        checkpoint_dir: Path,
        config: CheckpointConfig,
        report: QuantizationReport,
        device: torch.device,
    ) -> None:
        self.config = config.decoder
        stored = open_checked(checkpoint_dir / layout.rank_file(0), decoder_tensors(config))
        self.embedding = stored.read("transformer.vocab_embedding.weight").to(device)
        self._norm = stored.read("transformer.ln_f.weight").to(device)
        self._head = stored.read("lm_head.weight").to(device)
        self._device = device
        self.layers: list[DecoderLayer] = []
        self._scales: list[dict[str, LinearScales]] = []
        self._cache_scales: list[float] = []
        for i in range(self.config.num_hidden_layers):
            prefix = ENGINE_LAYER.format(i=i)
            names = [tensor.name for tensor in ENGINE_LAYER_TENSORS]
            tensors = {name: stored.read(prefix + name).to(device) for name in names}
            self.layers.append(DecoderLayer(self.config, tensors))
            linears, attention = report.rows_of(prefix)
            self._scales.append({row.linear.removeprefix(prefix): row.scales for row in linears})
            self._cache_scales.append(attention.kv_cache_scaling_factor)

    def embed(self, token_ids: list[int], table: torch.Tensor | None) -> torch.Tensor:
        """[num_tokens, hidden_size]; table: rows of virtual tokens."""
        ids = torch.tensor(token_ids, device=self._device)
        return embed(ids, self.embedding, table, self.embedding.dtype)

    @contextmanager
    def quantised(self, part: Part) -> Iterator[dict[int, float]]:
        """The part's linears are in FP8; gives the scales of its layers' caches."""
        caches = {i: self._cache_scales[i] for i, name in part.pieces if name == KV_CACHE}
        with ExitStack() as stack:
            for i, name in part.pieces:
                if name != KV_CACHE:
                    stack.enter_context(self._quantised_linear(i, name))
            yield caches

    @contextmanager
    def _quantised_linear(self, i: int, name: str) -> Iterator[None]:
        linears, key = self.layers[i].linears, name.replace(".", "_")
        plain = self.layers[i].linear(name)
        linears[key] = QuantizableLinear.quantised(plain, FP8, self._scales[i][name])
        try:
            yield
        finally:
            linears[key] = plain

    def run(
        self,
        hidden: torch.Tensor,
        attention: SequenceAttention,
        first_position: int = 0,
        first_layer: int = 0,
        inputs: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Hidden states after the layers from `first_layer` on. inputs: gets each layer's."""
        ends = first_position + len(hidden)
        positions = torch.arange(first_position, ends, device=self._device)
        cos, sin = rope_tables(positions, self.config.head_dim, self.config.rope_theta)
        for i in range(first_layer, len(self.layers)):
            if inputs is not None:
                inputs.append(hidden)
            hidden = self.layers[i](hidden, cos, sin, attention, i)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, vocab_size] float32."""
        normed = rms_norm(hidden, self._norm, self.config.rms_norm_eps)
        rows = normed.to(torch.float32) @ self._head.to(torch.float32).T
        return rows[:, : self.config.vocab_size]

    def greedy(self, prompt: torch.Tensor, stop_id: int, most: int) -> list[int]:
        """Tokens until the stop token, which is one of them; prompt: embedded."""
        attention = SequenceAttention({})
        hidden = self.run(prompt, attention)
        tokens: list[int] = []
        while True:
            tokens.append(int(self.logits(hidden[-1:]).argmax()))
            if tokens[-1] == stop_id or len(tokens) == most:
                return tokens
            position = len(prompt) + len(tokens) - 1
            hidden = self.run(self.embed(tokens[-1:], None), attention, position)
