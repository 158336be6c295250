"""`VisionExecutor` on ONNX Runtime's CPU kernels."""

from __future__ import annotations

from pathlib import Path

import torch

from nvlm.inputs.tiling import normalize
from nvlm.program.errors import UserError
from nvlm.program.onnxruntime_package import onnxruntime
from runtime.vision.executor import check_tiles

_NUMPY_TYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}


class OnnxRuntimeVisionExecutor:
    def __init__(self, path: Path, max_num_tiles: int) -> None:
        self.max_num_tiles = max_num_tiles
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only: warnings are about the exporter's style
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # the binding's exceptions have no common public base
            raise UserError(
                f"{path} cannot be loaded by ONNX Runtime {onnxruntime.__version__}: {error}; "
                "build the engine again"
            ) from error
        (self._input,), (self._output,) = self._session.get_inputs(), self._session.get_outputs()
        self._image_size: int = self._input.shape[2]
        self._dtype = _NUMPY_TYPES[self._input.type]

    def encode(self, tiles: torch.Tensor) -> torch.Tensor:
        check_tiles(tiles, self._image_size)
        batches = tiles.split(self.max_num_tiles)
        return torch.cat([self._run(normalize(batch).to(self._dtype)) for batch in batches])

    def _run(self, tiles: torch.Tensor) -> torch.Tensor:
        feed = {self._input.name: tiles.numpy()}
        return torch.from_numpy(self._session.run([self._output.name], feed)[0])

    def close(self) -> None:
        del self._session
