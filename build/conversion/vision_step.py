"""Vision part of the conversion: one dtype, no dummy heads, scales, image embeddings.

Peak memory with calibration: one layer (or the projector) in float32 and a window of tiles'
hidden states; without, one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from build.conversion.calibration.amax_observer import AmaxObserver
from build.conversion.calibration.calibration_set import Calibration
from build.conversion.calibration.residual_error import QuantisedLinears, residual_errors
from build.conversion.calibration.row_file import NextStates, RowFile
from build.conversion.dummy_heads import without_dummy_heads
from build.conversion.output_files import OutputFiles
from build.conversion.output_folder import OutputFolder
from build.conversion.quantization.cast import amax, cast
from build.conversion.quantization.scales import check_cached, report_linears, scaled_anew
from build.conversion.report.quantization_report import (
    LinearReport,
    as_record,
    with_residual_errors,
)
from build.conversion.unit import Unit
from build.sources.source import Read
from nvlm.formats.tensor_names import PROJECTOR_PREFIX, VISION_LAYER
from nvlm.inputs.tiling import normalize
from nvlm.model.config import VisionConfig
from nvlm.model.number_formats import UNQUANTIZED
from nvlm.model.vision import VISION_FORMAT, VISION_LINEARS, VisionLayer, VisionModel, linear_of

_EMBEDDINGS_PREFIX = "vision_model.embeddings."
_TILES_PER_WINDOW = 7
"""Tiles that a layer works on at a time: about 1.5 GB of activations at InternViT-6B's width."""


