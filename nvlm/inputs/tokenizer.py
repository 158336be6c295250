"""The checkpoint's byte-level BPE tokenizer: text to ids without special tokens, ids to text.

User text is always encoded with every added token switched off, so `<|im_end|>` typed by a user
is ordinary text. Special tokens are only ever placed by our own template, by name.
"""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as TokenizersTokenizer

from nvlm.program.errors import UserError, shown
from nvlm.program.json_files import read_json_object

TOKENIZER_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
PUBLISHED_FILES = (TOKENIZER_FILE, CONFIG_FILE, "vocab.json", "merges.txt")
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
_MOST_TOKENS = 1 << 24
_PROBE = "Read  the 3 numbers:\tcaf\u00e9, \u4f60\u597d!\r\n 'll"
"""Text of each kind that Qwen2's expression parts; its tokens must give it back."""

_PANIC = "PanicException"  # pyo3_runtime's, which cannot be imported
_REQUIRED = (IM_START, IM_END)

# Without added tokens every string is plain text. transformers saves how it last truncated and
# padded, which would cut or fill our prompts.
_PLAIN: dict[str, object] = {
    "added_tokens": [],
    "post_processor": None,
    "truncation": None,
    "padding": None,
}


def tokenizer_files(tokenizer_dir: Path) -> list[Path]:
    """What of a model directory belongs to its tokenizer."""
    return [tokenizer_dir / name for name in PUBLISHED_FILES if (tokenizer_dir / name).is_file()]


class Tokenizer:
    """Reads `tokenizer_dir/tokenizer.json`. Raises `UserError` when that is not byte-level BPE."""

    def __init__(self, tokenizer_dir: Path) -> None:
        path = tokenizer_dir / TOKENIZER_FILE
        values = read_json_object(path)
        try:
            self._read(values, path)
        except UserError:
            raise
        # KeyError and its kin: not the structure of a tokenizer; else the library's own, which is
        # written in Rust: what stops it there is no Exception here.
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
                raise
            raise UserError(
                f"{path} is not a whole byte-level BPE tokenizer ({shown(error)}), expected "
                "Qwen2's; download it again"
            ) from None

    def _read(self, values: dict[str, Any], path: Path) -> None:
        if (values["model"]["type"], values["decoder"]["type"]) != ("BPE", "ByteLevel"):
            raise UserError(f"{path} is not a byte-level BPE tokenizer, expected Qwen2's")
        added = values["added_tokens"]
        _check_vocabulary(values["model"], added, path)
        self._special_ids: dict[str, int] = {token["content"]: token["id"] for token in added}
        self._special_names = {token_id: name for name, token_id in self._special_ids.items()}
        for name in _REQUIRED:
            if name not in self._special_ids:
                raise UserError(f"{path} has no token {name}, expected the tokenizer of NVLM-D")
        self._encoder = TokenizersTokenizer.from_str(json.dumps({**values, **_PLAIN}))
        self._token_bytes = {
            token_id: bytes(_BYTE_OF_CHARACTER[character] for character in token)
            for token, token_id in values["model"]["vocab"].items()
        }
        for token in added:
            text = "" if token["special"] else token["content"]
            self._token_bytes[token["id"]] = text.encode()
        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise UserError(
                f"{path} loses text: {_PROBE!r} is not what its tokens say, expected Qwen2's "
                "tokenizer; download it again"
            )
        self.num_tokens = max(self._token_bytes) + 1
        self.max_token_bytes = max(map(len, self._token_bytes.values()))

    def special_id(self, name: str) -> int:
        return self._special_ids[name]

    def encode(self, text: str) -> list[int]:
        """Ids of one run of plain text; no added token is recognised in it."""
        ids: list[int] = self._encoder.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, token_ids: list[int]) -> str:
        detokenizer = Detokenizer(self)
        return "".join(map(detokenizer.push, token_ids)) + detokenizer.flush()

    def decode_with_names(self, token_ids: list[int]) -> str:
        """As `decode`, with special tokens by name."""
        names = self._special_names
        data = (self.bytes_of(each) or names.get(each, "").encode() for each in token_ids)
        return b"".join(data).decode(errors="replace")

    def text_of(self, token_id: int) -> str:
        """The text of a token alone, with U+FFFD for a part of a character; of a special token its
        name."""
        name = self._special_names.get(token_id)
        return self.bytes_of(token_id).decode(errors="replace") if name is None else name

    def bytes_of(self, token_id: int) -> bytes:
        """UTF-8 bytes the token stands for; special tokens and padding ids stand for none."""
        return self._token_bytes.get(token_id, b"")


def _check_vocabulary(model: dict[str, Any], added: list[dict[str, Any]], path: Path) -> None:
    """Refuses what the library reads and what would then make other prompts or other text."""
    advice = "expected Qwen2's tokenizer; download it again"
    if model.get("dropout") not in (None, 0, 0.0):
        raise UserError(
            f"{path} has the dropout {shown(model['dropout'])}, which tokenises at random; {advice}"
        )
    vocab = model["vocab"]
    if missing := [byte for byte in _CHARACTERS if byte not in vocab]:
        number = _BYTE_OF_CHARACTER[missing[0]]
        raise UserError(f"{path} has no token for the byte 0x{number:02x}; {advice}")
    names: dict[int, str] = {}
    for name, token_id in [*vocab.items(), *((each["content"], each["id"]) for each in added)]:
        if type(name) is not str:
            raise UserError(f"{path} has the token {shown(name)}; {advice}")
        if type(token_id) is not int or not 0 <= token_id < _MOST_TOKENS:
            raise UserError(
                f"{path} has the id {shown(token_id)} for the token {shown(name)}; {advice}"
            )
        if names.setdefault(token_id, name) != name:
            both = f"{shown(names[token_id])} and {shown(name)}"
            raise UserError(f"{path} has one id, {token_id}, for the tokens {both}; {advice}")
    for each in added:
        if type(each["special"]) is not bool:
            raise UserError(f"{path} has special {shown(each['special'])}; {advice}")
        if vocab.get(each["content"], each["id"]) != each["id"]:
            raise UserError(f"{path} has two ids for {shown(each['content'])}; {advice}")


class Detokenizer:
    """Ids one by one to text; bytes of an unfinished character wait for the next token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._tokenizer.bytes_of(token_id))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that never became whole."""
        return self._decoder.decode(b"", final=True)


def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable alphabet for bytes (openai/gpt-2, src/encoder.py, bytes_to_unicode)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()
_CHARACTERS = tuple(_BYTE_OF_CHARACTER)
