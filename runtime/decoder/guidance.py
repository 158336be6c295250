"""What a guide allows for the next token: llguidance over this engine's tokenizer.

`Guidance` compiles what a request asks for, when it is prepared. The executor starts a `Matcher` an
answer, has `TokenMasks` made of those of a step, and gives each matcher the token that was drawn.
Nothing here knows logits or requests.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any, TypeVar

import torch

from nvlm.inputs.tokenizer import IM_END, Tokenizer
from nvlm.program.errors import UserError, cut, shown
from runtime.decoder.schema_bounds import faulty_bound
from runtime.requests.guide import Guide

_Result = TypeVar("_Result")

_CACHED_GUIDES = 32
_STACK_BYTES = 256 << 20
"""Stack of the thread that compiles. llguidance recurses: a chain of 3000 rules overflows 8 MB. The
longest chain in MAX_GUIDE_BYTES takes a third of this. Only what is used takes memory."""
_MOST_THREADS = 8
_UNUSED_KEYWORDS = ("Unimplemented keys: ", "Unknown format: ")
_JSON_OPTIONS = {
    "lenient": False,
    "coerce_one_of": False,
    # A line's end and its indentation, or a gap. JSON allows any blanks, and a model that knows
    # nothing to say would write them until max_new_tokens.
    "whitespace_pattern": r"\n[ \t]{0,40}|[ \t]{1,4}",
}


class Guidance:
    """`compile` may be called by any thread. The first call reads the vocabulary: 0.5 s for 152,064
    tokens."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._lock = threading.Lock()
        self._vocabulary: Any = None
        self._cached = lru_cache(_CACHED_GUIDES)(self._compile)

    def compile(self, guide: Guide) -> CompiledGuide:
        """Raises `UserError` for a guide that no answer matches, or that llguidance cannot hold an
        answer to."""
        return self._cached(guide)

    def _compile(self, guide: Guide) -> CompiledGuide:
        llguidance = _llguidance()
        try:
            grammar = _grammar(llguidance, guide)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{guide.name} is no schema: {_one_line(error)}") from None
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = _vocabulary(llguidance, self._tokenizer, self._vocab_size)
            matcher = _on_deep_stack(partial(_begin, llguidance, self._vocabulary, grammar))
        if _is_dead_end(matcher):
            raise UserError(f"{guide.name} {shown(guide.text)} matches no text; give one that does")
        if matcher.is_error():
            raise UserError(_refusal(guide, matcher.get_error()))
        return CompiledGuide(matcher, self._tokenizer.special_id(IM_END))


class CompiledGuide:
    """A guide whose matcher has not begun; many answers may begin with it."""

    def __init__(self, matcher: Any, end_id: int) -> None:
        self._matcher, self._end_id = matcher, end_id

    def start(self, stop_ids: frozenset[int]) -> Matcher:
        """stop_ids: tokens that end the answer, wherever <|im_end|> may."""
        return Matcher(self._matcher.deep_copy(), self._end_id, stop_ids - {self._end_id})


