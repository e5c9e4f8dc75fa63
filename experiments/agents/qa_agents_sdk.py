"""Multi-hop question answering in the OpenAI Agents SDK: one agent with a search tool searches, reads, searches again and answers.

Nothing here knows that the endpoint may be learning. A corpus is a file of passages, one `{"title": …, "text": …}` a line:

    python -m experiments.agents.qa_agents_sdk --base_url URL --api_key KEY --corpus corpus.jsonl "Who is the mayor of Ann's home?"
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import agents
import httpx2
import openai

MODEL = "policy:agent"
SYSTEM = "Search as often as needed. Then say <answer> the answer </answer>."
REQUEST = "{question}"
ANSWER = "<answer> {answer} </answer>"

MAX_TURNS = 6  # the last may only answer: a search in it comes to nothing
MAX_TOKENS = 64
RESULTS = 3
MAX_CHARS = 600  # of a passage

Search = Callable[[str, str, int], str]  # (corpus, query, results) -> passages, one a line
API = Literal["chat", "responses"]


@dataclasses.dataclass(frozen=True)
class Library:
    """Where one run searches."""

    corpus: str
    results: int
    find: Search


def on_bad_call(context: agents.RunContextWrapper[Any], error: Exception) -> str:
    """A call that the model got wrong is its own affair; that a search fails is not."""
    if isinstance(error, agents.ModelBehaviorError):
        return "error: a search needs one query"
    raise error


@agents.function_tool(failure_error_function=on_bad_call)
async def search(context: agents.RunContextWrapper[Library], query: str) -> str:
    """Finds passages."""
    library = context.context
    return library.find(library.corpus, query, library.results)


UNTRACED = agents.RunConfig(tracing_disabled=True)
SETTINGS = agents.ModelSettings(temperature=1.0, max_tokens=MAX_TOKENS)


@functools.lru_cache(maxsize=16)
def connections(base_url: str) -> openai.DefaultAsyncHttpxClient:
    """One pool for all runs against an endpoint: setting up TLS takes longer than a call.

    Few idle connections are kept, because the pool looks at every one of them on every request.
    """
    return openai.DefaultAsyncHttpxClient(limits=httpx2.Limits(max_connections=1000, max_keepalive_connections=4))


@functools.lru_cache(maxsize=16)
def indexed(corpus: str) -> tuple[list[dict[str, str]], Any]:
    """The passages of a corpus file and their BM25 index."""
    import bm25s

    passages = [json.loads(line) for line in Path(corpus).read_text("utf-8").splitlines() if line.strip()]
    index = bm25s.BM25()
    words = bm25s.tokenize([f"{passage['title']}\n{passage['text']}" for passage in passages], stopwords="en", show_progress=False)
    index.index(words, show_progress=False)
    return passages, index


def bm25(corpus: str, query: str, results: int = RESULTS) -> str:
    """The passages that have most of the query's words, as `title: text`."""
    import bm25s

    passages, index = indexed(corpus)
    words = bm25s.tokenize([query], stopwords="en", return_ids=False, show_progress=False)
    found = index.retrieve(words, k=min(results, len(passages)), show_progress=False).documents[0]
    return "\n".join(f"{passages[i]['title']}: {passages[i]['text'][:MAX_CHARS]}" for i in found)


async def answer(task: Mapping[str, Any], base_url: str, api_key: str, find: Search = bm25, api: API = "chat", model: str = MODEL) -> str:
    """Answers `task["question"]` from the passages in `task["corpus"]`; returns the last reply, which holds `<answer> … </answer>`.

    It is empty if the agent was still searching after `MAX_TURNS` calls. `task["results"]`, if given, is how many passages a
    search returns.
    """
    client = openai.AsyncOpenAI(base_url=base_url, api_key=api_key, http_client=connections(base_url))
    kind = agents.OpenAIResponsesModel if api == "responses" else agents.OpenAIChatCompletionsModel
    # An agent for every run: with one for all, the SDK looks at every run of it in every turn.
    agent = agents.Agent[Library](
        name="researcher", instructions=SYSTEM, tools=[search], model=kind(model, client), model_settings=SETTINGS
    )
    library = Library(task["corpus"], task.get("results", RESULTS), find)
    request = REQUEST.format(question=task["question"])
    try:
        result = await agents.Runner.run(agent, request, context=library, max_turns=MAX_TURNS, run_config=UNTRACED)
    except agents.MaxTurnsExceeded:
        return ""
    return result.final_output


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer a question from a file of passages.")
    parser.add_argument("--base_url", required=True, help="an OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1")
    parser.add_argument("--api_key", required=True)
    parser.add_argument("--corpus", required=True, help='a file of passages, one {"title": ..., "text": ...} a line')
    parser.add_argument("--model", default=MODEL, help="the endpoint's name for the model")
    parser.add_argument("--api", choices=["chat", "responses"], default="chat")
    parser.add_argument("question")
    args = parser.parse_args()
    if not Path(args.corpus).is_file():
        parser.error(f"there is no file {args.corpus}: give --corpus a file of passages")
    task = {"question": args.question, "corpus": args.corpus}
    print(asyncio.run(answer(task, args.base_url, args.api_key, api=args.api, model=args.model)))


if __name__ == "__main__":
    main()
