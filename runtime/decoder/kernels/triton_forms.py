"""The steps of `plain_forms` as Triton kernels and libraries' calls, bound to one device's
workspace."""

from __future__ import annotations

import torch

from runtime.decoder.kernels import (
    chunk_attention,
    decode_attention,
    elementwise,
    gate_up_swiglu,
    rope,
)
from runtime.decoder.kernels.operands import ChunkTiles, Contexts, KVPages, TokenRows
from runtime.decoder.kernels.plain_forms import PlainForms
from runtime.decoder.kernels.workspace import Workspace
from runtime.kernels.fp8_linear import Fp8Linear
from runtime.kernels.load_ahead import LoadAhead
from runtime.kernels.tensor_core_linear import TensorCoreLinear

_PROGRAMS_PER_MULTIPROCESSOR = 2
_FAST_ROWS = 128  # up to which the memory takes a linear's time (docs/decisions/decoder.md, 57)


class TritonForms(PlainForms):
    add_rms_norm = staticmethod(elementwise.add_rms_norm)
    rope_append = staticmethod(rope.rope_append)

    def __init__(self, device: torch.device) -> None:
        self._device = device
        multiprocessors = 4  # in Triton's interpreter
        if device.type == "cuda":
            multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        num_programs = _PROGRAMS_PER_MULTIPROCESSOR * multiprocessors
        self._workspace = Workspace.allocate(device, num_programs)
        # Chunks are attended beside rows that decode.
        self._chunk_workspace = Workspace.allocate(device, num_programs)
        self.tensor_core_linear = TensorCoreLinear(device)
        self._ahead = LoadAhead(device)

    def linear(
        self,
        x: torch.Tensor,
        linear: Fp8Linear,
        dtype: torch.dtype,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.tensor_core_linear(x, linear, dtype, out, use_fast_accum=len(x) > _FAST_ROWS)

    def gate_up_swiglu(
        self, x: torch.Tensor, gate_up: Fp8Linear, down: Fp8Linear, dtype: torch.dtype
    ) -> torch.Tensor:
        if len(x) <= gate_up_swiglu.MAX_ROWS:
            return gate_up_swiglu.gate_up_swiglu(x, gate_up, down, dtype, self._workspace)
        halves = self.linear(x, gate_up, dtype)
        return elementwise.swiglu_quantize(halves, down.activation_scale)

    def decode_attention(
        self,
        qkv: torch.Tensor,
        rows: TokenRows,
        block_tables: torch.Tensor,
        positions: torch.Tensor,
        pages: KVPages,
        scale: torch.Tensor | None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return decode_attention.decode_attention(
            qkv, rows, block_tables, positions, pages, scale, self._workspace, out=out
        )

    def chunk_attention(
        self,
        q: torch.Tensor,
        tiles: ChunkTiles,
        contexts: Contexts,
        pages: KVPages,
        scale: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        chunk_attention.chunk_attention(
            q, tiles, contexts, pages, scale, out, self._chunk_workspace
        )

    def load_ahead(self, weight: torch.Tensor) -> None:
        self._ahead.start(weight)

    def join_ahead(self) -> None:
        self._ahead.join()

    def head(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
