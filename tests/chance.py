"""A walk of up to three calls whose policy is a table of chances, so that every state's value can be worked out exactly."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import httpx
import numpy as np

from lightningrl.tokenizer import train_tokenizer
from lightningrl.types import Completion, Rollout, SamplingParams

Words = tuple[str, ...]

DEPTH = 3
PENALTY = -0.25  # of each "down", an intermediate reward


@functools.cache
def tokenizer() -> Any:
    return train_tokenizer(["up down stop Climb. You are at", "writer checker Result: rows"] * 20, 400)


def chances(said: Words) -> Mapping[str, float]:
    """What the policy says next."""
    if len(said) == 0:
        return {"up": 0.5, "down": 0.3, "stop": 0.2}
    if len(said) == 1:
        return {"up": 0.25, "down": 0.5, "stop": 0.25} if said == ("up",) else {"up": 0.7, "stop": 0.3}
    return {"up": 0.6, "down": 0.4}


def over(said: Words) -> bool:
    return len(said) == DEPTH or said[-1:] == ("stop",)


def height(said: Words) -> int:
    return said.count("up") - said.count("down")


def outcome(said: Words) -> float:
    return 2.0 if said == ("down", "up", "up") else float(height(said))


def down_costs(rollout: Rollout) -> tuple[float, ...]:
    return tuple(PENALTY * (transition.text == "down") for transition in rollout.transitions)


def ahead(said: Words, gamma: float = 1.0) -> Iterator[tuple[float, float]]:
    """(chance, return) of every way to go on from a state before a call."""
    for word, chance in chances(said).items():
        here, reward = (*said, word), PENALTY * (word == "down")
        if over(here):
            yield chance, reward + outcome(here)
        else:
            yield from ((chance * c, reward + gamma * gain) for c, gain in ahead(here, gamma))


def value(said: Words, gamma: float = 1.0) -> float:
    return sum(chance * gain for chance, gain in ahead(said, gamma))


def deviation(said: Words, gamma: float = 1.0) -> float:
    return sum(chance * (gain - value(said, gamma)) ** 2 for chance, gain in ahead(said, gamma)) ** 0.5


def words(rollout: Rollout) -> Words:
    return tuple(transition.text for transition in rollout.transitions)


class ChanceSampler:
    """Draws a word by the key alone, from chances that depend on what was said before."""

    context_length, queue_length = 4096, 0

    def __init__(self, chances: Callable[[Words], Mapping[str, float]] = chances, version: int = 0) -> None:
        self.chances, self.version = chances, version
        self.sampled = 0

    def submit(self, prompt_ids: np.ndarray, params: SamplingParams, key: tuple[int, int], on_tokens: Any = None) -> Future[Completion]:
        self.sampled += 1
        said = tuple(re.findall(r"<\|im_start\|>assistant\n(\w+)<", tokenizer().decode(prompt_ids)))
        options = self.chances(said)
        names, limits = list(options), np.cumsum(list(options.values()))
        word = names[min(int(np.searchsorted(limits, key[0] / 2**32, side="right")), len(names) - 1)]
        ids = np.array([*tokenizer().encode(word), tokenizer().eos_token_id], np.int32)
        logprobs = np.zeros(len(ids), np.float32)
        logprobs[0] = np.log(options[word])
        future: Future[Completion] = Future()
        future.set_result(Completion(ids, logprobs, "stop", self.version, word))
        return future


@functools.cache
def _client(base_url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=base_url, timeout=30.0)  # all runs of agents share one event loop


async def chat(base_url: str, api_key: str, messages: list[dict[str, str]], model: str = "policy") -> str:
    headers = {"Authorization": f"Bearer {api_key}"}
    answer = await _client(base_url).post("/chat/completions", json={"model": model, "messages": messages}, headers=headers)
    answer.raise_for_status()
    return answer.json()["choices"][0]["message"]["content"]


async def walk(task: Mapping[str, Any], base_url: str, api_key: str) -> float:
    """The agent: calls until the walk is over."""
    messages = [{"role": "user", "content": "Climb."}]
    said: Words = ()
    while not over(said):
        word = await chat(base_url, api_key, messages)
        said = (*said, word)
        messages += [{"role": "assistant", "content": word}, {"role": "user", "content": f"You are at {height(said)}."}]
    return outcome(said)
