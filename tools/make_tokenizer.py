"""A small tokenizer of NVLM-D's kind: byte-level BPE, ChatML and vision special tokens.

For random checkpoints. Same structure as Qwen2.5's tokenizer.json, a few hundred merges.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as pre

from nvlm.inputs.tokenizer import CONFIG_FILE, TOKENIZER_FILE

SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>"),
    *("<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
NON_SPECIAL_TOKENS = ("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|file_sep|>")

# Qwen2's split pattern (transformers, models/qwen2/tokenization_qwen2.py, PRETOKENIZE_REGEX).
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_TEXT = """
Answer the questions. Describe this image in one sentence. What is written in the picture? Read the
number. Read the word. How many shapes are there? What colour is the text? Which tile shows it? The
quick brown fox jumps over the lazy dog. system user assistant <Image><tile_1><tile_2>
<tile_global_thumbnail></Image>
<ref>the cup</ref><box>(12, 34), (567, 890)</box> One two three four five six seven eight nine ten.
"""


def write_tokenizer(tokenizer_dir: Path, num_base_tokens: int = 400) -> int:
    """Writes tokenizer.json and tokenizer_config.json; returns the number of tokens."""
    tokenizer = qwen_tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=num_base_tokens,
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=1,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    return save_tokenizer(tokenizer, tokenizer_dir)


def qwen_tokenizer(model: models.BPE) -> Tokenizer:
    """Qwen2's normaliser, splits and byte alphabet around `model`."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre.Sequence(
        [
            pre.Split(Regex(_PATTERN), behavior="isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, tokenizer_dir: Path) -> int:
    """Adds the special tokens and writes both files; returns the number of tokens."""
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token) for token in NON_SPECIAL_TOKENS])
    tokenizer.save(str(tokenizer_dir / TOKENIZER_FILE))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "add_prefix_space": False,
        "model_max_length": 131072,
    }
    (tokenizer_dir / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    return tokenizer.get_vocab_size()
