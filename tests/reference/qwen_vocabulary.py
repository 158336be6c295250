"""Oracle of tokenisation: Qwen2.5's vocabulary from the wheel `dashscope`, without network.

Out: a `tiktoken.Encoding` (the oracle) and a Hugging Face `tokenizer.json` with the same ids.
Source of the 151,643 ranks: dashscope/resources/qwen.tiktoken; of the added tokens:
tokenizer_config.json of nvidia/NVLM-D-72B; of the pattern and the pipeline (NFC, split, bytes):
transformers' tokenization_qwen2.py.
"""

import base64
import importlib.util
import json
import unicodedata
from functools import cache
from itertools import pairwise
from pathlib import Path

import tiktoken

FIRST_ADDED_ID = 151643
SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>"),
    *("<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)  # 151643..151656
NON_SPECIAL_TOKENS = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    *("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
)  # 151657..151664
ADDED_IDS = {t: FIRST_ADDED_ID + n for n, t in enumerate(SPECIAL_TOKENS + NON_SPECIAL_TOKENS)}
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@cache
def ranks() -> dict[bytes, int]:
    """{token bytes: id}, 151,643 rows in order of id."""
    spec = importlib.util.find_spec("dashscope")  # found, not imported: it opens sessions
    assert spec is not None, "the wheel dashscope is not installed"
    lines = (
        (Path(str(spec.origin)).parent / "resources" / "qwen.tiktoken").read_bytes().splitlines()
    )
    table = {base64.b64decode(t): int(i) for t, i in (line.split() for line in lines if line)}
    assert len(table) == FIRST_ADDED_ID, f"{len(table)} ranks in qwen.tiktoken"
    return table


@cache
def encoding() -> tiktoken.Encoding:
    """The oracle itself; `encode` and `encode_plain` below add the NFC normalisation."""
    return tiktoken.Encoding(
        "qwen2.5", pat_str=PATTERN, mergeable_ranks=ranks(), special_tokens=ADDED_IDS
    )


def encode(text: str) -> list[int]:
    """Ids with the added tokens parsed."""
    return encoding().encode(unicodedata.normalize("NFC", text), allowed_special="all")


def encode_plain(text: str) -> list[int]:
    """Ids of text in which nothing is special."""
    return encoding().encode_ordinary(unicodedata.normalize("NFC", text))


def write_tokenizer_json(path: Path) -> None:
    """Writes the Hugging Face tokenizer.json of Qwen2.5 (a few seconds; cache the file)."""
    letters = _byte_letters()
    spelled = {token: "".join(letters[b] for b in token) for token in ranks()}
    added = [
        {
            "id": i,
            "content": token,
            "special": token in SPECIAL_TOKENS,
            **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
        }
        for token, i in ADDED_IDS.items()
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    byte_level["use_regex"] = False
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated"}
    split["invert"] = False
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": {spelled[token]: i for token, i in ranks().items()},
        "merges": [[spelled[left], spelled[right]] for left, right in _merges()],
    }
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": model,
    }
    path.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")


def _byte_letters() -> list[str]:
    """GPT-2's printable letter of each byte: Latin-1 where printable, else 256 and up in order."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [b for b in range(256) if b not in printable]
    return [chr(b) if b in printable else chr(256 + others.index(b)) for b in range(256)]


def _merges() -> list[tuple[bytes, bytes]]:
    """The pair that makes each token, in order of rank: BPE of its bytes with the earlier ranks."""
    table, pairs = ranks(), []
    for token, rank in table.items():
        if len(token) == 1:
            continue
        cuts = [c for c in range(1, len(token)) if _earlier(table, token[:c], token[c:], rank)]
        if len(cuts) > 1:
            cuts = [len(_bpe(table, token, rank)[0])]
        pairs.append((token[: cuts[0]], token[cuts[0] :]))
    return pairs


def _earlier(table: dict[bytes, int], left: bytes, right: bytes, rank: int) -> bool:
    return table.get(left, rank) < rank and table.get(right, rank) < rank


def _bpe(table: dict[bytes, int], token: bytes, limit: int) -> list[bytes]:
    """The two last pieces of `token` when merging with ranks below `limit` only."""
    pieces = [token[i : i + 1] for i in range(len(token))]
    while len(pieces) > 2:
        joined = [table.get(a + b, limit) for a, b in pairwise(pieces)]
        lowest = min(joined)
        assert lowest < limit, f"no merge makes {token!r}"
        at = joined.index(lowest)
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return pieces