@dataclass(frozen=True, slots=True)
class VisionStep:
    """Makes the units of the ViT and the projector.

    The calibration samples' tiles run through the cast weights in float32.
    """

    published: VisionConfig  # shape with the dummy heads
    config: VisionConfig  # shape as written: with dummy heads only where they are kept
    dtype: torch.dtype  # of the written weights
    calibration: Calibration  # empty: nothing runs through the layers
    device: torch.device  # where the tiles run
    folder: OutputFolder  # takes the tensors

    def units(self, next_states: NextStates) -> list[Unit]:
        """Embeddings, layers, projector; the last one's states are the image embeddings,
        [tiles of all samples, tokens_per_tile, output_size] float32."""
        with torch.device("meta"):
            model = VisionModel(self.config)
            layer = VisionLayer(self.config)
        states = self._hidden_states(next_states)
        embeddings = model.vision_model.embeddings
        units = [
            self._unit(
                "vision embeddings",
                embeddings,
                _EMBEDDINGS_PREFIX,
                partial(self._run_embeddings, embeddings, states),
                states,
            )
        ]
        for i in range(self.config.num_hidden_layers):
            before, states = states, self._hidden_states(next_states)
            prefix = VISION_LAYER.format(i=i)
            run = partial(self._run_layer, prefix, before, states)
            units.append(self._unit(f"vision layer {i}", layer, prefix, run, states))
        before, states = states, None
        if self.calibration.num_tiles:
            row = (self.config.tokens_per_tile, self.config.output_size)
            states = next_states(self.calibration.num_tiles, row, torch.float32)
        project = partial(self._run_projector, model, before, states)
        units.append(self._unit("projector", model.mlp1, PROJECTOR_PREFIX, project, states))
        return units

    def _hidden_states(self, next_states: NextStates) -> RowFile | None:
        if not self.calibration.num_tiles:
            return None  # nothing runs: no samples, or text only
        row = (self.config.num_positions, self.config.hidden_size)
        return next_states(self.calibration.num_tiles, row, torch.float32)

    def _unit(
        self,
        name: str,
        module: nn.Module,
        prefix: str,
        run: Callable[[Read, OutputFiles], dict[str, Any]],
        states: RowFile | None,
    ) -> Unit:
        names = tuple(prefix + key for key in module.state_dict())
        return Unit(name, names, tuple(self.folder.vision_writes(names)), run, states)

    def _fill(
        self,
        module: nn.Module,
        prefix: str,
        read: Read,
        write: Callable[[str, torch.Tensor], None],
    ) -> None:
        """Casts and writes a meta module's tensors, and fills it with them, widened to float32, if
        it is going to run."""
        state, known = {}, self._cached
        for key in module.state_dict():
            name = prefix + key
            tensor = cast(name, read(name), self.dtype)
            if self.config.num_dummy_heads == 0 and self.published.num_dummy_heads:
                tensor = without_dummy_heads(name, tensor, self.config)
            if cached := known.get(name.removesuffix(".weight")):
                check_cached(cached, amax(tensor))
            write(name, tensor)
            if self.calibration.num_tiles:
                state[key] = tensor.to(self.device, torch.float32)
        if self.calibration.num_tiles:
            module.load_state_dict(state, assign=True)

    def _writer(
        self, out: OutputFiles, rows: Iterable[LinearReport] = ()
    ) -> Callable[[str, torch.Tensor], None]:
        """Writes a tensor; a linear of `rows` in the folder's format, by its scales."""
        scales = {f"{row.linear}.weight": row.scales for row in rows}

        def write(name: str, tensor: torch.Tensor) -> None:
            self.folder.write_vision(out, name, tensor, scales.get(name))

        return write

    @property
    def _cached(self) -> dict[str, LinearReport]:
        """The rows of --calib_cache, by their linears."""
        cache = self.calibration.cache
        return {} if cache is None else {row.linear: row for row in cache.linears}

    def _run_embeddings(
        self, module: nn.Module, states: RowFile | None, read: Read, out: OutputFiles
    ) -> dict[str, Any]:
        self._fill(module, _EMBEDDINGS_PREFIX, read, self._writer(out))
        if states is not None:
            with states.writer() as writer:
                for sample in self.calibration.samples:
                    tiles = sample.load_tiles()
                    for start in range(0, len(tiles), _TILES_PER_WINDOW):
                        window = normalize(tiles[start : start + _TILES_PER_WINDOW])
                        writer.append(module(window.to(self.device)))
        module.to("meta")
        return {}

    def _run_layer(
        self,
        prefix: str,
        before: RowFile | None,
        after: RowFile | None,
        read: Read,
        out: OutputFiles,
    ) -> dict[str, Any]:
        with torch.device("meta"):
            layer = VisionLayer(self.config)
        if before is None or after is None:
            cache = self.calibration.cache
            rows = cache.linears_of(prefix) if cache else []
            names = VISION_LINEARS if rows else ()  # text alone: vision has none
            rows = scaled_anew(prefix, names, rows, VISION_FORMAT, self.dtype)
            self._fill(layer, prefix, read, self._writer(out, rows))
            return as_record(rows)
        # Linears that are stored quantised are written when their scales are known.
        waits = self.folder.vision_format is not UNQUANTIZED
        self._fill(layer, prefix, read, _keep if waits else self._writer(out))
        # What the runtime computes in must hold what is seen here in float32.
        num_rows = before.num_rows * self.config.num_positions
        observer = AmaxObserver(prefix, torch.finfo(self.dtype).max, num_rows)
        linears = {name: linear_of(layer, name) for name in VISION_LINEARS}
        observer.watch_inputs(linears)
        self._run_windows(layer, before, after)
        observer.stop()
        weights = {name: linear.weight for name, linear in linears.items()}
        weight_amax = {name: amax(weight) for name, weight in weights.items()}
        rows = report_linears(
            prefix, weights, weight_amax, observer.maxima, observer.rows, VISION_FORMAT, self.dtype
        )
        scales = {row.linear.removeprefix(prefix): row.scales for row in rows}
        probe = before.read(range(1)).to(self.device)
        parts = QuantisedLinears(linears, scales, VISION_FORMAT)
        errors = residual_errors(lambda: layer(probe), parts, {})
        rows = with_residual_errors(rows, prefix, errors)
        if waits:
            write = self._writer(out, rows)
            for key, tensor in layer.state_dict().items():
                write(prefix + key, tensor.to(self.dtype))
        return as_record(rows)

    def _run_projector(
        self,
        model: VisionModel,
        before: RowFile | None,
        after: RowFile | None,
        read: Read,
        out: OutputFiles,
    ) -> dict[str, Any]:
        self._fill(model.mlp1, PROJECTOR_PREFIX, read, self._writer(out))
        if before is not None and after is not None:
            self._run_windows(model.project, before, after)
        model.mlp1.to("meta")
        return {}

    def _run_windows(
        self, run: Callable[[torch.Tensor], torch.Tensor], before: RowFile, after: RowFile
    ) -> None:
        with after.writer() as writer:
            for window in before.windows(_TILES_PER_WINDOW):
                writer.append(run(before.read(window).to(self.device)))


def _keep(name: str, tensor: torch.Tensor) -> None:
    """Writes nothing: the module that is filled holds the tensor."""
