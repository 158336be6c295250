"""From token ids to text as they come, ended by stop strings.

What is handed out is never taken back: bytes of an unfinished character and characters that may
begin a stop string wait.
"""

from __future__ import annotations

from nvlm.inputs.tokenizer import Detokenizer, Tokenizer


class TextStream:
    """`push` every token, then `finish` once; `text` is everything handed out.

    `stopped` is set when a stop string was found; what follows is not part of the text, nor is the
    string, unless `keeps_stop`.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: tuple[str, ...] = (), *, keeps_stop: bool = False
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = tuple(string for string in stop if string)
        self._keeps_stop = keeps_stop
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token_id: int, *, may_stop: bool = True) -> str:
        """The text that is certain now. Without `may_stop` a stop string that ends here is text."""
        return self._take(self._detokenizer.push(token_id), may_stop)

    def finish(self) -> str:
        """What was held back when no more tokens come."""
        delta = self._take(self._detokenizer.flush())
        held = "" if self.stopped else self._held
        self._held = ""
        self.text += held
        return delta + held

    def _take(self, new: str, may_stop: bool = True) -> str:
        if self.stopped:
            return ""
        held = self._held + new
        found = [(held.find(s) + len(s), held.find(s)) for s in self._stop if s in held]
        if found and may_stop:
            self.stopped = True
            # The first to be whole, however the answer is cut into tokens.
            whole, start = min(found)
            end = whole if self._keeps_stop else start
        else:
            end = len(held) - self._num_held(held)
        delta, self._held = held[:end], held[end:]
        self.text += delta
        return delta

    def _num_held(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max((len(string) - 1 for string in self._stop), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(string.startswith(text[-length:]) for string in self._stop):
                return length
        return 0
