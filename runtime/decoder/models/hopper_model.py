"""The decoder's fast path: FP8 tensor-core linears and fused kernels over the paged KV cache.

A step in which every sequence decodes replays one CUDA graph, padded up to the next batch size
that has one; a step with prompts runs launch by launch, its decoding rows among it. Both may be
asked for before the host knows the tokens of the rows that decode.
Design: decisions 48 to 60 (docs/decisions/decoder.md).
"""

from __future__ import annotations

import torch

from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.model.decoder import embed, rope_tables
from nvlm.model.dtypes import TORCH_DTYPES
from nvlm.planning.hopper import MAX_GRAPH_ROWS
from runtime.decoder.block_allocator import num_blocks_for
from runtime.decoder.kernels.plain_forms import PlainForms
from runtime.decoder.models.all_reduce_norm import AllReduceNorm, OneRank
from runtime.decoder.models.decode_inputs import DecodeInputs
from runtime.decoder.models.hopper_attention import (
    AttentionContext,
    DecodeAttention,
    HopperAttention,
    MixedAttention,
    PromptAttention,
)
from runtime.decoder.models.hopper_weights import HopperWeights
from runtime.decoder.models.host_copy import to_device
from runtime.decoder.models.kv_cache import PagedKVCache
from runtime.decoder.models.step import SequenceStep, logit_rows

_BATCH_SIZES = (1, 2, 4, *range(8, 64, 8), *range(64, MAX_GRAPH_ROWS + 1, 32))
_ROWS_WITHOUT_CONTEXT = 2  # whose attention reads so little that the memory has time
_SHORT_PROMPTS = (2, 16)  # Triton compiles anew for a number of rows that 16 divides


