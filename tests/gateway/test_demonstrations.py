"""A demonstration is encoded as the gateway would have recorded it."""

from __future__ import annotations

from typing import Any

import numpy as np

from lightningrl.gateway.rendering import Renderer
from lightningrl.types import DemonstratedCall
from lightningrl.warm_start import encode
from tests.gateway.conftest import Stage, assert_continues

PARAMETERS = {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}
SEARCH: Any = {"type": "function", "function": {"name": "search", "description": "Finds passages.", "parameters": PARAMETERS}}
START = [{"role": "system", "content": "Answer."}, {"role": "user", "content": "Where is Pa ris?"}]
CALL = '<tool_call>{"name": "search", "arguments": {"query": "Pa ris"}}</tool_call>'


def test_tool_calls_are_encoded_as_a_client_has_them_recorded(stage: Stage) -> None:
    stage.play([CALL, "In France."], spell=False)
    client, messages = stage.client(), list[Any](START)
    said = client.chat.completions.create(model="policy", messages=messages, tools=[SEARCH]).choices[0].message
    messages += [said.model_dump(), {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": "Paris: a city."}]
    client.chat.completions.create(model="policy", messages=messages, tools=[SEARCH])
    recorded = stage.transitions()

    after = [*START, {"role": "assistant", "content": CALL}, {"role": "tool", "content": "Paris: a city."}]
    calls = [DemonstratedCall("agent", tuple(START), CALL, (SEARCH,)), DemonstratedCall("agent", tuple(after), "In France.", (SEARCH,))]
    encoded = encode(calls, Renderer(stage.tokenizer))
    assert_continues(encoded[1], encoded[0])
    for ours, theirs in zip(encoded, recorded, strict=True):
        np.testing.assert_array_equal(ours.prompt_ids, theirs.prompt_ids)
        np.testing.assert_array_equal(ours.response_ids, theirs.response_ids)
