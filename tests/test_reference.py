"""Checks the references of tests/reference against each other, other libraries and known facts.

It never imports the product: a red test here means that an oracle is wrong.
"""

import json
import math
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.reference import (
    fp8_e4m3,
    internvit_float64,
    prompts,
    qwen2_float64,
    qwen2_hugging_face,
    qwen_vocabulary,
    tiling,
)

NUM_DUMMY_HEADS = 7
VISION = {
    "hidden_size": 48,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "image_size": 56,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
}
LLM = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "vocab_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "dynamic", "factor": 3.0},
    "rms_norm_eps": 1e-6,
}
CONFIG = {
    "ps_version": "v2",
    "downsample_ratio": 0.5,
    "select_layer": -1,
    "vision_config": VISION,
    "llm_config": LLM,
}


def _shapes(num_dummy_heads: int) -> dict[str, tuple[int, ...]]:
    hidden, inner = VISION["hidden_size"], VISION["intermediate_size"]
    stored = hidden // VISION["num_attention_heads"] * (3 + num_dummy_heads)
    shapes: dict[str, tuple[int, ...]] = {
        "vision_model.embeddings.class_embedding": (1, 1, hidden),
        "vision_model.embeddings.patch_embedding.weight": (hidden, 3, 14, 14),
        "vision_model.embeddings.patch_embedding.bias": (hidden,),
        "vision_model.embeddings.position_embedding": (1, 17, hidden),
        "mlp1.0.weight": (4 * hidden,),
        "mlp1.0.bias": (4 * hidden,),
        "mlp1.1.weight": (LLM["intermediate_size"], 4 * hidden),
        "mlp1.3.weight": (LLM["hidden_size"], LLM["intermediate_size"]),
        "language_model.model.embed_tokens.weight": (160, 64),
        "language_model.lm_head.weight": (160, 64),
        "language_model.model.norm.weight": (64,),
    }
    for layer in range(2):
        vit = {
            **dict.fromkeys(("norm1.weight", "norm2.weight", "ls1", "ls2"), (hidden,)),
            "attn.qkv.weight": (3 * stored, hidden),
            "attn.q_norm.weight": (stored,),
            "attn.k_norm.weight": (stored,),
            "attn.proj.weight": (hidden, stored),
            "attn.proj.bias": (hidden,),
            "mlp.fc1.weight": (inner, hidden),
            "mlp.fc1.bias": (inner,),
            "mlp.fc2.weight": (hidden, inner),
            "mlp.fc2.bias": (hidden,),
        }
        llm = {
            "input_layernorm.weight": (64,),
            "post_attention_layernorm.weight": (64,),
            "self_attn.q_proj.weight": (64, 64),
            "self_attn.q_proj.bias": (64,),
            **{f"self_attn.{n}_proj.weight": (32, 64) for n in "kv"},
            **{f"self_attn.{n}_proj.bias": (32,) for n in "kv"},
            "self_attn.o_proj.weight": (64, 64),
            "mlp.gate_proj.weight": (160, 64),
            "mlp.up_proj.weight": (160, 64),
            "mlp.down_proj.weight": (64, 160),
        }
        shapes |= {f"vision_model.encoder.layers.{layer}.{n}": s for n, s in vit.items()}
        shapes |= {f"language_model.model.layers.{layer}.{n}": s for n, s in llm.items()}
    return shapes


