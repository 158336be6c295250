"""The vision encoder as a model of its own, for the form whose decoder is a C++ backend."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import triton_python_backend_utils as pb_utils
from torch.utils.dlpack import from_dlpack

from frontends.triton.models.heartbeat import Heartbeat
from nvlm.model.dtypes import TORCH_DTYPES
from nvlm.program.command_line import resolve_device
from nvlm.program.errors import UserError
from runtime.engine.engine_dir import EngineDir
from runtime.engine.libraries import set_up_libraries
from runtime.vision.executor import create_vision_executor


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        parameters = {k: v["string_value"] for k, v in config["parameters"].items()}
        if num_threads := int(parameters["num_threads"]):
            torch.set_num_threads(num_threads)
        try:
            engine = EngineDir.read(Path(parameters["engine_dir"]))
            device = resolve_device(parameters["device"])
            set_up_libraries(engine, device, os.environ)
            self._executor = create_vision_executor(engine, device)
        except UserError as error:
            raise pb_utils.TritonModelException(str(error)) from None
        # The decoder takes its prompt table in its own dtype only.
        self._dtype = TORCH_DTYPES[engine.checkpoint_config.dtype]
        self._heartbeat = Heartbeat(parameters["pipe"])

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._encode(request) for request in requests]

    def finalize(self) -> None:
        self._heartbeat.leave()
        self._executor.close()

    def _encode(self, request: Any) -> Any:
        """tiles [num_tiles, S, S, 3] uint8 -> image_embeddings [num_tiles, tokens_per_tile,
        hidden_size]."""
        tensor = pb_utils.get_input_tensor_by_name(request, "tiles")
        try:
            tiles = from_dlpack(tensor.to_dlpack())
            embeddings = self._executor.encode(tiles).to(self._dtype).contiguous()
        except Exception as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
        output = pb_utils.Tensor.from_dlpack("image_embeddings", embeddings)
        return pb_utils.InferenceResponse(output_tensors=[output])
