"""`VisionExecutor` over the model `vision` of the same Triton server."""

from __future__ import annotations

import torch

from frontends.triton.models.channel import Channel, remote_error, to_request, to_tensor
from nvlm.model.dtypes import TORCH_DTYPES
from runtime.engine.engine_dir import EngineDir


class RemoteVisionExecutor:
    def __init__(self, engine: EngineDir, url: str) -> None:
        self.max_num_tiles = engine.tiling.max_tiles_per_image
        self._dtype = TORCH_DTYPES[engine.checkpoint_config.dtype]
        self._channel = Channel(url)

    def encode(self, tiles: torch.Tensor) -> torch.Tensor:
        request = to_request("vision", {"tiles": tiles}, ("image_embeddings",))
        try:
            response = self._channel.stub.ModelInfer(request)
        except Exception as error:
            raise remote_error(error) from None
        return to_tensor(response, self._dtype)

    def close(self) -> None:
        self._channel.close()
