"""InternViT and NVLM-D's projector: tiles to image embeddings.

Follows modeling_intern_vit.py and modeling_nvlm_d.py of nvidia/NVLM-D-72B (InternVL, arXiv
2312.14238; NVLM, arXiv 2409.11402). Parameter names are the published ones, so a state dict is a
tensor list of the checkpoint. The modules trace to ONNX; FP8 is a replaced linear.
"""

from __future__ import annotations

import torch
from torch import nn

from nvlm.model.config import VisionConfig
from nvlm.model.number_formats import FP8, NumberFormat

VISION_LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
"""The linears of a layer that may be quantised."""

VISION_FORMAT: NumberFormat = FP8
"""What in. A checkpoint stores the weights unquantised and this format's scales beside them."""


class RMSNorm(nn.Module):
    """float32 inside, cast to x's dtype, then times the weight (InternRMSNorm's order).

    `num_real_channels` gives the channels the variance is taken over: all heads together and real
    ones only, so zero dummy heads after them do not dilute it.
    """

    def __init__(self, size: int, eps: float, num_real_channels: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps
        self.num_real_channels = num_real_channels or size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x32 = x.to(torch.float32)
        real = x32[..., : self.num_real_channels]
        x32 = x32 * torch.rsqrt(real.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


class Attention(nn.Module):
    """Full attention over a tile's positions, with q and k normalised over all heads jointly."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.qkv = nn.Linear(config.hidden_size, 3 * config.attention_size, bias=False)
        self.q_norm = RMSNorm(config.attention_size, config.norm_eps, config.hidden_size)
        self.k_norm = RMSNorm(config.attention_size, config.norm_eps, config.hidden_size)
        self.proj = nn.Linear(config.attention_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # each [num_tiles, positions, heads * head_dim]
        q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        attended = nn.functional.scaled_dot_product_attention(q, k, v)  # [n, heads, pos, d]
        return self.proj(attended.transpose(1, 2).flatten(2))


def linear_of(module: nn.Module, name: str) -> nn.Linear:
    """The linear called `name` inside `module`."""
    linear = module.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


class MLP(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))  # exact (erf) GELU


class VisionLayer(nn.Module):
    """Pre-norm block with layer scale `ls1`, `ls2`."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn = Attention(config)
        self.ls1 = nn.Parameter(torch.empty(config.hidden_size))
        self.norm2 = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)
        self.ls2 = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x)) * self.ls1
        return x + self.mlp(self.norm2(x)) * self.ls2


def cut_patches(tiles: torch.Tensor, patch_size: int) -> torch.Tensor:
    """[n, 3, S, S] -> [n, patches, 3 * patch_size^2], row by row, each in the order of a
    convolution's kernel."""
    side = tiles.shape[-1] // patch_size
    cut = tiles.unflatten(3, (side, patch_size)).unflatten(2, (side, patch_size))
    patches = cut.permute(0, 2, 4, 1, 3, 5)  # [n, side, side, 3, patch_size, patch_size]
    return patches.flatten(3).flatten(1, 2)


class Embeddings(nn.Module):
    """Patches row by row after the class token, plus learned positions."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(1, 1, size))
        self.patch_embedding = nn.Conv2d(3, size, kernel_size=patch, stride=patch)
        self.position_embedding = nn.Parameter(torch.empty(1, config.num_positions, size))

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        """tiles: [num_tiles, 3, S, S] -> [num_tiles, 1 + patches, hidden_size]."""
        # The convolution's stride is its size, so it is a product over cut-out patches; written
        # so, no cuDNN setting turns float32 into TF32.
        pixels = cut_patches(tiles, self.patch_embedding.kernel_size[0])
        weight, bias = self.patch_embedding.weight, self.patch_embedding.bias
        patches = nn.functional.linear(pixels, weight.flatten(1), bias)
        class_token = self.class_embedding.expand(tiles.shape[0], -1, -1)
        return torch.cat((class_token, patches), dim=1) + self.position_embedding


def pixel_shuffle(x: torch.Tensor) -> torch.Tensor:
    """Merges 2 x 2 cells: [n, side, side, C] -> [n, side / 2, side / 2, 4 C] (ps_version "v2").

    Channel order of an output cell: top left, top right, bottom left, bottom right.
    """
    n, side, _, channels = x.shape
    half = side // 2
    x = x.reshape(n, half, 2, half, 2, channels)  # row, row in cell, column, column in cell
    return x.transpose(2, 3).reshape(n, half, half, 4 * channels)


def projector(config: VisionConfig) -> nn.Sequential:
    """`mlp1`: LayerNorm with bias, linear, exact GELU, linear; both linears without bias."""
    return nn.Sequential(
        nn.LayerNorm(config.projector_input_size, eps=config.projector_norm_eps),
        nn.Linear(config.projector_input_size, config.projector_hidden_size, bias=False),
        nn.GELU(),
        nn.Linear(config.projector_hidden_size, config.output_size, bias=False),
    )


class Encoder(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class InternViT(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        return self.encoder(self.embeddings(tiles))


class VisionModel(nn.Module):
    """tiles [num_tiles, 3, S, S] normalised -> image embeddings [num_tiles, tokens, output_size].

    In and out have the parameters' dtype.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patches_per_side = config.patches_per_side
        self.vision_model = InternViT(config)
        self.mlp1 = projector(config)

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_tiles, 1 + patches, hidden_size] -> [num_tiles, tokens_per_tile, output_size]."""
        patches = hidden[:, 1:]  # the class token is dropped
        side = self.patches_per_side
        return self.mlp1(pixel_shuffle(patches.unflatten(1, (side, side))).flatten(1, 2))

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        return self.project(self.vision_model(tiles))
