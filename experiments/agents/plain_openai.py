"""A forty-line agent in plain `openai` client code: two lines of verse that are full of one letter.

    python -m experiments.agents.plain_openai > tasks.jsonl
    python -m lightningrl.fit --agent experiments.agents.plain_openai:agent --tasks tasks.jsonl \\
        --reward experiments.agents.plain_openai:reward
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import openai

HTTP = openai.DefaultHttpxClient()  # shared by all runs: setting up TLS takes longer than a call


def agent(task: dict, base_url: str, api_key: str) -> list[str]:
    client = openai.OpenAI(base_url=base_url, api_key=api_key, http_client=HTTP)
    messages: list = []
    verse: list[str] = []
    for request in (f"A line about {task['topic']}.", "One more line."):
        messages.append({"role": "user", "content": f"{request} Be full of {task['letter']}"})
        reply = client.chat.completions.create(model="policy", messages=messages, temperature=1.0, max_tokens=12)
        line = reply.choices[0].message.content or ""
        messages.append({"role": "assistant", "content": line})
        verse.append(line)
    return verse


def reward(task: dict, target: str, verse: list[str]) -> float:
    """The share of the characters that are the letter, spaces aside; the mean of the two lines."""
    shares = [line.lower().count(target) / max(len("".join(line.split())), 1) for line in verse]
    return sum(shares) / len(shares)


def tasks() -> Iterator[dict]:
    for letter in "aeio":
        for topic in "snow rain tea boats cats bees night bread music trees stone sleep roads gold winter apples".split():
            yield {"id": f"{topic}-{letter}", "topic": topic, "letter": letter, "target": letter}


if __name__ == "__main__":
    for task in tasks():
        print(json.dumps(task))
