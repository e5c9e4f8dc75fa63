"""`/v1/completions`."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.gateway.conftest import Stage, assert_continues


def test_a_text_is_gone_on_with_and_markers_in_it_are_tokens(stage: Stage) -> None:
    stage.play(["In France."])
    answer = stage.client().completions.create(model="policy:writer", prompt="<|im_start|>user\nhi<|im_end|>")
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("In France.", "stop")
    (transition,) = stage.transitions()
    assert transition.prompt_ids.tolist() == stage.tokenizer.encode("<|im_start|>user\nhi<|im_end|>")
    assert (transition.role, transition.prompt_ids[0], transition.prompt_ids[-1]) == ("writer", 1, 2)
    assert answer.usage is not None
    assert answer.usage.total_tokens == len(transition.prompt_ids) + len(transition.response_ids)


@pytest.mark.parametrize("form", [list, lambda ids: [ids]], ids=["ids", "one prompt of ids"])
def test_token_ids_are_a_prompt_as_they_are(stage: Stage, form: Any) -> None:
    stage.play(["A"])
    ids = [1, 300, 20, 7, 7, 2]
    stage.client().completions.create(model="policy", prompt=form(ids))
    assert stage.transitions()[0].prompt_ids.tolist() == ids


def test_a_text_that_starts_with_an_earlier_call_goes_on_token_by_token(stage: Stage) -> None:
    stage.play(["sing er", "B", "C"])
    client = stage.client()
    first = client.completions.create(model="policy", prompt="The word", stop=[" "]).choices[0].text
    assert first == "sing"
    said = client.completions.create(model="policy", prompt="The wordsing ").choices[0].text
    client.completions.create(model="policy", prompt=f"The wordsing {said}<|im_end|>and")
    transitions = stage.transitions()
    assert_continues(transitions[1], transitions[0])
    assert stage.read(assert_continues(transitions[2], transitions[1])) == "and"


def test_a_text_without_the_end_of_turn_that_was_sampled_is_no_continuation(stage: Stage) -> None:
    stage.play(["B", "C"])
    client = stage.client()
    client.completions.create(model="policy", prompt="A")
    client.completions.create(model="policy", prompt="AB and")
    assert [t.continues for t in stage.transitions()] == [None, None]


def test_streaming_n_and_logprobs(stage: Stage) -> None:
    stage.play(["é one", "two"] * 2)
    client = stage.client()
    whole = client.completions.create(model="policy", prompt="A", n=2, logprobs=1)
    texts = ["", ""]
    for chunk in client.completions.create(model="policy", prompt="A", n=2, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices] == ["é one", "two"]
    assert chunk.usage == whole.usage
    transitions = stage.transitions()
    assert len(transitions) == 4
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs == [float(x) for x in transitions[0].logprobs]
    assert logprobs.top_logprobs is not None and len(logprobs.top_logprobs) == len(logprobs.text_offset or ())


@pytest.mark.parametrize("prompt", [["a", "b"], [[1], [2]], [-1], [10_000_000], 3, None])
def test_a_prompt_that_is_none_is_400(stage: Stage, prompt: Any) -> None:
    stage.play([])
    with pytest.raises(openai.BadRequestError) as caught:
        stage.client().completions.create(model="policy", prompt=prompt)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize("stream", [False, True])
def test_token_ids_beside_the_text_for_who_asks(stage: Stage, stream: bool) -> None:
    stage.play(["sing er"])
    extra = {"return_token_ids": True, "return_tokens_as_token_ids": True}
    answer = stage.client().completions.create(model="policy", prompt=[20, 7, 2], logprobs=2, stream=stream, extra_body=extra)
    choice = [part for part in answer if part.choices][-1].choices[0] if stream else answer.choices[0]
    (transition,) = stage.transitions()
    ids = transition.response_ids.tolist()
    assert (choice.prompt_token_ids, choice.token_ids) == ([20, 7, 2], ids)
    assert choice.logprobs.tokens == [f"token_id:{token}" for token in ids]
    assert choice.logprobs.token_logprobs == transition.logprobs.tolist()
    alternatives = [[f"token_id:{(token + k) % 256 + 7}" for k in range(2)] for token in ids]  # what the script says
    assert [list(top) for top in choice.logprobs.top_logprobs] == alternatives

    stage.play(["sing er"])
    plain = stage.client().completions.create(model="policy", prompt=[20, 7, 2], logprobs=0)
    assert not hasattr(plain.choices[0], "token_ids") and plain.choices[0].logprobs.tokens[0] == "s"


@pytest.mark.parametrize("prompt", ["", [], [[]], [""]])
def test_an_empty_prompt_is_400(stage: Stage, prompt: Any) -> None:
    stage.play([])
    with pytest.raises(openai.BadRequestError, match="The prompt is empty"):
        stage.client().completions.create(model="policy", prompt=prompt)


def test_a_tiny_temperature_is_greedy(stage: Stage) -> None:
    """Logits over 1e-30 are infinite, and so would be the log-probs that are trained on."""
    stage.play(["A"])
    stage.client().completions.create(model="policy", prompt="x", temperature=1e-30)
    (transition,) = stage.transitions()
    assert (transition.temperature, transition.trainable) == (0.0, False)
