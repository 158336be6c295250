"""`VisionExecutor` on PyTorch, in the precision the engine was built for."""

from __future__ import annotations

import torch

from nvlm.vision_model import VisionModel
from runtime.vision.executor import check_tiles


class TorchVisionExecutor:
    def __init__(self, model: VisionModel, max_num_tiles: int) -> None:
        self.max_num_tiles = max_num_tiles
        self._model = model
        patch = model.vision_model.embeddings.patch_embedding
        self._image_size = model.patches_per_side * patch.kernel_size[0]
        self._weight = patch.weight

    @torch.inference_mode()
    def encode(self, tiles: torch.Tensor) -> torch.Tensor:
        check_tiles(tiles, self._image_size)
        tiles = tiles.to(self._weight.device, self._weight.dtype)
        return torch.cat([self._model(batch) for batch in tiles.split(self.max_num_tiles)])

    def close(self) -> None:
        """Nothing is held beyond memory."""
