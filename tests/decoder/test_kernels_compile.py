"""Triton compiles every kernel for sm_90 at the widths of the 72B model, without a GPU: it fits a
Hopper multiprocessor's shared memory, and the FP8 products are Hopper's own instructions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

MAX_SHARED_BYTES = 232_448  # of a program on compute capability 9.0 (CUDA C++ Programming Guide)

PROMPTS_ALONE = ("quantize_tensor", "load_ahead", "change_logits")
"""Kernels that no graph of a decoder's step launches after another one."""

# In a process of its own: test_kernels.py may have put the interpreter in the compiler's place.
_PROGRAM = """
import json, re, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from runtime.decoder.kernels import all_reduce_norm, change_logits, chunk_attention
from runtime.decoder.kernels import decode_attention, elementwise, gate_up_swiglu
from runtime.decoder.kernels import gather_contexts, rank_exchange, rope
from runtime.decoder.kernels.operands import tile_tokens
from nvlm.planning.hopper import CONTEXT_STEP
from runtime.kernels import load_ahead, quantization
from runtime.vision.kernels import elementwise as vision, embeddings, merging

BF16, F32, E4M3, I32, I64 = "*bf16", "*fp32", "*fp8e4nv", "*i32", "*i64"
POINTERS = {
    "hidden": BF16, "delta": BF16, "weight": BF16, "scale": F32, "new_hidden": BF16,
    "normed": E4M3, "gate_up": BF16, "product": E4M3, "qkv": BF16, "cos": F32, "sin": F32,
    "slots": I64, "k_cache": E4M3, "v_cache": E4M3, "k_scale": F32, "v_scale": F32, "q_out": BF16,
    "block_tables": I32, "positions": I32, "out": E4M3, "partial_sums": F32, "partial_stats": F32,
    "counters": I32, "x": E4M3, "y": BF16, "eps": "fp32", "exponent_scale": "fp32",
    "product_scale": F32, "blocks": I64, "k_out": BF16, "v_out": BF16,
    "layer_scale": BF16, "q_weight": BF16, "k_weight": BF16, "distances": I64, "part": F32,
    "flags": I32, "epochs": I32, "columns": F32, "whole": F32,
    "tokens": I64, "place": I64,
}
ALIGNED = ("size", "K", "num_columns")

def split_pairs(ptx):
    pairs = re.findall("cvt[.a-z0-9]*e4m3x2[.]f32 *(%rs[0-9]+)", ptx)
    return sum(bool(re.search("shr[.]u16[^;]*" + pair + ", 8;", ptx)) for pair in pairs)

def loops(ptx):
    for label in re.finditer("^([$]L[_a-zA-Z0-9]+):", ptx, re.M):
        back = re.search("bra[^;]*" + re.escape(label[1]) + ";", ptx[label.end():])
        if back:
            yield ptx[label.end():label.end() + back.start()]

def compile_(function, constants, types={}, **options):
    signature = {}
    for name in function.arg_names:
        signature[name] = {**POINTERS, **types}.get(name, "i32")
        if name in constants:
            signature[name] = "constexpr"
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in ALIGNED
    }
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = kernel.asm["ptx"]
    return {"shared_bytes": kernel.metadata.shared, "wgmma": ptx.count("wgmma.mma_async"),
            "cp_async": ptx.count("cp.async.cg"), "tma": ptx.count("cp.async.bulk.tensor"),
            "bytes_one_by_one": sum(body.count("ld.shared.b8") + body.count("mov.b16")
                              for body in loops(ptx)),
            "split_pairs": split_pairs(ptx),
            "waits": ptx.count("griddepcontrol.wait"),
            "global_bytes": len(re.findall(r"(?:ld|st)[.a-z]*[.]global[.a-z0-9]*[.]b8", ptx)),
            "cubin_bytes": len(kernel.asm["cubin"])}

found = {
    "add_rms_norm": compile_(elementwise._add_rms_norm,
        {"HAS_DELTA": True, "QUANTIZE": True, "BLOCK": 8192, "ON_GPU": True}, num_warps=8),
    "swiglu_quantize": compile_(elementwise._swiglu_quantize,
        {"BLOCK": 1024, "ON_GPU": True}),
    "quantize_tensor": compile_(quantization._quantize_tensor, {"BLOCK": 2048},
        {"x": BF16, "y": E4M3}),
    "vision add_rms_norm": compile_(vision._add_rms_norm,
        {"HAS_DELTA": True, "QUANTIZE": True, "BLOCK": 4096}, num_warps=8),
    "vision normalize_qk": compile_(vision._normalize_qk, {"BLOCK": 4096}, num_warps=8),
    "vision gelu": compile_(vision._gelu, {"QUANTIZE": True, "BLOCK": 4096},
        {"x": BF16, "y": E4M3}),
    "vision cut_patches": compile_(embeddings._cut_patches, {"PATCH": 14, "BLOCK": 1024},
        {"tiles": "*u8", "out": BF16}
        | dict.fromkeys(("mean0", "mean1", "mean2", "std0", "std1", "std2"), "fp32")),
    "vision embed": compile_(embeddings._embed, {"BLOCK": 4096},
        dict.fromkeys(("patches", "class_token", "positions", "out"), BF16)),
    "vision add_merge_norm": compile_(merging._add_merge_norm, {"BLOCK": 4096},
        {"bias": BF16, "out": BF16}, num_warps=16),
    "rope_append": compile_(rope._rope_append,
        {"HEAD_DIM": 128, "TOKENS": 32, "BLOCK_HEADS": 8, "BLOCK_HALF": 64, "ON_GPU": True}),
    "gate_up_swiglu": compile_(gate_up_swiglu._gate_up_swiglu,
        {"ROWS": gate_up_swiglu.MAX_ROWS, "COLUMNS": gate_up_swiglu.TILE_COLUMNS, "DEPTH": 256,
         "NUM_UNITS_EARLY": 4, "SECTOR_BYTES": 32, "ON_GPU": True,
         "DTYPE": triton.language.bfloat16}, {"weight": E4M3}, num_stages=5),
    "change_logits": compile_(change_logits._change_logits,
        {"HAS_COUNTS": True, "COUNT_DRAWN": 2, "BLOCK": change_logits.CHUNK, "PAIRS": 32},
        {"logits": F32, "changed": F32, "places": I32, "row_slots": I64, "penalties": F32,
         "counts": I32, "starts": I32, "pair_tokens": I64, "biases": F32, "bans": F32},
        num_warps=8, enable_fp_fusion=False),
    "load_ahead": compile_(load_ahead._load_ahead, {"LANES": 256, "AT_A_TIME": 4},
        {"weight": E4M3}, num_warps=8),
    "gather_columns": compile_(rank_exchange._gather_columns,
        {"RANKS": 8, "BLOCK": 4096, "ON_GPU": True}, num_warps=8),
    "share_tokens": compile_(rank_exchange._share_tokens,
        {"RANKS": 8, "BLOCK": 256, "ON_GPU": True}, num_warps=1),
}
for ranks in (2, 8):
    for way, shots in (("pulled", 1), ("pulled", 2), ("pushed", 2)):
        found[f"all_reduce_norm {ranks} {way} {shots}"] = compile_(
            all_reduce_norm._all_reduce_norm,
            {"RANKS": ranks, "TWO_SHOTS": shots == 2, "IS_PUSHED": way == "pushed",
             "QUANTIZE": True, "BLOCK": 8192, "ON_GPU": True}, num_warps=32 // shots)
bf16_cache = {"k_cache": BF16, "v_cache": BF16}
no_scales = {"k_scale": None, "v_scale": None}
found["rope_append bf16"] = compile_(rope._rope_append,
    {"HEAD_DIM": 128, "TOKENS": 32, "BLOCK_HEADS": 8, "BLOCK_HALF": 64, "ON_GPU": True}
    | no_scales, bf16_cache)
for splits, batch_size, name in ((16, 1, ""), (2, 64, ""), (16, 1, " bf16"), (2, 64, " bf16")):
    types, dtype = (bf16_cache, torch.bfloat16) if name else ({}, torch.float8_e4m3fn)
    step = decode_attention.step_for(batch_size, dtype)
    found[f"decode_attention {batch_size}{name}"] = compile_(decode_attention._decode_attention,
        {"KV_HEADS": 8, "GROUP": 8, "HEAD_DIM": 128, "TOKENS": 32, "QUANTIZE": True,
         "NUM_SPLITS": splits, "BLOCK_ROWS": 8, "BLOCK_DIM": 128, "ON_GPU": True,
         "BLOCK_TOKENS": step.num_tokens, **(no_scales if name else {})},
        types, num_warps=step.num_warps, num_stages=step.num_stages)
    splits = 4 if batch_size == 1 else 1  # of a context
    descriptor = f"tensordesc<{'bf16' if name else 'fp16'}[{CONTEXT_STEP},128]>"
    found[f"chunk_attention {splits}{name}"] = compile_(chunk_attention._chunk_attention,
        {"KV_HEADS": 8, "GROUP": 8, "HEAD_DIM": 128, "QUANTIZE": True, "NUM_SPLITS": splits,
         "GROUP_ROWS": 8, "TILE_TOKENS": tile_tokens(8), "BLOCK_DIM": 128,
         "BLOCK_TOKENS": CONTEXT_STEP, "ON_GPU": True, **(no_scales if name else {})},
        {"q": BF16, "tiles": I32, "k_context": descriptor, "v_context": descriptor},
        num_warps=4, num_stages=3)
    wide = BF16 if name else "*fp16"
    found[f"gather_contexts{name}"] = compile_(gather_contexts._gather_contexts,
        {"KV_HEADS": 8, "TOKENS": 32, "HEAD_DIM": 128, "BLOCK_DIM": 128, "IS_FP8": not name,
         "ON_GPU": True},
        types | {"context_pages": I32, "num_pages": I32, "k_out": wide, "v_out": wide})
print(json.dumps(found))
"""