class Matcher:
    """How far one answer has come in its guide."""

    def __init__(self, matcher: Any, end_id: int, further_stop_ids: frozenset[int]) -> None:
        self._matcher, self._end_id, self._further_stop_ids = matcher, end_id, further_stop_ids

    @property
    def is_complete(self) -> bool:
        """Whether the answer matches, and nothing may follow."""
        return self._matcher.is_stopped() and self._matcher.is_accepting()

    @property
    def error(self) -> str | None:
        """Why the guide can be followed no further: it needs too much, or leads nowhere."""
        if _is_dead_end(self._matcher):
            return "no text that matches begins like this answer"
        return _reason(self._matcher.get_error()) if self._matcher.is_error() else None

    def take(self, token_id: int) -> None:
        """Advances by a token of the answer, none of `stop_ids`."""
        self._matcher.consume_token(token_id)

    def finish_row(self, row: torch.Tensor) -> None:
        """Lets the further stop ids end the answer where <|im_end|> may. row: [words] int32."""
        if not self._further_stop_ids:
            return
        words = row.numpy().view("uint32")
        may_end = words[self._end_id // 32] >> (self._end_id % 32) & 1
        for token_id in self._further_stop_ids:
            bit = 1 << (token_id % 32)
            words[token_id // 32] &= 0xFFFFFFFF ^ bit
            words[token_id // 32] |= bit * may_end


class TokenMasks:
    """Makes the masks of a step on the host, several threads at once."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        num_threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)))
        self._workers = _llguidance().LLExecutor(num_threads)
        self._num_words = -(-vocab_size // 32)
        self._device = device

    def fill(self, matchers: Sequence[Matcher]) -> torch.Tensor:
        """[len(matchers), ceil(vocab_size / 32)] int32 on the device: bit i of word w, from the
        lowest, is 1 where token 32 * w + i may come next. A matcher with an error allows all."""
        is_pinned = self._device.type == "cuda"
        shape = (len(matchers), self._num_words)
        masks = torch.full(shape, -1, dtype=torch.int32, pin_memory=is_pinned)
        alive = [(row, matcher) for row, matcher in enumerate(matchers) if matcher.error is None]
        self._workers.unsafe_compute_mask_ptr(
            [(matcher._matcher, row) for row, matcher in alive],
            masks.data_ptr(),
            4 * self._num_words,
            len(matchers),
        )
        for row, matcher in alive:
            if matcher.error is not None:
                masks[row] = -1
            else:
                matcher.finish_row(masks[row])
        return masks.to(self._device, non_blocking=True)


def apply_masks(logits: torch.Tensor, rows: Sequence[int], masks: torch.Tensor) -> torch.Tensor:
    """A copy of logits that has -inf where the masks of some rows leave a token out.

    logits: [n, vocab_size] float32; masks: [len(rows), words] int32 as `TokenMasks.fill` has them.
    What a mask allows stays above -inf, so that a row always has a token, whatever else rules out
    its tokens.
    """
    bits = torch.arange(8, dtype=torch.uint8, device=logits.device)
    allowed = (masks.view(torch.uint8)[:, :, None] >> bits & 1).flatten(1)[:, : logits.shape[1]]
    index = torch.tensor(rows).to(logits.device, non_blocking=True)
    finite = logits[index].clamp(min=torch.finfo(logits.dtype).min)
    guided = finite.masked_fill(allowed == 0, -torch.inf)
    if len(rows) == len(logits):
        return guided
    masked = logits.clone()
    masked[index] = guided
    return masked


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise UserError(
            "answers that match a schema or an expression need llguidance, which is not installed; "
            "pip install llguidance==1.9.1"
        ) from None
    return llguidance


class _Vocabulary:
    """Our tokenizer as llguidance reads one. Special tokens and the padding of the vocabulary stand
    for no text, so no guide allows them."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        assert vocab_size >= tokenizer.num_tokens, "the model has a row for every token"
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.special_id(IM_END)
        self.special_token_ids = [self.eos_token_id]
        self.tokens = [tokenizer.bytes_of(token_id) for token_id in range(vocab_size)]

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)


def _vocabulary(llguidance: Any, tokenizer: Tokenizer, vocab_size: int) -> Any:
    """Without the end ids llguidance would take <|endoftext|>, by which no answer ends."""
    own = _Vocabulary(tokenizer, vocab_size)
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(own), eos_token=[own.eos_token_id])


def _grammar(llguidance: Any, guide: Guide) -> str:
    """Raises `ValueError` for a schema that is no JSON object, and `UserError` for bounds that
    would not be held."""
    matcher = llguidance.LLMatcher
    match guide.name:
        case "json_schema" | "json_object":
            schema = json.loads(guide.schema)
            if not isinstance(schema, dict):
                raise ValueError(f"it is {shown(guide.text)}, expected an object")
            if "x-guidance" in schema:
                raise ValueError("it has the keyword 'x-guidance', which would loosen it")
            if fault := faulty_bound(schema):
                name, what = fault
                raise UserError(_unheld(guide, f"the keyword '{name}' ({what})"))
            grammar = matcher.grammar_from_json_schema(guide.schema, overrides=_JSON_OPTIONS)
        case "regex" | "choice":
            # \d and \w are ASCII's, as in ECMAScript, by which schemas and TensorRT-LLM go.
            pattern = llguidance.regex_to_lark(guide.pattern, "dw")
            grammar = matcher.grammar_from_lark(f"start: /{pattern}/")
        case "grammar":
            grammar = matcher.grammar_from_lark(guide.text)
    return str(grammar)


def _begin(llguidance: Any, vocabulary: Any, grammar: str) -> Any:
    """A matcher that has made its first mask, which shows what no text matches."""
    matcher = llguidance.LLMatcher(vocabulary, grammar, log_level=0)
    if not matcher.is_error():
        matcher.compute_bitmask()
    return matcher


def _is_dead_end(matcher: Any) -> bool:
    is_out = matcher.is_stopped() and not matcher.is_error() and not matcher.is_accepting()
    return bool(is_out or matcher.get_error().startswith("NoExtension"))


def _on_deep_stack(function: Callable[[], _Result]) -> _Result:
    before = threading.stack_size(_STACK_BYTES)
    try:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(function).result()
    finally:
        threading.stack_size(before)


def _refusal(guide: Guide, reason: str) -> str:
    """llguidance's reason in one line; a keyword that it cannot hold an answer to by its name."""
    for beginning in _UNUSED_KEYWORDS:
        if beginning in reason:
            names = reason.partition(beginning)[2].partition("\n")[0].strip("[]").replace('"', "'")
            names = " and ".join(names.split(", "))
            what = "the format" if "format" in beginning else "the keyword"
            return _unheld(guide, f"{what} {names}")
    if "oneOf constraints" in reason:
        return (
            f"{guide.name} has the keyword 'oneOf' over schemas that one value may match together, "
            "which no answer can be held to here; use 'anyOf'"
        )
    return f"{guide.name} cannot be followed: {_reason(reason)}"


def _unheld(guide: Guide, what: str) -> str:
    return (
        f"{guide.name} has {what}, which no answer can be held to here; leave it out, and check "
        "the answer for it"
    )


def _reason(reason: str) -> str:
    """The line of llguidance's report that says why."""
    if found := re.search("^error: (.*)$", reason, re.MULTILINE):  # of an expression
        return _one_line(found[1])
    return _one_line(reason.partition("\n")[0].rpartition("(in regex): ")[2])


def _one_line(reason: object) -> str:
    return cut(" ".join(str(reason).split()))