class HopperModel:
    """`DecoderModel` of an FP8 checkpoint, its KV cache in FP8 or in its dtype.

    forms: the kernels, or their plain torch twins on any device. all_reduce_norm: what follows the
    row-parallel linears, where the weights are a rank's shards.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        max_batch_size: int,
        max_seq_len: int,
        weights: HopperWeights,
        num_blocks: int,
        device: torch.device,
        forms: PlainForms,
        *,
        all_reduce_norm: AllReduceNorm | None = None,
    ) -> None:
        decoder = config.decoder
        self.embedding = weights.embedding
        self._weights, self._forms, self._device = weights, forms, device
        self._dtype = TORCH_DTYPES[config.dtype]
        self._sums = all_reduce_norm or OneRank(forms, self._dtype)
        scales = [layer.kv_scales for layer in weights.layers if layer.kv_scales is not None]
        # The last block is the padding rows', which nobody reads.
        self._cache = PagedKVCache(config, num_blocks + 1, scales or None, device)
        self._batch_sizes = batch_sizes(max_batch_size)
        most_rows = max(self._batch_sizes[-1], max_batch_size)
        self._inputs = DecodeInputs(most_rows, max_seq_len, num_blocks, device)
        # Made on the CPU, whose powers and cosines are the oracle's.
        cos, sin = rope_tables(torch.arange(max_seq_len), decoder.head_dim, decoder.rope_theta)
        pages = [self._cache.pages(index) for index in range(len(weights.layers))]
        self._attention = AttentionContext(
            forms, weights.layers, pages, cos.to(device), sin.to(device)
        )
        self._padding_block = num_blocks
        self._max_batch_size, self._max_seq_len = max_batch_size, max_seq_len
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}

    @property
    def max_rows_ahead(self) -> int:
        return self._batch_sizes[-1]

    def forward(self, steps: list[SequenceStep]) -> torch.Tensor:
        return self._run(steps, None)

    def forward_ahead(self, steps: list[SequenceStep], token_ids: torch.Tensor) -> torch.Tensor:
        return self._run(steps, token_ids)

    def _run(self, steps: list[SequenceStep], drawn_ids: torch.Tensor | None) -> torch.Tensor:
        """drawn_ids: [n] int64, the tokens of the n steps that the host does not know."""
        if len(steps) <= self._batch_sizes[-1] and all(_decodes(step) for step in steps):
            return self._decode(steps, drawn_ids)
        return self._prefill(steps, drawn_ids)

    def _decode(self, steps: list[SequenceStep], drawn_ids: torch.Tensor | None) -> torch.Tensor:
        num_rows = _padded(len(steps))
        self._inputs.fill(steps, num_rows, drawn_ids)
        if num_rows in self._graphs:
            graph, logits = self._graphs[num_rows]
            graph.replay()
        else:
            logits = self._decode_rows(num_rows)
        return logits[: len(steps)]

    def _decode_rows(self, num_rows: int) -> torch.Tensor:
        """Logits [num_rows, vocab_size] of what `self._inputs` holds."""
        hidden = self._weights.embedding[self._inputs.token_ids(num_rows)]
        attention = self._decode_attention(num_rows)
        return self._forms.head(self._layers(hidden, attention), self._weights.lm_head)

    def _decode_attention(self, num_rows: int) -> DecodeAttention:
        inputs = self._inputs
        positions = inputs.positions(num_rows).contiguous()
        slots = inputs.slots(num_rows).to(torch.int64)
        return DecodeAttention(self._attention, positions, slots, inputs.block_tables(num_rows))

    @torch.inference_mode()
    def warm_up(self, max_num_tokens: int, *, use_graphs: bool = False) -> None:
        """Once, on all ranks: captures a graph of every batch size, then runs a step full of
        prompts as long as they come, short ones, and chunks beside a row that decodes, so that
        neither compiling nor running out of memory is left to a request."""
        if use_graphs:
            self.capture_graphs()
        longest = min(max_num_tokens, self._max_seq_len)
        rest = max_num_tokens % longest
        full = [longest] * (max_num_tokens // longest) + [rest] * (rest > 0)
        full = full[: self._max_batch_size]
        for counts in (full, *([short] for short in _SHORT_PROMPTS if short < longest)):
            blocks = [[self._padding_block] * num_blocks_for(count) for count in counts]
            self._prefill(
                [
                    SequenceStep([0] * count, 0, blocks_of, None, 1)
                    for count, blocks_of in zip(counts, blocks, strict=True)
                ]
            )
        if self._max_batch_size > 1:
            for num_tokens in _SHORT_PROMPTS:
                self._prefill(self._mixture(num_tokens))

    def _mixture(self, num_tokens: int) -> list[SequenceStep]:
        """A row that decodes, and a later chunk of a prompt: `num_tokens` in all."""
        blocks = [self._padding_block]
        chunk = SequenceStep([0] * (num_tokens - 1), 1, blocks, None, 0)
        return [SequenceStep([0], 0, blocks, None, 1), chunk]

    @torch.inference_mode()
    def warm_up_thread(self, max_num_tokens: int) -> None:
        _, kv_heads, _, head_dim = self._attention.pages[0].k.shape
        heads = self._weights.layers[0].dense.weight.shape[1] // head_dim
        num_tokens = min(max_num_tokens, self._max_seq_len)
        self._forms.plan_prefill_attention(heads, kv_heads, head_dim, self._dtype, num_tokens)

    def close(self) -> None:
        """Ends the steps in flight and deletes the graphs, which hold the ranks' reductions."""
        if self._graphs:
            torch.cuda.synchronize(self._device)
            self._graphs.clear()
            torch.cuda.synchronize(self._device)

    @torch.inference_mode()
    def capture_graphs(self) -> None:
        """Captures a graph of every batch size, ranks' reductions included.

        Largest first, so that the smaller ones find their memory in its pool."""
        pool = torch.cuda.graph_pool_handle()
        for num_rows in reversed(self._batch_sizes):
            self._inputs.fill([], num_rows)
            self._decode_rows(num_rows)  # compiles, and lets the libraries allocate
            torch.cuda.synchronize(self._device)
            graph = torch.cuda.CUDAGraph()
            # Other threads (NCCL's watchdog, vision) may call CUDA meanwhile.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                logits = self._decode_rows(num_rows)
            self._graphs[num_rows] = graph, logits

    def _prefill(
        self, steps: list[SequenceStep], drawn_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Any mixture: rows that decode come first, for they share one attention kernel."""
        order = sorted(range(len(steps)), key=lambda i: not _decodes(steps[i]))
        ordered, device = [steps[i] for i in order], self._device
        n = sum(_decodes(step) for step in steps)
        parts: list[torch.Tensor] = []
        attention: HopperAttention | None = None
        if n > 0:
            self._inputs.fill(ordered[:n], n, drawn_ids)
            parts.append(self._weights.embedding[self._inputs.token_ids(n)])
            attention = decoding = self._decode_attention(n)
        if prompts := ordered[n:]:
            parts += [self._embed(step) for step in prompts]
            attention = of_prompts = self._prompt_attention(prompts)
        if n > 0 and prompts:
            attention = MixedAttention(n, decoding, of_prompts)
        assert attention is not None, "a step has tokens"
        normed = self._layers(torch.cat(parts), attention)
        rows = logit_rows(ordered).split([step.num_logits for step in ordered])
        places = {place: i for i, place in enumerate(order)}
        in_order = torch.cat([rows[places[i]] for i in range(len(steps))])  # the steps' own order
        return self._forms.head(normed[to_device(in_order, device)], self._weights.lm_head)

    def _prompt_attention(self, steps: list[SequenceStep]) -> PromptAttention:
        positions = [torch.arange(step.first_position, step.end_position) for step in steps]
        slots = [
            self._cache.slots(step.blocks, step.first_position, len(step.token_ids))
            for step in steps
        ]
        on_device = (to_device(torch.cat(each), self._device) for each in (positions, slots))
        return PromptAttention(self._attention, steps, *on_device)

    def _embed(self, step: SequenceStep) -> torch.Tensor:
        token_ids = to_device(torch.tensor(step.token_ids), self._device)
        table = None if step.prompt_table is None else step.prompt_table.to(self._device)
        return embed(token_ids, self._weights.embedding, table, self._dtype)

    def _layers(self, hidden: torch.Tensor, attention: HopperAttention) -> torch.Tensor:
        """hidden: [T, hidden_size]; returns the rows of the head, normed, in `dtype`."""
        forms, sums, layers = self._forms, self._sums, self._weights.layers
        norms = [(layer.input_norm, layer.qkv.activation_scale) for layer in layers]
        norms_after = [*norms[1:], (self._weights.final_norm, None)]
        hidden, normed = forms.add_rms_norm(hidden, None, *norms[0])
        for index, layer in enumerate(layers):
            qkv = forms.linear(normed, layer.qkv, self._dtype)
            if len(hidden) <= _ROWS_WITHOUT_CONTEXT:
                forms.load_ahead(layer.dense.weight)
            attended = attention.forward(index, qkv)
            hidden, normed = sums.linear_add_rms_norm(
                attended, layer.dense, hidden, layer.post_norm, layer.gate_up.activation_scale
            )
            product = forms.gate_up_swiglu(normed, layer.gate_up, layer.down, self._dtype)
            following = layers[index + 1].qkv.weight if index + 1 < len(layers) else None
            hidden, normed = sums.linear_add_rms_norm(
                product, layer.down, hidden, *norms_after[index], following
            )
        forms.join_ahead()
        return normed


def batch_sizes(max_batch_size: int) -> list[int]:
    """Rows of the decode steps that have a graph; larger batches run without."""
    largest = min(max_batch_size, _BATCH_SIZES[-1])
    return [*(size for size in _BATCH_SIZES if size < largest), _padded(largest)]


def _padded(num_rows: int) -> int:
    return next(size for size in _BATCH_SIZES if size >= num_rows)


def _decodes(step: SequenceStep) -> bool:
    """One token that no prompt table holds, and whose logits are wanted."""
    return len(step.token_ids) == step.num_logits == 1 and step.prompt_table is None
