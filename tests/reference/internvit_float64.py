"""Oracle of the vision path: InternViT-6B, pixel shuffle v2 and projector in float64 numpy.

In: a `model_dir` (Hugging Face layout) and normalised tiles. Out: image embeddings. It knows
neither images nor prompts. Source: modeling_intern_vit.py and extract_feature and pixel_shuffle of
modeling_nvlm_d.py in nvidia/NVLM-D-72B. The dummy heads stay exactly as stored; how many heads are
stored is read off the rows of qkv.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .safetensors_numpy import Weights, read_config, read_weights


def encode_tiles(
    model_dir: Path,
    tiles: np.ndarray,
    *,
    projector_norm_eps: float = 1e-5,
    weight_dtype: torch.dtype | None = None,
) -> np.ndarray:
    """Image embeddings [num_tiles, tokens_per_tile, llm_hidden], float64, tokens row-major.

    tiles: [num_tiles, 3, S, S], normalised. `weight_dtype` rounds the stored weights first
    (torch.bfloat16 is the checkpoint's cast); None takes them as stored.
    """
    config = read_config(model_dir)
    assert (config["ps_version"], config["downsample_ratio"]) == ("v2", 0.5), "not pixel shuffle v2"
    assert config["select_layer"] == -1, "only the last hidden state is implemented"
    patches = encode_patches(model_dir, tiles, weight_dtype=weight_dtype)
    w = read_weights(model_dir, "mlp1.", weight_dtype)
    cells = pixel_shuffle(patches)
    centred = cells - cells.mean(-1, keepdims=True)
    normed = centred / np.sqrt(cells.var(-1, keepdims=True) + projector_norm_eps)
    hidden = (normed * w["0.weight"] + w["0.bias"]) @ w["1.weight"].T
    return gelu(hidden) @ w["3.weight"].T


def encode_patches(
    model_dir: Path, tiles: np.ndarray, *, weight_dtype: torch.dtype | None = None
) -> np.ndarray:
    """The ViT alone, class token dropped: [num_tiles, side, side, hidden], side = S / 14."""
    config = read_config(model_dir)["vision_config"]
    w = read_weights(model_dir, "vision_model.", weight_dtype)
    hidden = _embed(w, np.asarray(tiles, dtype=np.float64), config["patch_size"])
    with ThreadPoolExecutor(2) as pool:  # numpy's exp is single-threaded and dominates
        for layer in range(config["num_hidden_layers"]):
            prefix = f"encoder.layers.{layer}."
            own = {k.removeprefix(prefix): v for k, v in w.items() if k.startswith(prefix)}
            hidden = np.stack(list(pool.map(partial(_layer, own, config), hidden)))
    side = tiles.shape[-1] // config["patch_size"]
    return hidden[:, 1:].reshape(len(tiles), side, side, -1)


def pixel_shuffle(patches: np.ndarray) -> np.ndarray:
    """[n, A, A, c] -> [n, (A/2)^2, 4c]: cell (r, s) gathers its 2 x 2 patches, row-major."""
    side = patches.shape[1]
    return np.stack(
        [
            np.concatenate(
                [
                    patches[:, 2 * r, 2 * s],
                    patches[:, 2 * r, 2 * s + 1],
                    patches[:, 2 * r + 1, 2 * s],
                    patches[:, 2 * r + 1, 2 * s + 1],
                ],
                axis=-1,
            )
            for r in range(side // 2)
            for s in range(side // 2)
        ],
        axis=1,
    )


def gelu(x: np.ndarray) -> np.ndarray:
    """Exact GELU, any shape: x times the normal distribution function, 1 + erf(z) = erfc(-z)."""
    z = torch.from_numpy(np.ascontiguousarray(x / math.sqrt(2)))  # numpy has no erfc
    return x * torch.special.erfc(-z).numpy() / 2


def _embed(w: Weights, tiles: np.ndarray, patch_size: int) -> np.ndarray:
    """[n, 3, S, S] -> [n, 1 + side^2, hidden]; the convolution as one dot product per patch."""
    side, rest = divmod(tiles.shape[-1], patch_size)
    positions = w["embeddings.position_embedding"][0]
    assert (rest, len(positions)) == (0, side * side + 1), f"tiles {tiles.shape} do not fit"
    kernel = w["embeddings.patch_embedding.weight"]
    kernel = kernel.reshape(len(kernel), -1)  # [hidden, 3 * patch^2]
    hidden = np.empty((len(tiles), side * side + 1, len(kernel)))
    hidden[:, 0] = w["embeddings.class_embedding"][0, 0]
    for index in range(side * side):
        top, left = (patch_size * k for k in divmod(index, side))
        patch = tiles[:, :, top : top + patch_size, left : left + patch_size]
        hidden[:, 1 + index] = patch.reshape(len(tiles), -1) @ kernel.T
    hidden[:, 1:] += w["embeddings.patch_embedding.bias"]
    return hidden + positions


def _layer(w: Weights, config: dict[str, Any], tokens: np.ndarray) -> np.ndarray:
    """One pre-norm layer on one tile: tokens [num_tokens, hidden]."""
    eps = config["layer_norm_eps"]
    normed = _rms_norm(tokens, w["norm1.weight"], eps, tokens.shape[-1])
    tokens = tokens + w["ls1"] * _attention(w, config, normed)
    normed = _rms_norm(tokens, w["norm2.weight"], eps, tokens.shape[-1])
    inner = gelu(normed @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"])
    return tokens + w["ls2"] * (inner @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"])


def _attention(w: Weights, config: dict[str, Any], tokens: np.ndarray) -> np.ndarray:
    """Attention of one tile over all stored heads; the q/k norm is joint, not per head."""
    real = config["hidden_size"]  # variance over the real heads' channels, the first ones
    head_dim = real // config["num_attention_heads"]
    q, k, v = np.split(tokens @ w["attn.qkv.weight"].T, 3, axis=-1)
    q = _rms_norm(q, w["attn.q_norm.weight"], config["layer_norm_eps"], real)
    k = _rms_norm(k, w["attn.k_norm.weight"], config["layer_norm_eps"], real)
    mixed = np.empty_like(v)  # [num_tokens, stored_heads * head_dim]
    for start in range(0, v.shape[-1], head_dim):
        head = slice(start, start + head_dim)
        scores = (q[:, head] / math.sqrt(head_dim)) @ k[:, head].T
        scores -= scores.max(-1, keepdims=True)
        np.exp(scores, out=scores)
        mixed[:, head] = (scores @ v[:, head]) / scores.sum(-1, keepdims=True)
    return mixed @ w["attn.proj.weight"].T + w["attn.proj.bias"]


def _rms_norm(x: np.ndarray, weight: np.ndarray, eps: float, num_real: int) -> np.ndarray:
    variance = np.square(x[..., :num_real]).sum(-1, keepdims=True) / num_real
    return x / np.sqrt(variance + eps) * weight
