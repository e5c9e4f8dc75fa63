"""Text-to-SQL in LangGraph: write → execute → check → rewrite, at most three drafts.

Three roles, told apart by model name, talk to one OpenAI-compatible endpoint. The rewriter goes on in the writer's
conversation; the checker starts one of its own for every draft. Nothing here knows that the endpoint may be learning:

    python -m experiments.agents.sql_langgraph --base_url URL --api_key KEY --database FILE.sqlite "How many singers are there?"
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import re
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict
from urllib.parse import quote

import httpx2
import openai
from langchain_core.messages import BaseMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph
from langgraph.runtime import Runtime

WRITER = "policy:writer"
CHECKER = "policy:checker"
REWRITER = "policy:rewriter"

WRITER_SYSTEM = "Write one SQLite query."
WRITER_REQUEST = "{schema}\n{question}"
CHECKER_SYSTEM = "Is the query right? Say CORRECT or INCORRECT."
CHECKER_REQUEST = "{question}\n{sql}\nResult: {result}"
REWRITE_REQUEST = "Result: {result}\nThe check says INCORRECT. Write it again."
INCORRECT = "INCORRECT"

MAX_DRAFTS = 3
MAX_TOKENS = 64

Execute = Callable[[str, str], str]  # (database, sql) -> what the query gave, as short text


class State(TypedDict, total=False):
    task: dict[str, str]
    conversation: list[BaseMessage]  # the writer's, which the rewriter goes on with
    drafts: int
    sql: str
    result: str
    verdict: str


@dataclasses.dataclass(frozen=True)
class Tools:
    """What one run of the graph works with."""

    chat: ChatOpenAI
    models: dict[str, str]  # role name -> the endpoint's name for it
    execute: Execute

    async def ask(self, role: str, conversation: list[BaseMessage]) -> BaseMessage:
        return await self.chat.ainvoke(conversation, model=self.models.get(role, role))


async def write(state: State, runtime: Runtime[Tools]) -> State:
    conversation = [SystemMessage(WRITER_SYSTEM), HumanMessage(WRITER_REQUEST.format_map(state["task"]))]
    reply = await runtime.context.ask(WRITER, conversation)
    return {"conversation": [*conversation, reply], "sql": query_in(reply.text), "drafts": 1}


async def execute(state: State, runtime: Runtime[Tools]) -> State:
    return {"result": await asyncio.to_thread(runtime.context.execute, state["task"]["database"], state["sql"])}


async def check(state: State, runtime: Runtime[Tools]) -> State:
    request = CHECKER_REQUEST.format(question=state["task"]["question"], sql=state["sql"], result=state["result"])
    reply = await runtime.context.ask(CHECKER, [SystemMessage(CHECKER_SYSTEM), HumanMessage(request)])
    return {"verdict": reply.text}


async def rewrite(state: State, runtime: Runtime[Tools]) -> State:
    conversation = [*state["conversation"], HumanMessage(REWRITE_REQUEST.format(result=state["result"]))]
    reply = await runtime.context.ask(REWRITER, conversation)
    return {"conversation": [*conversation, reply], "sql": query_in(reply.text), "drafts": state["drafts"] + 1}


def after_writing(state: State) -> str:
    """The last draft is the answer whatever it gives, so it is neither run nor checked."""
    return "execute" if state["drafts"] < MAX_DRAFTS else END


def after_check(state: State) -> str:
    return "rewrite" if INCORRECT in state["verdict"].upper() else END


def build_graph() -> Any:
    graph = StateGraph(State, context_schema=Tools)
    graph.add_node("write", write)
    graph.add_node("execute", execute)
    graph.add_node("check", check)
    graph.add_node("rewrite", rewrite)
    graph.add_edge(START, "write")
    graph.add_edge("write", "execute")
    graph.add_edge("execute", "check")
    graph.add_conditional_edges("check", after_check, ["rewrite", END])
    graph.add_conditional_edges("rewrite", after_writing, ["execute", END])
    return graph.compile()


GRAPH = build_graph()


def query_in(text: str) -> str:
    """The SQL in a reply: the fenced block of a chatty model, or all of it."""
    fenced = re.search(r"```(?:sql|sqlite)?\s*\n(.*?)```", text, re.DOTALL | re.IGNORECASE)
    return (fenced.group(1) if fenced else text).strip()


@functools.lru_cache(maxsize=16)
def connections(base_url: str) -> openai.DefaultAsyncHttpxClient:
    """One pool for all runs against an endpoint: setting up TLS takes longer than a call.

    Few idle connections are kept, because the pool looks at every one of them on every request: of 64 concurrent
    runs, that was a seventh of the client's time.
    """
    return openai.DefaultAsyncHttpxClient(limits=httpx2.Limits(max_connections=1000, max_keepalive_connections=4))


READING = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}


def open_read_only(database: str) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{quote(database)}?mode=ro", uri=True)


def read_only(database: str, sql: str, time_limit_s: float = 2.0, max_rows: int = 5) -> str:
    """Runs one query that can do nothing but read a SQLite file, and says what came back."""
    deadline = time.monotonic() + time_limit_s
    try:
        with contextlib.closing(open_read_only(database)) as connection:
            connection.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in READING else sqlite3.SQLITE_DENY)
            connection.set_progress_handler(lambda: time.monotonic() > deadline, 10_000)
            rows = connection.execute(sql).fetchmany(max_rows)
    except (sqlite3.Error, sqlite3.Warning) as error:
        return f"error: {error}"
    return "\n".join(" | ".join(str(value) for value in row) for row in rows) or "no rows"


async def answer(
    task: dict[str, str], base_url: str, api_key: str, execute: Execute = read_only, models: dict[str, str] | None = None
) -> str:
    """Answers `task["question"]` about `task["database"]`, described by `task["schema"]`, with one SQL query."""
    chat = ChatOpenAI(
        model=WRITER,
        base_url=base_url,
        api_key=api_key,  # type: ignore[arg-type]  # pydantic makes it a secret
        temperature=1.0,
        max_tokens=MAX_TOKENS,  # type: ignore[call-arg]  # an alias of the field
        http_async_client=connections(base_url),
    )
    state = await GRAPH.ainvoke({"task": task}, context=Tools(chat, models or {}, execute))
    return state["sql"]


def schema_of(database: str) -> str:
    """The tables of a SQLite file, one a line: `singer: id, name, age`."""
    with contextlib.closing(open_read_only(database)) as connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY rowid")]
        columns = {table: connection.execute("SELECT name FROM pragma_table_info(?)", (table,)).fetchall() for table in tables}
    return "\n".join(f"{table}: {', '.join(name for (name,) in columns[table])}" for table in tables)


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer a question about a SQLite file with one query.")
    parser.add_argument("--base_url", required=True, help="an OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1")
    parser.add_argument("--api_key", required=True)
    parser.add_argument("--database", required=True, help="a SQLite file; it is only read")
    parser.add_argument("--model", help="one model for all three roles, for an endpoint that has no roles")
    parser.add_argument("question")
    args = parser.parse_args()
    if not Path(args.database).is_file():
        parser.error(f"there is no file {args.database}: give --database a SQLite file")
    try:
        schema = schema_of(args.database)
    except sqlite3.DatabaseError as error:
        parser.error(f"{args.database} is not a SQLite database ({error})")
    models = dict.fromkeys((WRITER, CHECKER, REWRITER), args.model) if args.model else None
    task = {"question": args.question, "schema": schema, "database": args.database}
    sql = asyncio.run(answer(task, args.base_url, args.api_key, models=models))
    print(sql)
    print(read_only(args.database, sql))


if __name__ == "__main__":
    main()
