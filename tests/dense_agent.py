"""An agent in plain HTTP whose reward is dense, so that a policy of random weights has something to learn from."""

from __future__ import annotations

from typing import Any

import httpx


async def answer(task: dict[str, Any], base_url: str, api_key: str) -> float:
    """Asks twice, the second time going on; returns the share of small letters in what it got."""
    messages = [{"role": "user", "content": task["question"]}]
    said = ""
    async with httpx.AsyncClient(base_url=base_url, headers={"Authorization": f"Bearer {api_key}"}, timeout=60) as client:
        for _ in range(2):
            response = await client.post("/chat/completions", json={"model": "policy", "messages": messages})
            response.raise_for_status()
            reply = response.json()["choices"][0]["message"]["content"] or ""
            messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": "name"}]
            said += reply
    return sum(letter.islower() for letter in said) / max(len(said), 1)
