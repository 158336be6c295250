"""The decoder's fast path: FP8 tensor-core linears and fused kernels over the paged KV cache.

A step in which every sequence decodes replays one CUDA graph, padded up to the next batch size
that has one. So does a step with short chunks of prompts, up to head and embedding. Longer ones
run launch by launch. All may be asked for before the host knows the tokens of the rows that decode.
Design: decisions 48 to 60 and 148 (docs/decisions/decoder.md).
"""

from __future__ import annotations

from functools import partial

import torch

from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.model.decoder import embed, rope_tables
from nvlm.model.dtypes import TORCH_DTYPES
from nvlm.planning.hopper import CHUNK_SIZES, MAX_GRAPH_ROWS, num_context_positions
from runtime.decoder.block_allocator import num_blocks_for
from runtime.decoder.kernels.plain_forms import PlainForms
from runtime.decoder.models.all_reduce_norm import AllReduceNorm, OneRank
from runtime.decoder.models.chunk_inputs import ChunkInputs
from runtime.decoder.models.decode_inputs import DecodeInputs
from runtime.decoder.models.hopper_attention import (
    AttentionContext,
    ChunkAttention,
    DecodeAttention,
    HopperAttention,
    MixedAttention,
    attention_of_chunks,
)
from runtime.decoder.models.hopper_weights import HopperWeights
from runtime.decoder.models.host_copy import to_device
from runtime.decoder.models.kv_cache import PagedKVCache
from runtime.decoder.models.step import SequenceStep, logit_rows
from runtime.decoder.models.step_graphs import StepGraphs, StepSize
from runtime.kernels.branch import Branch
from runtime.kernels.fp8_linear import Fp8Linear

_BATCH_SIZES = (1, 2, 4, *range(8, 64, 8), *range(64, MAX_GRAPH_ROWS + 1, 32))
_MIXED_SIZES = (0, 8, 16, 32, 64, 128)  # rows that decode beside chunks; the largest batch too
_ROWS_WITHOUT_CONTEXT = 2  # whose attention reads so little that the memory has time
_SHORT_PROMPTS = (2, 16)  # Triton compiles anew for a number of rows that 16 divides
_LONGER_PROMPTS = (512, 1024)  # whose contexts are split in two where a rank has few KV heads


