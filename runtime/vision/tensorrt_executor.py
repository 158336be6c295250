"""`VisionExecutor` on a TensorRT (or TensorRT-RTX) engine: torch tensors, bound by name."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from nvlm.inputs.tiling import normalize
from nvlm.planning.tensorrt_package import make_logger
from nvlm.program.errors import UserError
from runtime.vision.executor import check_tiles

INPUT, OUTPUT = "tiles", "image_embeddings"

log = logging.getLogger(__name__)


class TensorrtVisionExecutor:
    """Nothing is copied to the host. Nothing waits but the stream torch works on, and `encode`
    between two slices. TensorRT runs a pass whole, so a slice is a tile, however long that takes.
    """

    def __init__(
        self, trt: Any, path: Path, device: torch.device, *, in_slices: bool = False
    ) -> None:
        """`trt`: the module that built `path`."""
        self._device = device
        self._logger = make_logger(trt)
        self._runtime = trt.Runtime(self._logger)
        with torch.cuda.device(device):
            engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
            if engine is None:
                raise UserError(
                    f"{path} cannot be loaded by {trt.__name__} {trt.__version__}: "
                    f"{'; '.join(self._logger.errors)}; build the engine again on this machine"
                )
            self._context = engine.create_execution_context()
        self._engine = engine
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        assert sorted(names) == sorted((INPUT, OUTPUT)), f"{path} has tensors {names}"
        types = _torch_types(trt)
        self._input_dtype = types[engine.get_tensor_dtype(INPUT)]
        self._output_dtype = types[engine.get_tensor_dtype(OUTPUT)]
        _, _, largest = engine.get_tensor_profile_shape(INPUT, 0)
        self.max_num_tiles: int = largest[0]
        self._image_size: int = largest[3]
        self._in_slices = in_slices
        if in_slices:
            log.info("vision is encoded tile by tile, between decode steps")

    @torch.inference_mode()
    def encode(self, tiles: torch.Tensor) -> torch.Tensor:
        check_tiles(tiles, self._image_size)
        tiles = normalize(tiles.to(self._device)).to(self._input_dtype)
        batches = tiles.split(1 if self._in_slices else self.max_num_tiles)
        embeddings = [self._run(batches[0])]
        for batch in batches[1:]:
            if self._in_slices:
                torch.cuda.current_stream(self._device).synchronize()
            embeddings.append(self._run(batch))
        return torch.cat(embeddings)

    def _run(self, tiles: torch.Tensor) -> torch.Tensor:
        """tiles: [num_tiles, 3, S, S] contiguous on the device, within the profile."""
        context = self._context
        if not context.set_input_shape(INPUT, tuple(tiles.shape)):
            raise RuntimeError(f"TensorRT refused shape {list(tiles.shape)}: {self._errors()}")
        shape = tuple(context.get_tensor_shape(OUTPUT))
        embeddings = torch.empty(shape, dtype=self._output_dtype, device=self._device)
        context.set_tensor_address(INPUT, tiles.data_ptr())
        context.set_tensor_address(OUTPUT, embeddings.data_ptr())
        # On torch's own stream, so whatever torch does with the result comes after it, and the
        # memory of `tiles` is not given to anything that runs before.
        if not context.execute_async_v3(torch.cuda.current_stream(self._device).cuda_stream):
            raise RuntimeError(f"TensorRT could not run the vision engine: {self._errors()}")
        return embeddings

    def _errors(self) -> str:
        return "; ".join(self._logger.errors)

    def close(self) -> None:
        """In this order: a context must not outlive its engine."""
        self._context = None
        self._engine = None


def _torch_types(trt: Any) -> dict[Any, torch.dtype]:
    return {
        trt.DataType.FLOAT: torch.float32,
        trt.DataType.HALF: torch.float16,
        trt.DataType.BF16: torch.bfloat16,
    }
