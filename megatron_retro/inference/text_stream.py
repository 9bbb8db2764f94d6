"""Tokens to text while they come: whole characters only, and nothing that may turn out to be a stop string.

Joining single decoded tokens is wrong for most tokenizers (a space before a word, a character of several tokens), so
text is the difference of two decoded windows, and an incomplete character is held back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_INCOMPLETE = "�"
_LONGEST_CHARACTER = 4


class TextStream:
    """Feed tokens, get text. `stopped` says that a stop string was met; the text ends before it."""

    def __init__(
        self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int], stop_strings: Sequence[str] = ()
    ) -> None:
        self._decode = decode
        self._stop_strings = tuple(text for text in stop_strings if text)
        self._tokens = list(prompt[-8:])
        self._read = len(self._tokens)
        self._window = 0
        self._held = ""
        self.text = ""
        self.stopped = False

    def feed(self, token: int) -> str:
        """The text that is certain after one more token."""
        self._tokens.append(token)
        return self._release(self._new_text(final=False), final=False)

    def finish(self) -> str:
        """What was held back."""
        return self._release(self._new_text(final=True), final=True)

    def _new_text(self, final: bool) -> str:
        before = self._decode(self._tokens[self._window : self._read])
        whole = self._decode(self._tokens[self._window :])
        waiting = len(self._tokens) - self._read
        if not final and whole.endswith(_INCOMPLETE) and waiting < _LONGEST_CHARACTER:
            return ""
        self._window, self._read = self._read, len(self._tokens)
        return whole[len(before) :]

    def _release(self, new: str, final: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        ends = [place for stop in self._stop_strings if (place := text.find(stop)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return self._emit(text[: min(ends)])
        kept = 0 if final else max((_shared_end(text, stop) for stop in self._stop_strings), default=0)
        self._held = text[len(text) - kept :]
        return self._emit(text[: len(text) - kept])

    def _emit(self, text: str) -> str:
        self.text += text
        return text


def _shared_end(text: str, stop: str) -> int:
    """How many last characters of the text are the beginning of the stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
