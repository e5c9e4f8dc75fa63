"""Tokens to text as they come: whole characters only, and nothing that may turn out to be a stop string or a tool call."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from lightningrl.gateway.rendering import Renderer


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop string."""
    found = [at for at in map(text.find, stops) if at >= 0]
    return text[: min(found)] if found else text


class TextStream:
    """Releases the part of a response that can be sent: what it has released is always a beginning of the final text."""

    def __init__(self, renderer: Renderer, stops: Sequence[str], marker: str | None, *, hold: bool = False) -> None:
        self._renderer = renderer
        self._stops = tuple(stops)
        self._marker = marker
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._text = ""
        self._hold = hold
        self._tokens = 0
        self.released = 0  # characters

    def feed(self, ids: Sequence[int]) -> str:
        """Takes all response ids so far; returns the text that is newly safe to send."""
        self._text += self._decoder.decode(self._renderer.text_bytes(ids[self._tokens :]))
        self._tokens = len(ids)
        if self._hold:
            return ""
        ends = (*self._stops, self._marker) if self._marker else self._stops
        safe = len(cut(self._text, ends))
        if safe < len(self._text):
            self._hold = True
        else:
            safe -= max((_overlap(self._text, end) for end in ends), default=0)
        new = self._text[self.released : safe]
        self.released += len(new)
        return new


def _overlap(text: str, end: str) -> int:
    """Length of the longest proper beginning of `end` that `text` ends with."""
    return next((k for k in range(min(len(end) - 1, len(text)), 0, -1) if text.endswith(end[:k])), 0)
