"""Messages to token ids and back, through any tokenizer with a chat template."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from lightningrl.gateway.errors import GatewayError, is_unicode
from lightningrl.gateway.protocol import Message, Tool

# Unicode noncharacters: reserved for uses inside a program, so a text that holds all of them doesn't occur.
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


class Renderer:
    """Tokenises conversations such that only the chat template can produce a special token, never what somebody wrote.

    Raises `GatewayError` for a tokenizer without a chat template, or whose template doesn't close an assistant's turn with
    the end-of-sequence token.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise GatewayError("the tokenizer has no chat template: set tokenizer.chat_template, as train_tokenizer does")
        self._tokenizer, self._names = tokenizer, dict(tokenizer.special_tokens_map)
        self._templates = {offered: tokenizer.get_chat_template(tools=[{}] if offered else None) for offered in (False, True)}
        self.end: str = tokenizer.eos_token
        self.end_id: int = tokenizer.eos_token_id
        self.vocabulary = len(tokenizer)
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        if "ByteLevel" not in json.dumps(state["decoder"]):
            raise GatewayError("the tokenizer is not byte-level BPE: take one that is, such as Qwen's, Llama 3's or train_tokenizer's")
        self._added = {token["content"]: token["id"] for token in state["added_tokens"]}
        self._hidden = {token["id"] for token in state["added_tokens"] if token["special"]}
        self._marker = re.compile("(" + "|".join(map(re.escape, sorted(self._added, key=len, reverse=True))) + ")")
        state["added_tokens"] = []
        plain = Tokenizer.from_str(json.dumps(state))
        self._encode_text = functools.lru_cache(maxsize=8192)(lambda text: plain.encode(text, add_special_tokens=False).ids)
        self.token_bytes = functools.lru_cache(maxsize=None)(self._token_bytes)
        # The runs of a group start with one prompt and often see the same results; a template that asks for the date may change.
        dated = any("strftime_now" in template for template in self._templates.values())
        remembered = functools.lru_cache(maxsize=0 if dated else 512)
        self._prompt, self._continuation = remembered(self._new_prompt), remembered(self._new_continuation)
        self._base = self._template([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}], None, False)
        end_of_turn = self._base.rfind(self.end)
        if end_of_turn < self._base.rfind("!"):
            raise GatewayError(f"the chat template does not close an assistant's turn with the eos token {self.end}")
        self._after_turn = self._base[end_of_turn + len(self.end) :]

    def prompt(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[int]:
        """Token ids of a whole conversation, ready for the assistant's turn."""
        written = [_entry(message) for message in messages], [tool.model_dump(exclude_none=True) for tool in tools]
        return self._prompt(json.dumps(written)).tolist()

    def _new_prompt(self, written: str) -> np.ndarray:
        entries, definitions, sentinel = self._shield(*json.loads(written))
        return as_ids(self._encode(self._template(entries, definitions or None, True), sentinel))

    def continuation(self, messages: Sequence[Message], *, ended: bool) -> list[int] | None:
        """Token ids that follow an assistant's turn: its end unless it `ended`, `messages`, the opening of the next turn.

        None where the template writes what follows a turn differently depending on what comes later.
        """
        new = self._continuation(json.dumps([_entry(message) for message in messages]))
        if new is None:
            return None
        return new.tolist() if ended else [self.end_id, *new.tolist()]

    def _new_continuation(self, written: str) -> np.ndarray | None:
        entries, _, sentinel = self._shield(json.loads(written), [])
        before = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        text = self._template([*before, *entries], None, True)
        if not text.startswith(self._base):
            return None
        return as_ids(self._encode(self._after_turn + text[len(self._base) :], sentinel))

    def raw(self, text: str) -> list[int]:
        """Token ids of a text whose writer renders conversations himself: here markers are tokens."""
        return self._encode(text, None)

    def text(self, ids: Iterable[int]) -> str:
        """Text of response tokens: special tokens left out, tool-call markers kept."""
        return self.text_bytes(ids).decode("utf-8", errors="replace")

    def text_bytes(self, ids: Iterable[int]) -> bytes:
        hidden, token_bytes = self._hidden, self.token_bytes
        return b"".join(token_bytes(i) for i in ids if i not in hidden)

    def _token_bytes(self, token_id: int) -> bytes:
        token: str | None = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None:  # a policy may have more logits than its tokenizer has tokens
            return b""
        if token in self._added:
            return token.encode()
        return bytes(_BYTES[character] for character in token)

    def _template(self, entries: list[dict[str, Any]], tools: list[Any] | None, open_turn: bool) -> str:
        # What tokenizer.apply_chat_template does with entries that are plain JSON, without the conversions of others.
        template = self._templates[bool(tools)]
        rendered = render_jinja_template([entries], tools, chat_template=template, add_generation_prompt=open_turn, **self._names)
        return rendered[0][0]

    def _encode(self, text: str, sentinel: str | None) -> list[int]:
        ids: list[int] = []
        for k, piece in enumerate(self._marker.split(text)):
            if k % 2:
                ids.append(self._added[piece])
            elif piece:
                ids.extend(self._encode_text(piece.replace(sentinel, "") if sentinel else piece))
        return ids

    def _shield(self, entries: Any, tools: Any) -> tuple[Any, Any, str | None]:
        # A marker that somebody wrote is broken up by a sentinel while the template is rendered; _encode takes it out again.
        strings = list(_strings([entries, tools]))
        if not any(map(self._marker.search, strings)):
            return entries, tools, None
        sentinel = next(c for c in _NONCHARACTERS if not any(c in string for string in strings))

        def shield(value: Any) -> Any:
            if isinstance(value, str):
                return self._marker.sub(lambda match: match[0][:1] + sentinel + match[0][1:], value)
            if isinstance(value, dict):
                return {shield(key): shield(item) for key, item in value.items()}
            return [shield(item) for item in value] if isinstance(value, list) else value

        # A role is one of four words; keys of the template's own fields hold no marker.
        return shield(entries), shield(tools), sentinel


def _entry(message: Message) -> dict[str, Any]:
    entry: dict[str, Any] = {"role": message.speaker, "content": message.text}
    if message.tool_calls:
        calls = [(call.function.name, parsed_arguments(call.function.arguments)) for call in message.tool_calls]
        entry["tool_calls"] = [{"type": "function", "function": {"name": name, "arguments": args}} for name, args in calls]
    return entry


def parsed_arguments(arguments: str | dict[str, Any]) -> Any:
    """Arguments as an object if they are JSON of one, else the text itself."""
    if isinstance(arguments, dict):
        return arguments
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) and is_unicode(value) else arguments


def as_ids(ids: Sequence[int]) -> np.ndarray:
    return np.asarray(ids, dtype=np.int32)


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value  # keys: argument names are the client's, too
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _byte_alphabet() -> dict[str, int]:
    # GPT-2's printable stand-ins for the 256 bytes.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + k): byte for k, byte in enumerate(others)}


_BYTES = _byte_alphabet()
