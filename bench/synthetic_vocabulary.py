"""A vocabulary as large and as varied as a model's, for guides over random models.

A guide's masks cost what the vocabulary's texts make them cost: how many share a beginning, how
many hold a quote. bench/synthetic_runner.py's tokenizer, whose ids are texts for a client's clock,
would make them cheaper.
"""

from __future__ import annotations

import random

from nvlm.inputs.tokenizer import IM_END

_LETTERS = "eeeeeetttttaaaaoooiiinnnsssrrrhhlldddccuummffppggwwyybbvvkkxjqz"
_SIGNS = ".,:;()[]{}<>/\\|'\"=+-*&%$#@!?_`~\n\t "


class SyntheticVocabulary:
    """What `Guidance` asks of a tokenizer. Ids 0 to 255 are the bytes, the last one is <|im_end|>,
    the others are words, runs of signs and of Chinese characters, each once."""

    def __init__(self, vocab_size: int) -> None:
        assert vocab_size > 256, "each byte is a token"
        rng = random.Random(0)
        texts = dict.fromkeys(bytes([value]) for value in range(256))
        while len(texts) < vocab_size - 1:
            texts[_text(rng).encode()] = None
        self._texts = [*texts, b""]
        self.num_tokens = vocab_size

    def special_id(self, name: str) -> int:
        assert name == IM_END, "there is no other"
        return self.num_tokens - 1

    def bytes_of(self, token_id: int) -> bytes:
        return self._texts[token_id]

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


def _text(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.7:
        word = "".join(rng.choices(_LETTERS, k=rng.randrange(2, 12)))
        word = word.capitalize() if rng.random() < 0.2 else word
        return " " * (rng.random() < 0.6) + word
    if kind < 0.8:
        return "".join(rng.choices(_SIGNS, k=rng.randrange(2, 6)))
    return "".join(chr(rng.randrange(0x4E00, 0x9FA5)) for _ in range(rng.randrange(1, 4)))