class HopperModel:
    """`DecoderModel` of an FP8 checkpoint, its KV cache in FP8 or in its dtype.

    forms: the kernels, or their plain torch twins on any device. all_reduce_norm: what follows the
    row-parallel linears, where the weights are a rank's shards. chunk_sizes: rows of chunks of
    prompts in the steps that have graphs, rising.
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
        chunk_sizes: tuple[int, ...] = CHUNK_SIZES,
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
        k, v = self._cache.context_memory(num_context_positions(max_seq_len))
        self._attention = AttentionContext(
            forms, weights.layers, pages, cos.to(device), sin.to(device), k, v, Branch(device)
        )
        self._padding_block = num_blocks
        self._max_batch_size, self._max_seq_len = max_batch_size, max_seq_len
        self._chunk_sizes = chunk_sizes
        self._chunks = ChunkInputs(
            chunk_sizes[-1],
            num_blocks,
            self._attention.tile_tokens,
            decoder.hidden_size,
            self._dtype,
            k,
            v,
        )
        self._mixed_sizes = mixed_sizes(max_batch_size)
        self._graphs = StepGraphs(device)

    def graph_sizes(self) -> list[StepSize]:
        """Lists the sizes of all graphs, those of many rows that decode first."""
        sizes = list[StepSize]()
        for num_rows in [*reversed(self._batch_sizes), 0]:
            if num_rows in self._mixed_sizes:
                sizes += [StepSize(num_rows, chunk) for chunk in reversed(self._chunk_sizes)]
            if num_rows > 0:
                sizes.append(StepSize(num_rows))
        return sizes

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
        size = StepSize(num_rows)
        logits = self._graphs.run(size, partial(self._decode_rows, num_rows))
        return logits[: len(steps)]

    def _decode_rows(self, num_rows: int) -> torch.Tensor:
        """Logits [num_rows, vocab_size] of what `self._inputs` holds."""
        hidden = self._weights.embedding[self._inputs.token_ids(num_rows)]
        attention = self._decode_attention(num_rows)
        return self._logits(self._layers(hidden, attention))

    def _decode_attention(self, num_rows: int) -> DecodeAttention:
        inputs = self._inputs
        positions = inputs.positions(num_rows).contiguous()
        slots = inputs.slots(num_rows).to(torch.int64)
        return DecodeAttention(self._attention, positions, slots, inputs.block_tables(num_rows))

    @torch.inference_mode()
    def warm_up(
        self, max_num_tokens: int, *, use_graphs: bool = False, answers_once: bool = False
    ) -> None:
        """Once, on all ranks: captures a graph of every size, then launches a step full of prompts
        as long as they come, short ones, and chunks beside a row that decodes, so that neither
        compiling nor running out of memory is left to a request.

        answers_once: one request will come, whose prompt is computed once. Only steps in which all
        decode are graphs then, and nothing else is tried."""
        if use_graphs:
            self.capture_graphs(with_chunks=not answers_once)
        if answers_once:
            return
        longest = min(max_num_tokens, self._max_seq_len)
        rest = max_num_tokens % longest
        full = [longest] * (max_num_tokens // longest) + [rest] * (rest > 0)
        full = full[: self._max_batch_size]
        others = [count for count in (*_SHORT_PROMPTS, *_LONGER_PROMPTS) if count < longest]
        for counts in (full, *([count] for count in others)):
            blocks = [[self._padding_block] * num_blocks_for(count) for count in counts]
            prompts = [
                SequenceStep([0] * count, 0, blocks_of, None, 1)
                for count, blocks_of in zip(counts, blocks, strict=True)
            ]
            normed = self._launched([], prompts)
            self._logits(normed[: len(prompts)])
        if self._max_batch_size > 1:
            for num_tokens in _SHORT_PROMPTS:
                if num_tokens <= longest:
                    self._launched(*self._mixture(num_tokens))

    def _mixture(self, num_tokens: int) -> tuple[list[SequenceStep], list[SequenceStep]]:
        """A row that decodes, and a later chunk of a prompt: `num_tokens` in all."""
        blocks = [self._padding_block]
        chunk = SequenceStep([0] * (num_tokens - 1), 1, blocks, None, 0)
        return [SequenceStep([0], 0, blocks, None, 1)], [chunk]

    def close(self) -> None:
        """Ends the steps in flight and deletes the graphs."""
        self._graphs.clear()

    @torch.inference_mode()
    def capture_graphs(self, *, with_chunks: bool = True) -> None:
        """Captures a graph of every size, ranks' reductions included."""
        self._chunks.fill([])
        for size in self.graph_sizes():
            if size.num_chunk_rows > 0 and not with_chunks:
                continue
            self._inputs.fill([], size.num_decoding)
            if size.num_chunk_rows > 0:
                self._graphs.capture(size, partial(self._mixed_rows, size))
            else:
                self._graphs.capture(size, partial(self._decode_rows, size.num_decoding))

    def _prefill(
        self, steps: list[SequenceStep], drawn_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Any mixture: rows that decode come first, then prompts."""
        order = sorted(range(len(steps)), key=lambda i: not _decodes(steps[i]))
        ordered = [steps[i] for i in order]
        n = sum(_decodes(step) for step in steps)
        decoding, prompts = ordered[:n], ordered[n:]
        size = self._size_of(decoding, prompts)
        if size is None:
            normed, num_padding = self._launched(decoding, prompts, drawn_ids), 0
        else:
            self._inputs.fill(decoding, size.num_decoding, drawn_ids)
            self._fill_chunks(prompts)
            normed = self._graphs.run(size, partial(self._mixed_rows, size))
            num_padding = size.num_decoding - n  # before the prompts' rows
        rows = logit_rows(ordered)
        rows[n:] += num_padding
        of_steps = rows.split([step.num_logits for step in ordered])
        places = {place: i for i, place in enumerate(order)}
        in_order = torch.cat([of_steps[places[i]] for i in range(len(steps))])
        return self._logits(normed[to_device(in_order, self._device)])

    def _size_of(
        self, decoding: list[SequenceStep], prompts: list[SequenceStep]
    ) -> StepSize | None:
        """The smallest that holds a step with prompts; None where none does."""
        num_rows = sum(len(step.token_ids) for step in prompts)
        most_rows, most_chunk_rows = self._mixed_sizes[-1], self._chunk_sizes[-1]
        if not prompts or num_rows > most_chunk_rows or len(decoding) > most_rows:
            return None
        if not self._chunks.fits(prompts):
            return None
        return StepSize(
            next(size for size in self._mixed_sizes if size >= len(decoding)),
            next(size for size in self._chunk_sizes if size >= num_rows),
        )

    def _fill_chunks(self, prompts: list[SequenceStep]) -> None:
        self._chunks.fill(prompts)
        embeddings = torch.cat([self._embed(step) for step in prompts])
        self._chunks.embeddings[: len(embeddings)] = embeddings

    def _mixed_rows(self, size: StepSize) -> torch.Tensor:
        """Normed rows of what `self._inputs` and `self._chunks` hold."""
        n, num_rows, chunks = size.num_decoding, size.num_chunk_rows, self._chunks
        attention: HopperAttention = ChunkAttention(
            self._attention,
            chunks.positions(num_rows),
            chunks.slots(num_rows).to(torch.int64),
            chunks.tiles(num_rows),
            chunks.contexts,
        )
        hidden = chunks.embeddings[:num_rows]
        if n > 0:
            attention = MixedAttention(self._attention, n, self._decode_attention(n), attention)
            decoding = self._weights.embedding[self._inputs.token_ids(n)]
            hidden = torch.cat([decoding, hidden])
        return self._layers(hidden, attention)

    def _launched(
        self,
        decoding: list[SequenceStep],
        prompts: list[SequenceStep],
        drawn_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Normed rows, launch by launch."""
        n, parts = len(decoding), list[torch.Tensor]()
        attention: HopperAttention | None = None
        if n > 0:
            self._inputs.fill(decoding, n, drawn_ids)
            parts.append(self._weights.embedding[self._inputs.token_ids(n)])
            attention = of_rows = self._decode_attention(n)
        if prompts:
            parts += [self._embed(step) for step in prompts]
            attention = of_prompts = attention_of_chunks(self._attention, prompts)
        if n > 0 and prompts:
            attention = MixedAttention(self._attention, n, of_rows, of_prompts)
        assert attention is not None, "a step has tokens"
        return self._layers(torch.cat(parts), attention)

    def _embed(self, step: SequenceStep) -> torch.Tensor:
        token_ids = to_device(torch.tensor(step.token_ids), self._device)
        table = None if step.prompt_table is None else step.prompt_table.to(self._device)
        return embed(token_ids, self._weights.embedding, table, self._dtype)

    def _layers(self, hidden: torch.Tensor, attention: HopperAttention) -> torch.Tensor:
        """hidden: [T, hidden_size]; returns the rows of the head, normed, in `dtype`, or e4m3 where
        it is quantised."""
        forms, sums, layers = self._forms, self._sums, self._weights.layers
        norms = [(layer.input_norm, layer.qkv.activation_scale) for layer in layers]
        head = self._weights.lm_head
        head_scale = head.activation_scale if isinstance(head, Fp8Linear) else None
        norms_after = [*norms[1:], (self._weights.final_norm, head_scale)]
        hidden, normed = forms.add_rms_norm(hidden, None, *norms[0])
        for index, layer in enumerate(layers):
            qkv = forms.linear(normed, layer.qkv, self._dtype)
            if len(hidden) <= _ROWS_WITHOUT_CONTEXT:
                forms.load_ahead(layer.dense.weight)
            attended = self._attention.attended(attention, index, qkv)
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

    def _logits(self, normed: torch.Tensor) -> torch.Tensor:
        """Float32 [T, the rank's rows of the vocabulary] of the head's rows."""
        head = self._weights.lm_head
        if isinstance(head, Fp8Linear):
            return self._forms.linear(normed, head, torch.float32)
        return self._forms.head(normed, head)


def batch_sizes(max_batch_size: int) -> list[int]:
    """Rows of the decode steps that have a graph; larger batches run without."""
    largest = min(max_batch_size, _BATCH_SIZES[-1])
    return [*(size for size in _BATCH_SIZES if size < largest), _padded(largest)]


def mixed_sizes(max_batch_size: int) -> list[int]:
    """Rows that decode in the graphs with chunks of prompts; 0 are prompts alone."""
    if max_batch_size == 1:
        return [0]
    largest = batch_sizes(max_batch_size)[-1]
    return [*(size for size in _MIXED_SIZES if size < largest), largest]


def _padded(num_rows: int) -> int:
    return next(size for size in _BATCH_SIZES if size >= num_rows)


def _decodes(step: SequenceStep) -> bool:
    """One token that no prompt table holds, and whose logits are wanted."""
    return len(step.token_ids) == step.num_logits == 1 and step.prompt_table is None