@pytest.mark.slow
def test_every_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        cwd=Path(__file__).parents[2],
        env={"PATH": "/usr/bin:/bin", "TRITON_CACHE_DIR": str(tmp_path), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    assert len(found) == 32
    for name, kernel in found.items():
        assert kernel["cubin_bytes"] > 0, name
        assert kernel["shared_bytes"] <= MAX_SHARED_BYTES, name
        assert kernel["split_pairs"] == 0, f"{name}: ptxas 12.8 may read half a pair too early"
        is_of_a_step = "vision" not in name and not name.startswith(PROMPTS_ALONE)
        assert kernel["waits"] == is_of_a_step, f"{name}: programmatic dependent launch"
        if "_norm " in name:
            assert kernel["global_bytes"] == 0, f"{name} reads or writes its peers by bytes"
        if name.startswith("decode_attention"):
            assert kernel["cp_async"] > 0, f"{name} does not load ahead"
            is_wide = name.endswith("bf16")  # has halves to take apart, no bytes
            assert is_wide or kernel["bytes_one_by_one"] == 0, f"{name} gathers values by bytes"
        if name.startswith("gather_contexts"):
            assert kernel["bytes_one_by_one"] == 0, f"{name} takes numbers apart"
        if name.startswith("chunk_attention"):
            assert kernel["wgmma"] > 0, f"{name} misses Hopper's tensor cores"
            assert kernel["tma"] > 0, f"{name} does not load by TMA"
            assert kernel["shared_bytes"] <= MAX_SHARED_BYTES // 2, "two programs a multiprocessor"
        if name == "gate_up_swiglu":
            assert kernel["wgmma"] > 0, f"{name} misses Hopper's tensor cores"
            assert kernel["cp_async"] > 0, f"{name} does not load ahead"
            assert kernel["shared_bytes"] <= MAX_SHARED_BYTES // 2, "two programs a multiprocessor"
