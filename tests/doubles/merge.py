"""The one-rank decoder that the files of several tensor and pipeline parallel ranks make up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_ROWS = ("mlp.fc.weight", "mlp.gate.weight", "lm_head.weight")
_COLUMNS = ("attention.dense.weight", "mlp.proj.weight")


def merge_ranks(checkpoint_dir: Path, config: dict[str, Any], target: Path) -> None:
    """Writes `target`, a rank0.safetensors of tp_size 1 and pp_size 1."""
    tp, pp = config["mapping"]["tp_size"], config["mapping"]["pp_size"]
    ranks = [load_file(checkpoint_dir / f"rank{rank}.safetensors") for rank in range(tp * pp)]
    per_stage = config["num_hidden_layers"] // pp
    merged = {}
    for stage in range(pp):
        parts = ranks[stage * tp : (stage + 1) * tp]
        for name in parts[0]:
            whole = _merge(name, [part[name] for part in parts], config)
            merged[_global_name(name, stage * per_stage)] = whole
    merged["lm_head.weight"] = merged["lm_head.weight"][: config["vocab_size"]].contiguous()
    save_file(merged, target)


def _global_name(name: str, first_layer: int) -> str:
    head, _, rest = name.partition("layers.")
    if not rest:
        return name
    index, _, tail = rest.partition(".")
    return f"{head}layers.{int(index) + first_layer}.{tail}"


def _merge(name: str, parts: list[torch.Tensor], config: dict[str, Any]) -> torch.Tensor:
    bytewise = [part.view(torch.uint8) if part.itemsize == 1 else part for part in parts]
    if "attention.qkv." in name and not name.endswith("scaling_factor"):
        whole = _merge_qkv(bytewise, config)
    elif name.endswith(_ROWS):
        whole = torch.cat(bytewise)
    elif name.endswith(_COLUMNS):
        whole = torch.cat(bytewise, dim=1)
    else:
        assert all(torch.equal(part, bytewise[0]) for part in bytewise), f"{name} differs"
        whole = bytewise[0]
    return whole.view(parts[0].dtype).contiguous()


def _merge_qkv(parts: list[torch.Tensor], config: dict[str, Any]) -> torch.Tensor:
    """Each rank has [q; k; v]; a key or value head on several ranks is taken once."""
    tp, d = len(parts), config["head_size"]
    heads, kv_heads = config["num_attention_heads"] // tp, config["num_key_value_heads"]
    copies = max(1, tp // kv_heads)
    kv = max(kv_heads, tp) // tp * d
    split = [part.split((heads * d, kv, kv)) for part in parts]
    return torch.cat([q for q, _, _ in split] + [s[i] for i in (1, 2) for s in split[::copies]])
