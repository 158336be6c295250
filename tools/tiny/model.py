"""The small NVLM-D while it is trained, and its export to the published layout.

Vision is the project's own `VisionModel` without dummy heads, the decoder Hugging Face's Qwen2. The
linears called `*_labels` serve dense training losses and are not exported.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from nvlm.formats import layout
from nvlm.formats.safetensors_reader import SafetensorsReader
from nvlm.formats.tensor_names import DECODER_PREFIX, StoredTensor
from nvlm.model.config import NVLMConfig
from nvlm.model.vision import RMSNorm, VisionLayer, VisionModel
from tools.model_dir import Shape, model_config, write_model_dir
from tools.tiny.compositor import NUM_LABELS
from tools.tiny.questions import COLOURS
from tools.tiny.scene import MAX_CHARACTERS

TINY = Shape(
    vision_hidden_size=256,
    vision_intermediate_size=1024,
    vision_num_hidden_layers=6,
    vision_num_attention_heads=16,
    image_size=224,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=5,
    num_attention_heads=8,
    num_key_value_heads=4,
    vocab_size=512,
)
NO_INDEX = 2 * MAX_CHARACTERS
"""Class of image tokens that lie on no character, after those of both lines."""
NUM_TILE_LABELS = 7
NUM_COLOURS = len(COLOURS)
TOKEN_LABELS = (NUM_LABELS, NO_INDEX + 1, NUM_TILE_LABELS, NUM_COLOURS)
"""Classes of the image tokens' dense losses: content, index, tile, colour."""
_LABELLED_LAYER = 3
"""Decoder layers before the dense losses, so that later layers can use what they teach."""
_PROBED_LAYER = 4
"""Decoder layers before a probe names its tile: one layer is left to pass that on."""
_SHARD_BYTES = 12_000_000


class TinyNVLM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config: NVLMConfig = model_config(TINY)
        vision = replace(self.config.vision, num_dummy_heads=0)
        self.vision = VisionModel(vision)
        self.decoder = Qwen2ForCausalLM(_qwen2_config(self.config))
        self.patch_labels = nn.Linear(vision.hidden_size, NUM_LABELS + NUM_COLOURS)
        size = self.config.decoder.hidden_size
        self.token_labels = nn.Linear(size, sum(TOKEN_LABELS))
        self.probe_labels = nn.Linear(size, NUM_TILE_LABELS)
        self._initialise()

    def _initialise(self) -> None:
        embeddings = self.vision.vision_model.embeddings
        nn.init.normal_(embeddings.class_embedding, std=0.02)
        nn.init.normal_(embeddings.position_embedding, std=0.02)
        for module in self.vision.modules():
            if isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, VisionLayer):
                nn.init.constant_(module.ls1, 0.5)
                nn.init.constant_(module.ls2, 0.5)

    def decode(
        self, token_ids: Tensor, image_embeddings: Tensor | None, first_rows: list[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Last hidden states [B, T, H], the image tokens' labelled ones and the probed ones.

        token_ids: [B, T]; image_embeddings: [B, tiles, tokens, H] in the order of the prompt;
        first_rows: position of each tile's first token, the same for all of the batch.
        """
        vocab_size = self.config.decoder.vocab_size
        inputs = self.decoder.get_input_embeddings()(token_ids.clamp(max=vocab_size - 1))
        positions = torch.zeros(0, dtype=torch.int64, device=token_ids.device)
        if image_embeddings is not None:
            first = torch.tensor(first_rows, device=token_ids.device)[:, None]
            tokens = torch.arange(image_embeddings.shape[2], device=token_ids.device)
            positions = (first + tokens).flatten()
            rows = image_embeddings.flatten(1, 2).to(inputs.dtype)
            inputs = inputs.index_copy(1, positions, rows)
        output = self.decoder.model(
            inputs_embeds=inputs, output_hidden_states=True, use_cache=False
        )
        labelled = output.hidden_states[_LABELLED_LAYER].index_select(1, positions)
        return output.last_hidden_state, labelled, output.hidden_states[_PROBED_LAYER]


def _qwen2_config(config: NVLMConfig) -> Qwen2Config:
    values = asdict(config.decoder)
    theta = values.pop("rope_theta")
    return Qwen2Config(
        **values,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        tie_word_embeddings=False,
    )


def export(model: TinyNVLM, model_dir: Path) -> None:
    """Writes weights and config.json in the published layout, with zero dummy heads."""
    state = {
        name: value.detach().float().cpu() for name, value in model.vision.state_dict().items()
    }
    for name, value in model.decoder.state_dict().items():
        state[DECODER_PREFIX + name] = value.detach().float().cpu()

    def blocks_of(tensor: StoredTensor) -> list[Tensor]:
        return [_with_dummy_heads(tensor, state[tensor.name]).to(tensor.dtype)]

    write_model_dir(model_dir, TINY, blocks_of, _SHARD_BYTES)


def _with_dummy_heads(tensor: StoredTensor, value: Tensor) -> Tensor:
    """Zero rows after the real heads of q, k and v, zero columns of the projection."""
    if value.shape == tensor.shape:
        return value
    padded = torch.zeros(tensor.shape)
    if tensor.name.endswith("qkv.weight"):
        real = value.unflatten(0, (3, -1))
        padded.view(3, -1, padded.shape[1])[:, : real.shape[1]] = real
    elif tensor.name.endswith("proj.weight"):
        padded[:, : value.shape[1]] = value
    else:
        padded[: len(value)] = value
    return padded


def load_exported(model: TinyNVLM, model_dir: Path) -> None:
    """Takes over the weights of an exported model; the dense losses' linears start anew."""
    stored: dict[str, Tensor] = {}
    for path in sorted(model_dir.glob(layout.ANY_WEIGHTS)):
        reader = SafetensorsReader(path)
        stored |= {name: reader.read(name).float() for name in reader.tensors}
    vision = {
        name: _without_dummy_heads(name, stored[name], value)
        for name, value in model.vision.state_dict().items()
    }
    model.vision.load_state_dict(vision)
    decoder = model.decoder.state_dict()
    model.decoder.load_state_dict({name: stored[DECODER_PREFIX + name] for name in decoder})


def _without_dummy_heads(name: str, stored: Tensor, like: Tensor) -> Tensor:
    if name.endswith("qkv.weight"):
        real = len(like) // 3
        return stored.view(3, -1, stored.shape[1])[:, :real].flatten(0, 1)
    return stored[tuple(slice(0, size) for size in like.shape)]
