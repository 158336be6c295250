"""Decoder part of the conversion: layer by layer, calibrated, quantised, sharded, written.

Peak memory: one layer as the source gives it (nothing, if it maps files), its widest linear in
float32, a window of the samples' hidden states; without calibration a few blocks. A head that is
quantised is copied where `dtype` is not the published one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from build.conversion.calibration.amax_observer import AmaxObserver
from build.conversion.calibration.calibrate_decoder import norm_rows, run_layer
from build.conversion.calibration.calibration_set import Calibration
from build.conversion.calibration.probe_decoder import Probe, probe_layer
from build.conversion.calibration.row_file import NextStates, RowFile
from build.conversion.output_files import OutputFiles
from build.conversion.output_folder import LayerParts, OutputFolder, Rows
from build.conversion.quantization.cast import amax, cast, cast_amax, row_blocks
from build.conversion.quantization.layer_tensors import LayerTensors
from build.conversion.quantization.scales import check_cached, report_linears, scaled_anew
from build.conversion.report.quantization_report import (
    AttentionReport,
    LinearReport,
    as_record,
    with_residual_errors,
)
from build.conversion.unit import Unit
from build.sources.source import Read
from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.formats.tensor_names import (
    DECODER_LAYER,
    EMBED_TOKENS,
    ENGINE_FIRST_TENSORS,
    ENGINE_LAST_TENSORS,
    ENGINE_LAYER,
    ENGINE_LAYER_TENSORS,
    FINAL_NORM,
    HEAD,
    LM_HEAD,
    EngineTensor,
)
from nvlm.model.decoder import DECODER_LINEARS, DecoderLayer, embed
from nvlm.model.dtypes import TORCH_DTYPES
from nvlm.model.number_formats import FP8, UNQUANTIZED, LinearScales, NumberFormat

Run = Callable[[Read, OutputFiles], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class DecoderStep:
    """Makes the units; the calibration samples run through the layers, if there are any."""

    config: CheckpointConfig  # of the checkpoint that is made
    calibration: Calibration  # empty: nothing runs through the layers
    device: torch.device  # where the samples run
    folder: OutputFolder  # takes the tensors

    @property
    def dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.config.dtype]

    @property
    def report_format(self) -> NumberFormat:
        """What the linears' report is about: where only the cache is quantised, what FP8 would
        do."""
        stored = self.config.weight_format
        return FP8 if stored is UNQUANTIZED else stored

    def units(self, image_embeddings: RowFile | None, next_states: NextStates) -> list[Unit]:
        """In the order of the model. image_embeddings: [tiles of all samples, tokens_per_tile,
        hidden_size], where there are samples."""
        states = self._states(next_states)
        run_first = partial(self._run_first, image_embeddings, states)
        units = [self._unit("embedding", ENGINE_FIRST_TENSORS, None, run_first, states)]
        for i in range(self.config.decoder.num_hidden_layers):
            before, states = states, self._states(next_states)
            run = partial(self._run_layer, i, before, states)
            units.append(self._unit(f"decoder layer {i}", ENGINE_LAYER_TENSORS, i, run, states))
        run_last = partial(self._run_last, states)
        units.append(self._unit("head", ENGINE_LAST_TENSORS, None, run_last, None))
        return units

    def _states(self, next_states: NextStates) -> RowFile | None:
        """Hidden states [tokens of all samples, hidden_size] in `dtype`."""
        if not self.calibration.samples:
            return None
        num_tokens = self.calibration.num_tokens
        return next_states(num_tokens, (self.config.decoder.hidden_size,), self.dtype)

    def _unit(
        self,
        name: str,
        tensors: tuple[EngineTensor, ...],
        layer: int | None,
        run: Run,
        states: RowFile | None,
    ) -> Unit:
        prefix = "" if layer is None else DECODER_LAYER.format(i=layer)
        reads = tuple(prefix + source for tensor in tensors for source in tensor.sources)
        writes = tuple(self.folder.writes(tensors, layer))
        return Unit(name, reads, writes, run, states)

    def _run_first(
        self,
        image_embeddings: RowFile | None,
        states: RowFile | None,
        read: Read,
        out: OutputFiles,
    ) -> dict[str, Any]:
        """The embedding, and every sample's input of the first layer."""
        (tensor,) = ENGINE_FIRST_TENSORS
        embedding = read(EMBED_TOKENS)
        self.folder.write_top(out, tensor, self._rows(EMBED_TOKENS, embedding))
        if states is None:
            return {}
        first_tile = 0
        with states.writer() as writer:
            for sample in self.calibration.samples:
                tiles = range(first_tile, first_tile + sample.num_tiles)
                table = image_embeddings.read(tiles).flatten(0, 1) if image_embeddings else None
                token_ids = torch.tensor(sample.prompt.token_ids)
                writer.append(embed(token_ids, embedding, table, self.dtype))
                first_tile = tiles.stop
        return {}

    def _run_last(self, before: RowFile | None, read: Read, out: OutputFiles) -> dict[str, Any]:
        """The final norm, and the head after it, which is quantised where that was asked for."""
        norm_tensor, head_tensor = ENGINE_LAST_TENSORS
        norm = read(FINAL_NORM)
        self.folder.write_top(out, norm_tensor, self._rows(FINAL_NORM, norm))
        head = read(LM_HEAD)
        linears: list[LinearReport] = []
        scales = None
        if self.config.head_format is not UNQUANTIZED:
            if before is not None:
                head = cast(LM_HEAD, head.to(self.device), self.dtype)
                linears = self._calibrate_head(norm, head, before)
            elif self.calibration.cache is not None:
                cached = self.calibration.cache.linears_of(HEAD)
                linears = scaled_anew("", (HEAD,), cached, self.report_format, self.dtype)
                check_cached(linears[0], cast_amax(LM_HEAD, head, self.dtype, self.device))
            scales = linears[0].scales
        self.folder.write_top(out, head_tensor, self._rows(LM_HEAD, head, scales), scales)
        return as_record(linears) if linears else {}

    def _calibrate_head(
        self, norm: torch.Tensor, head: torch.Tensor, before: RowFile
    ) -> list[LinearReport]:
        """head: in `dtype`, on the device. before: what the last layer wrote."""
        observer = AmaxObserver("", torch.finfo(self.dtype).max, before.num_rows)
        norm = cast(FINAL_NORM, norm.to(self.device), self.dtype)
        norm_rows(norm, self.config.decoder.rms_norm_eps, before, observer, self.device)
        weights, weight_amax, seen = {HEAD: head}, {HEAD: amax(head)}, observer.maxima
        return report_linears(
            "", weights, weight_amax, seen, observer.rows, self.report_format, self.dtype
        )

    def _run_layer(
        self, i: int, before: RowFile | None, after: RowFile | None, read: Read, out: OutputFiles
    ) -> dict[str, Any]:
        """Samples run through the layer as published; then its linears are quantised."""
        layer = LayerTensors(DECODER_LAYER.format(i=i), read, self.dtype, self.device)
        prefix = ENGINE_LAYER.format(i=i)
        linears: list[LinearReport] = []
        attention = None
        cache = self.calibration.cache
        if before is not None and after is not None:
            linears, attention = self._calibrate(layer, prefix, before, after)
        elif cache is not None:
            cached, attention = cache.rows_of(prefix)
            linears = scaled_anew(prefix, DECODER_LINEARS, cached, self.report_format, self.dtype)
        by_name = {row.linear.removeprefix(prefix): row for row in linears}
        scales = {
            name: row.scales
            for name, row in by_name.items()
            if self.config.linear_format(i, name) is not UNQUANTIZED
        }

        def rows(tensor: EngineTensor, source: str) -> Rows:
            name = tensor.name.removesuffix(".weight")
            report = by_name.get(name)
            if cache is not None and report is not None and source == tensor.sources[0]:
                check_cached(report, layer.amax(tensor))
            return self._rows(layer.prefix + source, layer.pop(source), scales.get(name))

        self.folder.write_layer(out, LayerParts(i, rows, scales, attention))
        return as_record(linears, attention)

    def _calibrate(
        self, tensors: LayerTensors, prefix: str, before: RowFile, after: RowFile
    ) -> tuple[list[LinearReport], AttentionReport]:
        """Runs every sample through the layer in the unquantised dtype."""
        whole = {t.name: tensors.whole(t) for t in ENGINE_LAYER_TENSORS}
        weight_amax = {name: amax(whole[f"{name}.weight"]) for name in DECODER_LINEARS}
        layer = DecoderLayer(self.config.decoder, whole)
        observer = AmaxObserver(prefix, torch.finfo(self.dtype).max, before.num_rows)
        decoder, lengths = self.config.decoder, self.calibration.lengths
        run_layer(layer, decoder, lengths, before, after, observer, self.device)
        seen = observer.maxima
        observer.stop()
        weights = {name: layer.linear(name).weight for name in DECODER_LINEARS}
        linears = report_linears(
            prefix, weights, weight_amax, seen, observer.rows, self.report_format, self.dtype
        )
        q_heads, k_heads, v_heads = (tuple(observer.head_maxima[x].tolist()) for x in "qkv")
        attention = AttentionReport(
            prefix + "attention", seen["q"], seen["k"], seen["v"], q_heads, k_heads, v_heads
        )
        scales = {row.linear.removeprefix(prefix): row.scales for row in linears}
        probe = Probe.read(before, lengths, self.device)
        errors, attention = probe_layer(
            layer, decoder, probe, scales, self.report_format, attention
        )
        return with_residual_errors(linears, prefix, errors), attention

    def _rows(self, name: str, published: torch.Tensor, scales: LinearScales | None = None) -> Rows:
        """What is stored of `published`, quantised if given scales. name: for complaints."""

        def blocks() -> Iterator[torch.Tensor]:
            for block in row_blocks(published):
                if scales is None:
                    yield cast(name, block, self.dtype)
                else:
                    rows = cast(name, block.to(self.device), self.dtype)
                    yield self.config.weight_format.quantize(rows, scales.weight)

        return Rows(blocks(), len(published))
