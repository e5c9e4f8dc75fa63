"""The policy's tokenizer: byte-level BPE trained on the spot, and its chat template.

A policy of a million parameters pays for every token, so the template is ChatML at its cheapest: a role marker is two tokens
(`<|im_start|>` and, say, `assistant` with its line break, which training makes one token) and the end of a turn is one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD = "<|endoftext|>"
START = "<|im_start|>"
END = "<|im_end|>"
# Single tokens of the vocabulary that are part of the text a model writes or reads, so decoding keeps them.
TOOL_MARKERS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

CHAT_TEMPLATE = """\
{%- macro schema(property) -%}
{%- set others = property | reject("in", ["type", "title"]) | list if property is mapping else [true] -%}
{{ property.type if property.type is string and not others else property | tojson }}
{%- endmacro -%}
{%- macro catalogue() -%}
Tools:{%- for tool in tools %}{%- set f = tool.function if tool.function is defined else tool -%}
{{ "\n" ~ f.name }}({%- for name, property in ((f.parameters or {}).properties or {}).items() -%}
{{ name }}: {{ schema(property) }}{{ ", " if not loop.last }}{%- endfor -%}){{ ": " ~ f.description if f.description }}
{%- endfor -%}
{%- endmacro -%}
{%- if tools and (not messages or messages[0].role != "system") -%}
<|im_start|>system
{{ catalogue() }}<|im_end|>
{%- endif -%}
{%- for message in messages -%}
{%- if message.role != "tool" -%}
<|im_start|>{{ message.role }}
{{ message.content if message.content }}
{%- if loop.first and tools and message.role == "system" %}{{ "\n" if message.content }}{{ catalogue() }}{%- endif -%}
{%- for call in message.tool_calls or [] -%}
{%- set f = call.function if call.function is defined else call -%}
{%- set arguments = f.arguments if f.arguments is string else f.arguments | tojson -%}
<tool_call>{"name": {{ f.name | tojson }}, "arguments": {{ arguments }}}</tool_call>
{%- endfor -%}
<|im_end|>
{%- else -%}
{%- if loop.first or loop.previtem.role != "tool" -%}<|im_start|>tool
{% endif -%}
<tool_response>{{ message.content if message.content }}</tool_response>
{%- if loop.last or loop.nextitem.role != "tool" -%}<|im_end|>{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
"""

ROLES = ("system", "user", "assistant", "tool")
_CALL = ('{"name": "', '", "arguments": {"', '": "', '"}}')  # what a tool call writes around its words
_MARKUP = ("Tools:\n", ": string", ": integer", *_CALL)
# Words as GPT-2 splits them, but identifiers such as `singer_id` stay whole, a role marker with its line break is one word
# where it opens a turn (tokens of the template are cut out first, so a turn starts at \A), and so is what a tool call has around
# its words: a policy writes it in every call, and a third of a short call's tokens would be quotes and braces.
_WORDS = (
    r"\A(?:"
    + "|".join(ROLES)
    + r")\n|"
    + "|".join(map(re.escape, _CALL))
    + r"|'(?:[sdmt]|ll|ve|re)| ?[\p{L}_]+| ?\p{N}+| ?[^\s\p{L}\p{N}_]+|\s+(?!\S)|\s+"
)
_MARKER = re.compile("|".join(re.escape(token) for token in (PAD, START, END, *TOOL_MARKERS)))
_PHRASES = (*(f"{role}\n" for role in ROLES), *_MARKUP)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer (arXiv 1508.07909, §3.2, on bytes) with a ChatML chat template.

    Any text round-trips, also one with bytes never seen in training. Texts may hold whole rendered conversations: markers such
    as `<|im_end|>` in them are tokens, not text to learn merges from. The template's own phrases count as often as there are
    texts, so a role marker is one token whatever the corpus. The same texts in the same order give the same tokenizer.

    Args:
        texts: what the policy will read and write.
        vocab_size: largest number of tokens, at least 263 (256 bytes and 7 markers); fewer come out of a small corpus.

    Returns:
        A fast tokenizer: pad `<|endoftext|>` (id 0), end of turn `<|im_end|>` (eos), nothing added by `encode`.

    Raises:
        ValueError: if `vocab_size` is less than 263.
    """
    tokens = (PAD, START, END, *TOOL_MARKERS)
    smallest = 256 + len(tokens)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size is {vocab_size}, but 256 bytes and {len(tokens)} markers need at least {smallest}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, normalized=False) for token in tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_pieces(texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=_keep_tool_markers_in_text(tokenizer),
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _keep_tool_markers_in_text(tokenizer: Tokenizer) -> Tokenizer:
    # The trainer makes every reserved token special, and decoding without special tokens would then lose the tool calls.
    state = json.loads(tokenizer.to_str())
    for token in state["added_tokens"]:
        token["special"] = token["content"] not in TOOL_MARKERS
    return Tokenizer.from_str(json.dumps(state))


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    count = 0
    for text in texts:
        count += 1
        yield from filter(None, _MARKER.split(text))
    for _ in range(max(count, 64)):
        yield from _PHRASES
