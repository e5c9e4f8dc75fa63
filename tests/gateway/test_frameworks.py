"""Agents in other people's frameworks, unchanged but for `base_url` and `api_key`: every call goes on token by token."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import agents
import pytest
from autogen_agentchat.agents import AssistantAgent
from autogen_core import CancellationToken
from autogen_core.models import (
    AssistantMessage,
    FunctionExecutionResult,
    FunctionExecutionResultMessage,
    LLMMessage,
    SystemMessage,
    UserMessage,
)
from autogen_core.tools import FunctionTool
from autogen_ext.models.openai import OpenAIChatCompletionClient
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.messages import SystemMessage as LangChainSystem
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from tests.gateway.conftest import Stage, assert_continues

agents.set_tracing_disabled(True)


def call(query: str) -> str:
    return "<tool_call>" + json.dumps({"name": "search", "arguments": {"query": query, "limit": 2}}) + "</tool_call>"


# Four tool calls in three turns, words beside some of them, characters that JSON may escape.
SCRIPT = [call("Par is"), "Let me see.\n" + call('"ü" \\ n'), call("a") + call("b"), " It is in France. "]


def search(query: str, limit: int = 3) -> str:
    """Searches the encyclopedia."""
    return f"{limit} results for {query} é"


def assert_exact(stage: Stage, role: str, calls: int = 4) -> None:
    transitions = stage.transitions()
    assert [t.role for t in transitions] == [role] * calls
    assert [t.continues for t in transitions] == [None, *range(calls - 1)]
    for earlier, later in zip(transitions, transitions[1:], strict=False):
        new = stage.read(assert_continues(later, earlier))
        assert new.startswith("<|im_start|>tool\n<tool_response>2 results for ") and new.endswith("<|im_start|>assistant\n")
        assert new.count("<tool_response>") == earlier.text.count("<tool_call>")
    assert all(t.trainable for t in transitions)


# LangChain


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("responses_api", [False, True], ids=["chat", "responses"])
def test_langchain(stage: Stage, streaming: bool, responses_api: bool) -> None:
    stage.play(SCRIPT)
    model = ChatOpenAI(
        model="policy:researcher",
        base_url=stage.url,
        api_key=SecretStr(stage.key),
        streaming=streaming,
        use_responses_api=responses_api,
    )
    bound = model.bind_tools([tool(search)])
    messages: list[Any] = [LangChainSystem("Be brief."), HumanMessage("Where is Paris?")]
    while True:
        reply = bound.invoke(messages)
        messages.append(reply)
        if not reply.tool_calls:
            break
        for made in reply.tool_calls:
            messages.append(ToolMessage(search(**made["args"]), tool_call_id=made["id"]))
    assert reply.text.strip() == "It is in France."
    assert_exact(stage, "researcher")


def test_langchain_in_a_thread_of_its_own_for_each_rollout(stage: Stage) -> None:
    stage.play(lambda prompt: prompt.split("user\n")[1].split("<")[0].upper())
    keys = [stage.gateway.open(f"rollout {k}", seed=0) for k in range(4)]

    async def run() -> list[str]:
        models = [ChatOpenAI(model="policy", base_url=stage.url, api_key=SecretStr(key)) for key in keys]
        replies = await asyncio.gather(*(model.ainvoke(f"word{k}") for k, model in enumerate(models)))
        return [reply.text for reply in replies]

    assert asyncio.run(run()) == [f"WORD{k}" for k in range(4)]
    assert [[t.text for t in stage.gateway.close(key).transitions] for key in keys] == [[f"WORD{k}"] for k in range(4)]


# OpenAI Agents SDK


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("api", ["responses", "chat_completions"])
def test_openai_agents_sdk(stage: Stage, api: str, streaming: bool) -> None:
    stage.play(SCRIPT)

    async def run() -> str:
        async with stage.async_client() as client:
            kind = agents.OpenAIResponsesModel if api == "responses" else agents.OpenAIChatCompletionsModel
            agent = agents.Agent(
                name="researcher",
                instructions="Be brief.",
                model=kind("policy:researcher", client),
                tools=[agents.function_tool(search)],
            )
            if not streaming:
                return (await agents.Runner.run(agent, "Where is Paris?")).final_output
            result = agents.Runner.run_streamed(agent, "Where is Paris?")
            async for _ in result.stream_events():
                pass
            return result.final_output

    assert asyncio.run(run()).strip() == "It is in France."
    assert_exact(stage, "researcher")


def test_openai_agents_sdk_hands_over_between_roles(stage: Stage) -> None:
    stage.play(['<tool_call>{"name": "transfer_to_writer", "arguments": {}}</tool_call>', "Done."])

    async def run() -> str:
        async with stage.async_client() as client:
            writer = agents.Agent(name="writer", model=agents.OpenAIResponsesModel("policy:writer", client))
            triage = agents.Agent(name="triage", model=agents.OpenAIResponsesModel("policy:triage", client), handoffs=[writer])
            return (await agents.Runner.run(triage, "Write.")).final_output

    assert asyncio.run(run()) == "Done."
    assert [(t.role, t.continues) for t in stage.transitions()] == [
        ("triage", None),
        ("writer", None),
    ]  # other tools: a new prompt


def test_openai_agents_sdk_with_the_server_keeping_the_conversation(stage: Stage) -> None:
    stage.play(SCRIPT)

    async def run() -> str:
        async with stage.async_client() as client:
            model = agents.OpenAIResponsesModel("policy:researcher", client)
            agent = agents.Agent(name="researcher", model=model, tools=[agents.function_tool(search)])
            first = await agents.Runner.run(agent, "Where is Paris?", auto_previous_response_id=True)
            return first.final_output

    assert asyncio.run(run()).strip() == "It is in France."
    assert_exact(stage, "researcher")


# AutoGen


def autogen_client(stage: Stage) -> OpenAIChatCompletionClient:
    info: Any = {
        "vision": False,
        "function_calling": True,
        "json_output": False,
        "family": "unknown",
        "structured_output": False,
    }
    return OpenAIChatCompletionClient(model="policy:researcher", base_url=stage.url, api_key=stage.key, model_info=info)


def test_autogens_agent(stage: Stage) -> None:
    stage.play(SCRIPT)

    async def run() -> str:
        client = autogen_client(stage)
        agent = AssistantAgent(
            "researcher", client, tools=[search], system_message="Be brief.", max_tool_iterations=5, reflect_on_tool_use=False
        )
        result = await agent.run(task="Where is Paris?")
        await client.close()
        return result.messages[-1].content

    assert asyncio.run(run()).strip() == "It is in France."
    assert_exact(stage, "researcher")


@pytest.mark.parametrize("streaming", [False, True])
def test_autogens_client(stage: Stage, streaming: bool) -> None:
    stage.play(SCRIPT)

    async def run() -> str:
        client = autogen_client(stage)
        tools = [FunctionTool(search, description="Searches.", name="search")]
        messages: list[LLMMessage] = [SystemMessage(content="Be brief."), UserMessage(content="Where is Paris?", source="user")]
        while True:
            result: Any
            if streaming:
                async for result in client.create_stream(messages, tools=tools):  # noqa: B007
                    pass
            else:
                result = await client.create(messages, tools=tools)
            if isinstance(result.content, str):
                await client.close()
                return result.content
            messages.append(AssistantMessage(content=result.content, source="researcher", thought=result.thought))
            outputs = []
            for made in result.content:
                text = await tools[0].run_json(json.loads(made.arguments), CancellationToken())
                outputs.append(FunctionExecutionResult(content=str(text), call_id=made.id, name=made.name, is_error=False))
            messages.append(FunctionExecutionResultMessage(content=outputs))

    assert asyncio.run(run()).strip() == "It is in France."
    assert_exact(stage, "researcher")
