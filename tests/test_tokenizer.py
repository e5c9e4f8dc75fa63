"""The policy's tokenizer: any text comes back, the template is cheap, training is deterministic."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from lightningrl.tokenizer import END, PAD, ROLES, START, TOOL_MARKERS, train_tokenizer

CORPUS = ["How many singers are there?", "SELECT count(*) FROM singer WHERE age > 20", "concert.concert_id = singer.id"] * 8
CALL = {"type": "function", "function": {"name": "search", "arguments": {"query": "ü", "k": 3}}}
CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where is Paris?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "In France."},
    {"role": "tool", "content": "In Texas."},
    {"role": "assistant", "content": "In France."},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "search",
            "description": "Searches.",
            "parameters": {
                "type": "object",
                "properties": {"query": {"type": "string", "title": "Query"}, "k": {"type": "integer", "minimum": 1}},
                "required": ["query"],
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(CORPUS, 512)


def render(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


@hypothesis.given(st.text())
def test_any_text_round_trips(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", ["", " ", "\n\n a", "user\nuser\n", "😀é\u0301\u200d", "a_b__c 3.14e-7 'x''y'", "\x00\x7f\xa0"])
def test_awkward_texts_round_trip(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_markers_are_single_tokens_with_fixed_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    assert [tokenizer.encode(token) for token in (PAD, START, END, *TOOL_MARKERS)] == [[k] for k in range(7)]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 2)
    assert len(tokenizer) <= 512


def test_decoding_without_special_tokens_keeps_tool_calls(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer.encode('<tool_call>{"a": 1}</tool_call><|im_end|>')
    assert tokenizer.decode(ids, skip_special_tokens=True) == '<tool_call>{"a": 1}</tool_call>'


@pytest.mark.parametrize("role", ROLES)
def test_a_role_marker_is_two_tokens_whatever_the_corpus(role: str) -> None:
    for corpus in ([], ["zzz qqq"] * 200, CORPUS):
        assert len(train_tokenizer(corpus, 400).encode(f"{START}{role}\n")) == 2


def test_a_turn_costs_three_tokens_beside_its_text(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "How many singers are there?"
    turn = tokenizer.encode(render(tokenizer, [{"role": "user", "content": text}]))
    assert len(turn) == len(tokenizer.encode(text)) + 3


def test_a_tool_call_costs_four_tokens_beside_its_words() -> None:
    """Its markers are two more; a word that the corpus repeats is one."""
    made = train_tokenizer(["origin of Mill", "search", "query"] * 40, 600)
    call = '<tool_call>{"name": "search", "arguments": {"query": "origin of Mill"}}</tool_call>'
    pieces = [made.decode([token]) for token in made.encode(call)]
    written = ['{"name": "', "search", '", "arguments": {"', "query", '": "', "origin", " of", " Mill", '"}}']
    assert pieces == ["<tool_call>", *written, "</tool_call>"]


def test_the_template_in_full(tokenizer: PreTrainedTokenizerFast) -> None:
    call = '<tool_call>{"name": "search", "arguments": {"query": "ü", "k": 3}}</tool_call>'
    assert render(tokenizer, CONVERSATION, tools=TOOLS, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.\nTools:\n"
        'search(query: string, k: {"type": "integer", "minimum": 1}): Searches.\nnow()<|im_end|>'
        "<|im_start|>user\nWhere is Paris?<|im_end|>"
        f"<|im_start|>assistant\n{call}{call}<|im_end|>"
        "<|im_start|>tool\n<tool_response>In France.</tool_response><tool_response>In Texas.</tool_response><|im_end|>"
        "<|im_start|>assistant\nIn France.<|im_end|>"
        "<|im_start|>assistant\n"
    )


def test_tools_without_a_system_message_get_one(tokenizer: PreTrainedTokenizerFast) -> None:
    text = render(tokenizer, CONVERSATION[1:2], tools=TOOLS[1:])
    assert text == "<|im_start|>system\nTools:\nnow()<|im_end|><|im_start|>user\nWhere is Paris?<|im_end|>"


def test_every_prefix_of_a_conversation_is_a_prefix_of_its_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = tokenizer.encode(render(tokenizer, CONVERSATION))
    for k in (1, 2, 3, 5):
        part = tokenizer.encode(render(tokenizer, CONVERSATION[:k]))
        assert whole[: len(part)] == part


def test_saved_and_loaded_it_is_the_same(tokenizer: PreTrainedTokenizerFast, tmp_path: pathlib.Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    text = render(tokenizer, CONVERSATION, tools=TOOLS)
    assert render(loaded, CONVERSATION, tools=TOOLS) == text
    ids = tokenizer.encode(text)
    assert loaded.encode(text) == ids
    assert loaded.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids, skip_special_tokens=True)
    assert (loaded.eos_token_id, loaded.pad_token_id, len(loaded)) == (2, 0, len(tokenizer))


@pytest.mark.slow
def test_training_is_deterministic_across_processes(tokenizer: PreTrainedTokenizerFast) -> None:
    program = (
        f"from lightningrl.tokenizer import train_tokenizer\nprint(train_tokenizer({CORPUS!r}, 512).backend_tokenizer.to_str(), end='')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, encoding="utf-8", check=True)
    assert done.stdout == tokenizer.backend_tokenizer.to_str()


def test_rendered_conversations_in_the_corpus_teach_no_marker_fragments() -> None:
    tokenizer = train_tokenizer(["<|im_start|>user\nhello<|im_end|>"] * 50, 400)
    pieces = set(tokenizer.get_vocab()) - {PAD, START, END, *TOOL_MARKERS}
    assert not [piece for piece in pieces if "im" in piece and "|" in piece]
    assert len(tokenizer.encode("<|im_start|>user\nhello<|im_end|>")) == 4


def test_a_vocabulary_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size is 200, but 256 bytes and 7 markers need at least 263"):
        train_tokenizer(CORPUS, 200)
