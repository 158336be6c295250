"""The small model's tokenizer: Qwen2's structure, words of the questions whole, answers by letter.

Merges exist only for words after a space (as questions have them) and for the pieces of the tile
tags, so text to be read or copied is one token per character and reading is not spelling. Every
tile tag has four tokens: `<tile`, `_`, the number, `>` or `<tile`, `_global`, `_thumbnail`, `>`.
"""

from __future__ import annotations

import re
from pathlib import Path

from tokenizers import models, pre_tokenizers

from nvlm.inputs.prompt import DEFAULT_SYSTEM
from tools.make_tokenizer import qwen_tokenizer, save_tokenizer
from tools.tiny import questions

_PIECES = ("<tile", "_global", "_thumbnail", "<Image", "</")


def write_tokenizer(tokenizer_dir: Path) -> int:
    """Writes tokenizer.json and tokenizer_config.json; returns the number of tokens."""
    texts = [*(wording for group in questions.WORDINGS for wording in group), DEFAULT_SYSTEM]
    words = {f"Ġ{word}" for text in texts for word in re.findall(r" ([A-Za-z]+)", text)}
    shapes = {f"Ġ{shape}" for shape in (*questions.SHAPES, questions.ANY_SHAPE)}
    merges: dict[tuple[str, str], None] = {}
    for piece in sorted(words | shapes) + list(_PIECES):
        for end in range(1, len(piece)):  # a chain from the left never starts inside a word
            merges[piece[:end], piece[end]] = None
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in merges]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    model = models.BPE(vocab=vocabulary, merges=list(merges))
    return save_tokenizer(qwen_tokenizer(model), tokenizer_dir)