def _random_tensors() -> dict[str, torch.Tensor]:
    """The tiny model without dummy heads; float32 and bfloat16 as on the published shards."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in _shapes(0).items():
        values = torch.randn(shape, generator=generator)
        is_gain = "norm" in name or name.endswith(("ls1", "ls2")) or name == "mlp1.0.weight"
        values = 1 + 0.2 * values if is_gain else values * 1.5 / math.sqrt(math.prod(shape[1:]))
        stored_float32 = any(part in name for part in (".attn.", "q_proj", "k_proj", "v_proj"))
        tensors[name] = values if stored_float32 else values.bfloat16()
    return tensors


def _with_dummy_heads(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    padded = dict(tensors)
    for name, shape in _shapes(NUM_DUMMY_HEADS).items():
        if shape != tuple(tensors[name].shape):
            blocks = tensors[name].chunk(3) if "qkv" in name else (tensors[name],)
            block_shape = (shape[0] // len(blocks), *shape[1:])
            wide = [torch.zeros(block_shape, dtype=tensors[name].dtype) for _ in blocks]
            for target, block in zip(wide, blocks, strict=True):
                target[tuple(slice(n) for n in block.shape)] = block
            padded[name] = torch.cat(wide)
    return padded


def _write_model(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    names, weight_map = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name].contiguous() for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference") / "with_dummy_heads"
    return _write_model(folder, _with_dummy_heads(_random_tensors()))


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    qwen_vocabulary.write_tokenizer_json(path)
    return path


def _tiles() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((3, 3, 56, 56)).astype(np.float32)


def _assert_close(actual: Any, expected: Any, relative: float) -> None:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    error, bound = np.abs(actual - expected), relative * np.abs(expected).max()
    where = np.unravel_index(error.argmax(), error.shape)
    message = f"max {error.max():.3g} mean {error.mean():.3g} at {where}, allowed {bound:.3g}"
    assert error.max() <= bound, message


# --- vision -----------------------------------------------------------------------------------


def test_zero_dummy_heads_change_nothing(model_dir: Path, tmp_path: Path) -> None:
    dropped = _write_model(tmp_path / "dropped", _random_tensors())
    with_heads = internvit_float64.encode_tiles(model_dir, _tiles())
    assert with_heads.shape == (3, 4, LLM["hidden_size"])
    assert with_heads.dtype == np.float64
    _assert_close(internvit_float64.encode_tiles(dropped, _tiles()), with_heads, 1e-13)


def test_vit_equals_transformers_internvl(model_dir: Path) -> None:
    from transformers import InternVLVisionConfig, InternVLVisionModel

    config = InternVLVisionConfig(
        **{k: VISION[k] for k in VISION}, use_qk_norm=True, norm_type="rms_norm"
    )
    config._attn_implementation = "eager"
    tensors = _random_tensors()
    state = {
        "embeddings.cls_token": tensors["vision_model.embeddings.class_embedding"],
        "embeddings.position_embeddings": tensors["vision_model.embeddings.position_embedding"],
    }
    for part in ("weight", "bias"):
        conv = tensors[f"vision_model.embeddings.patch_embedding.{part}"]
        state[f"embeddings.patch_embeddings.projection.{part}"] = conv
    names = {
        "norm1.weight": "layernorm_before.weight",
        "norm2.weight": "layernorm_after.weight",
        "ls1": "lambda_1",
        "ls2": "lambda_2",
        "attn.q_norm.weight": "attention.q_norm.weight",
        "attn.k_norm.weight": "attention.k_norm.weight",
        **{f"attn.proj.{p}": f"attention.projection_layer.{p}" for p in ("weight", "bias")},
        **{f"mlp.fc{n}.{p}": f"mlp.fc{n}.{p}" for n in (1, 2) for p in ("weight", "bias")},
    }
    for layer in range(2):
        ours, theirs = f"vision_model.encoder.layers.{layer}.", f"encoder.layer.{layer}."
        state |= {theirs + new: tensors[ours + old] for old, new in names.items()}
        for n, rows in zip("qkv", tensors[ours + "attn.qkv.weight"].chunk(3), strict=True):
            state[f"{theirs}attention.{n}_proj.weight"] = rows
    model = InternVLVisionModel(config).double().eval()
    model.load_state_dict({k: v.double() for k, v in state.items()})
    with torch.inference_mode():
        hidden = model(torch.from_numpy(_tiles()).double()).last_hidden_state[:, 1:]
    patches = internvit_float64.encode_patches(model_dir, _tiles())
    # transformers computes its RMS norms in float32
    _assert_close(patches.reshape(3, 16, -1), hidden.numpy(), 1e-6)


def test_pixel_shuffle_equals_the_published_permutations() -> None:
    x = torch.arange(2 * 6 * 6 * 5).reshape(2, 6, 6, 5)
    y = x.view(2, 6, 3, 10).permute(0, 2, 1, 3).reshape(2, 3, 3, 20).permute(0, 2, 1, 3)
    assert np.array_equal(internvit_float64.pixel_shuffle(x.numpy()), y.reshape(2, 9, 20).numpy())


def test_gelu_is_the_erf_gelu() -> None:
    x = np.linspace(-9, 9, 601)
    exact = [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x]
    assert np.allclose(internvit_float64.gelu(x), exact, rtol=0, atol=2e-15)


def test_projector_equals_torch_modules(model_dir: Path) -> None:
    w = {k: v.double() for k, v in _random_tensors().items() if k.startswith("mlp1.")}
    x = internvit_float64.pixel_shuffle(internvit_float64.encode_patches(model_dir, _tiles()))
    normed = torch.nn.functional.layer_norm(
        torch.from_numpy(x), x.shape[-1:], w["mlp1.0.weight"], w["mlp1.0.bias"], 1e-5
    )
    y = torch.nn.functional.gelu(normed @ w["mlp1.1.weight"].T) @ w["mlp1.3.weight"].T
    _assert_close(internvit_float64.encode_tiles(model_dir, _tiles()), y.numpy(), 1e-13)


def test_weight_dtype_rounds_the_stored_float32_tensors(model_dir: Path) -> None:
    exact = internvit_float64.encode_tiles(model_dir, _tiles())
    rounded = internvit_float64.encode_tiles(model_dir, _tiles(), weight_dtype=torch.bfloat16)
    assert 1e-6 < np.abs(exact - rounded).max() / np.abs(exact).max() < 0.05


# --- decoder ----------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_float64_decoder_equals_hugging_face(model_dir: Path, attention: str) -> None:
    token_ids = np.random.default_rng(2).integers(0, 160, 300).tolist()
    model = qwen2_hugging_face.load(model_dir, attention=attention)
    config, weights = qwen2_float64.load(model_dir)
    ours = qwen2_float64.logits(config, weights, qwen2_float64.embed(weights, token_ids))
    theirs = qwen2_hugging_face.all_logits(model, qwen2_hugging_face.embed(model, token_ids))
    _assert_close(theirs, ours, 2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rope_theta_is_honoured_and_scaling_dropped(model_dir: Path, dtype: torch.dtype) -> None:
    model = qwen2_hugging_face.load(model_dir, dtype=dtype)
    rope = model.model.rotary_emb
    assert rope.rope_type == "default"
    assert model.model.layers[0].self_attn.head_dim == 16
    assert rope.inv_freq.dtype == torch.float32
    assert rope.inv_freq.tolist() == pytest.approx([1e6 ** (-i / 8) for i in range(8)], rel=1e-6)
    assert not getattr(model.config, "use_sliding_window", False)
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_greedy_agrees_with_float64_over_the_whole_sequence(model_dir: Path) -> None:
    model = qwen2_hugging_face.load(model_dir)
    images = torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(3))
    prompt = [5, 6, *[150] * 4, 7, *[150] * 4, 8]
    embeds = qwen2_hugging_face.embed(model, prompt, 150, images)
    assert torch.equal(embeds[0, [*range(2, 6), *range(7, 11)]], images.reshape(8, 64))
    token_ids, rows = qwen2_hugging_face.greedy(model, embeds, 12)
    assert rows.shape == (12, 160)
    assert token_ids == rows.argmax(-1).tolist()
    config, weights = qwen2_float64.load(model_dir)
    new = qwen2_float64.embed(weights, token_ids[:-1])
    full = qwen2_float64.logits(config, weights, np.concatenate([embeds[0].numpy(), new]))
    _assert_close(rows, full[len(prompt) - 1 :], 2e-5)


def _scales(config: dict[str, Any], weights: dict[str, np.ndarray]) -> qwen2_float64.Fp8Scales:
    groups = {
        "qkv": [f"self_attn.{n}_proj" for n in "qkv"],
        "dense": ["self_attn.o_proj"],
        "fc_gate": ["mlp.gate_proj", "mlp.up_proj"],
        "proj": ["mlp.down_proj"],
    }
    linears = tuple(
        {
            name: qwen2_float64.LinearScales(
                weight=max(
                    np.abs(weights[f"model.layers.{layer}.{m}.weight"]).max() for m in members
                )
                / 448,
                activation=20 / 448,
            )
            for name, members in groups.items()
        }
        for layer in range(config["num_hidden_layers"])
    )
    return qwen2_float64.Fp8Scales(linears, ((10 / 448,) * 2,) * config["num_hidden_layers"])


def test_fp8_decoder_moves_little_and_takes_raw_or_dequantised_weights(model_dir: Path) -> None:
    config, weights = qwen2_float64.load(model_dir)
    scales = _scales(config, weights)
    embeds = qwen2_float64.embed(weights, list(range(40)))
    plain = qwen2_float64.logits(config, weights, embeds)
    fp8 = qwen2_float64.logits(config, weights, embeds, scales)
    change = np.linalg.norm(fp8 - plain) / np.linalg.norm(plain)
    assert 0.005 < change < 0.2, change
    only_cache = qwen2_float64.Fp8Scales(kv_cache=scales.kv_cache)
    cached = qwen2_float64.logits(config, weights, embeds, only_cache)
    assert 0.001 < np.linalg.norm(cached - plain) / np.linalg.norm(plain) < change
    dequantised = dict(weights)
    for layer, linears in enumerate(scales.linears):
        for module, name in (("self_attn.k_proj", "qkv"), ("mlp.down_proj", "proj")):
            key, scale = f"model.layers.{layer}.{module}.weight", linears[name].weight
            dequantised[key] = fp8_e4m3.dequantize(fp8_e4m3.quantize(weights[key], scale), scale)
    assert np.array_equal(fp8, qwen2_float64.logits(config, dequantised, embeds, scales))


# --- FP8 --------------------------------------------------------------------------------------


def test_e4m3_table_equals_torch_for_every_byte() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.view(torch.float8_e4m3fn).double().numpy()
    assert np.array_equal(fp8_e4m3.TABLE, expected, equal_nan=True)
    assert np.array_equal(np.signbit(fp8_e4m3.TABLE[:127]), np.zeros(127, bool))
    assert np.signbit(fp8_e4m3.TABLE[0x80])


def test_e4m3_quantize_equals_torch_including_ties_and_clamp() -> None:
    finite = np.sort(fp8_e4m3.TABLE[:127])
    ties = (finite[1:] + finite[:-1]) / 2
    x = np.concatenate([finite, ties, np.nextafter(ties, 0, dtype=np.float32), [470, 1e9, np.inf]])
    x = np.concatenate([x, np.random.default_rng(4).standard_normal(50000) * 100, [1e-30]])
    x = np.concatenate([x, -x]).astype(np.float32)
    for scale in (1.0, 0.0371, 3.0):
        scaled = (torch.from_numpy(x) / torch.tensor(scale)).clamp(-448, 448)
        expected = scaled.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        codes = fp8_e4m3.quantize(x, scale)
        assert codes.dtype == np.uint8
        assert np.array_equal(codes, expected)
        real = fp8_e4m3.dequantize(codes, scale)
        assert np.array_equal(fp8_e4m3.quantize(real, scale), codes)
    assert fp8_e4m3.quantize(np.array([np.nan]), 1.0) == 0x7F


# --- tiling -----------------------------------------------------------------------------------


@pytest.mark.parametrize("max_num_tiles", [1, 6, 12])
def test_grids_agree_except_on_exact_midpoints(max_num_tiles: int) -> None:
    side = range(1, max_num_tiles + 1)
    ratios = sorted({Fraction(i, j) for i in side for j in side if i * j <= max_num_tiles})
    midpoints = {(a + b) / 2 for a, b in pairwise(ratios)}
    sizes = {(w, h) for w in range(3, 2600, 71) for h in range(2, 2600, 73)}
    sizes |= {(448 * i, 448 * j) for i in range(1, 8) for j in range(1, 8)}
    sizes |= {(n, n) for n in (633, 634, 896)}
    for width, height in sorted(sizes):
        exact = tiling.grid(width, height, max_num_tiles)
        published = tiling.grid_float(width, height, max_num_tiles)
        assert exact == published or Fraction(width, height) in midpoints, (width, height)


def test_known_grids() -> None:
    sides = {n: tiling.grid(n, n, 6) for n in (448, 633, 634)}  # 633^2 < 401,408 < 634^2
    assert sides == {448: (1, 1), 633: (1, 1), 634: (2, 2)}
    assert tiling.grid(1920, 1080, 6) == tiling.grid_float(1920, 1080, 6) == (2, 1)
    assert tiling.grid(1600, 400, 6) == (4, 1)
    assert tiling.grid(400, 1600, 6) == (1, 4)
    # 5:6 is midway between 2:3 and 1:1; float rounding makes the published code choose 1:1
    assert tiling.grid(1000, 1200, 6) == (2, 3)
    assert tiling.grid_float(1000, 1200, 6) == (2, 2)


def test_tiles_are_row_major_with_the_thumbnail_last() -> None:
    image = Image.new("RGBA", (168, 112))
    for index in range(6):
        box = (56 * (index % 3), 56 * (index // 3))
        image.paste(Image.new("RGBA", (56, 56), (40 * index, 0, 255, 9)), box)
    tiles = tiling.tiles(image, 6, 56)
    assert tiles.shape == (7, 3, 56, 56)
    assert tiles.dtype == np.float32
    red = tiles[:6, 0, 28, 28] * 0.229 + 0.485
    assert np.allclose(red * 255, [0, 40, 80, 120, 160, 200], atol=1e-3)
    assert tiling.tiles(image, 1, 56).shape == (1, 3, 56, 56)
    assert np.array_equal(tiling.tiles(image, 1, 56)[0], tiles[6])


# --- tokens and prompts -----------------------------------------------------------------------


def _texts() -> list[str]:
    fixed = [
        *(
            "",
            " ",
            "\n",
            "\r\n\r\n  x",
            "Hello, world!",
            "it's WE'LL i'M",
            "x  \t y   ",
            "1234.5e-6",
        ),
        *("你好，世界。今天天气怎么样？", "naïve cafe\u0301 Å e\u0301\u0323", "👩‍👩‍👧 🇫🇷 ok"),
        *("नमस्ते", "مرحبا بالعالم", "日本語のテキスト、カタカナ", "한국어 \u1112\u1161\u11ab"),
        *("\u00a0\u3000 x", "\x00\x7f", "def f(x):\n\treturn x ** 2  # sq\n", "a" * 300),
        *("<div class='a'>\n  </div>\n", 'printf("%d\\n", i++);', "<|im_start|>user\nHi<|im_end|>"),
        *("<Image><tile_1></Image>\n", "a<tool_call>{}</tool_call>", "<|im_start", "<|IM_END|>"),
        "<|vision_pad|><|vision_pad|>x<|fim_prefix|>",
    ]
    random = np.random.default_rng(5)
    alphabet = " \n\t.,'<>|_/0127aeinorstzAEZ-\"(){}=éß你好世界のシ한🙂\u0301ж\u200d"
    lengths = random.integers(1, 60, 600)
    return fixed + ["".join(random.choice(list(alphabet), n)) for n in lengths]


def test_tokenizer_json_gives_the_ids_of_tiktoken(tokenizer_json: Path) -> None:
    tokenizer = prompts.load_tokenizer(tokenizer_json)
    assert len(tokenizer) == 151665
    for text in _texts():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == qwen_vocabulary.encode(text), repr(text)
    no_special = [t for t in _texts() if "<|" not in t and "tool_call" not in t]
    assert all(qwen_vocabulary.encode(t) == qwen_vocabulary.encode_plain(t) for t in no_special)


def test_every_vocabulary_row_is_reached_by_its_own_text(tokenizer_json: Path) -> None:
    tokenizer = prompts.load_tokenizer(tokenizer_json)
    rows = [(i, t) for t, i in qwen_vocabulary.ranks().items() if i % 23 == 0 or i < 2000]
    texts = [t.decode("utf-8", "replace") for _, t in rows]
    batch = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert batch == [qwen_vocabulary.encode(text) for text in texts]
    assert sum(ids == [i] for ids, (i, _) in zip(batch, rows, strict=True)) > 0.9 * len(rows)


def test_known_ids_of_tags_and_added_tokens(tokenizer_json: Path) -> None:
    document = json.loads(tokenizer_json.read_text("utf-8"))
    assert [row["id"] for row in document["added_tokens"]] == list(range(151643, 151665))
    special = {row["id"] for row in document["added_tokens"] if row["special"]}
    assert special == set(range(151643, 151657))
    known = {
        **{f"<tile_{k}>": [27, 21094, 62, 15 + k, 29] for k in range(1, 10)},
        "<tile_global_thumbnail>": [27, 21094, 19296, 37824, 29],
        "<Image>": [46465, 29],
        "</Image>": [522, 1906, 29],
        "</Image>\n": [522, 1906, 397],
        "<Image><tile_1>": [46465, 1784, 21094, 62, 16, 29],
        "<|endoftext|>": [151643],
        "<|im_start|>": [151644],
        "<|im_end|>": [151645],
        "<|vision_pad|>": [151654],
        "<tool_call>": [151657],
        "<|file_sep|>": [151664],
    }
    assert {text: qwen_vocabulary.encode(text) for text in known} == known
    lengths = {
        t: len(qwen_vocabulary.encode(t)) for t in ("<tile_10>", "<tile_01>", "<tile_global>")
    }
    assert lengths == {"<tile_10>": 6, "<tile_01>": 6, "<tile_global>": 4}


def test_prompts_differ_only_at_the_known_boundaries(tokenizer_json: Path) -> None:
    tokenizer = prompts.load_tokenizer(tokenizer_json)
    head = [151644, 8948, 198, 16141, 279, 4755, 13, 151645]
    user, assistant = [151644, 872, 198], [151644, 77091, 198]
    tile, thumbnail = [21094, 62, 16, 29], [27, 21094, 19296, 37824, 29]
    pads, question = [151654] * 4, [522, 1906, 397, 13048, 151645]
    first = [46465, 1784, *tile, *pads, *thumbnail, *pads, *question]
    expected = head + user + first + assistant
    assert prompts.hugging_face(tokenizer, "Hi", [2], 4) == expected
    apart = [46465, 29, 27, *tile, *pads, *thumbnail, *pads, *question]
    expected = [*head, 198, *user, *apart, 198, *assistant]
    assert prompts.megatron(tokenizer, "Hi", [2], 4) == expected
    for build in (prompts.hugging_face, prompts.megatron):
        ids = build(tokenizer, "Which?", [1, 3, 7], 16)
        assert ids.count(151654) == 16 * 11
        assert build(tokenizer, "<image>\n<image>\n<image>\nWhich?", [1, 3, 7], 16) == ids
        assert build(tokenizer, "No image.", [], 16).count(151654) == 0
    string = prompts.hugging_face_string("Which?", [1, 3, 7], 2)
    assert qwen_vocabulary.encode(string) == prompts.hugging_face(tokenizer, "Which?", [1, 3, 7], 2)
