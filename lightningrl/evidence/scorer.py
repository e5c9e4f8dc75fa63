"""Log-probs of responses under prompts that the policy was not given, in the rows and by the function that training uses.

Such a prompt is made of token ids, never of text written anew: a recorded prompt with what the chat template puts around one
message more (`with_message`), or around the opening of the assistant's next turn (`next_turn_ids`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lightningrl.model.params import Params
from lightningrl.packing.rows import PackedBatch, Rows, RowSettings, pack
from lightningrl.table import Array, TokenTable
from lightningrl.tabulate import table_size, trained_rollouts
from lightningrl.train import Scores
from lightningrl.types import Rollout, Transition

Score = Callable[[Params, Sequence[Rows], TokenTable], Scores]  # `TrainStep.score`
# (params, transitions) -> what `response_logps` returns, once its settings are fixed
ResponseLogps = Callable[[Params, Sequence[Transition]], list[np.ndarray | None]]

_ASKED = {"role": "user", "content": "?"}
_ANSWERED = {"role": "assistant", "content": "!"}


def response_logps(
    params: Params, transitions: Sequence[Transition], *, score: Score, rows: RowSettings, multiple: int = 1
) -> list[np.ndarray | None]:
    """log π(yₖ | x, y₀ … yₖ₋₁) of every token of every response, of the distribution at the transition's temperature.

    Order and company change nothing but rounding. A prompt and response that occur several times at one temperature are computed
    once. `score` only ever sees one micro-batch at a time, in the few shapes of `rows`.

    Args:
      params: of the policy to ask.
      transitions: their prompts may have been changed. Temperature 0 counts as 1, as in training.
      score: reads, such as `TrainStep.score`.
      rows: the shapes that training uses.
      multiple: rows of a micro-batch are a multiple of it, the number of devices that share them.

    Returns:
      float32 [r] for each transition, in order; empty for an empty response, and None where prompt and response together are
      longer than the longest row. Nothing is ever cut.

    Raises:
      ValueError: a prompt is empty, so that nothing stands before the first token.
    """
    results: list[np.ndarray | None] = [None] * len(transitions)
    place: dict[tuple[bytes, bytes, float], int] = {}
    chosen: list[int] = []
    for i, t in enumerate(transitions):
        if not len(t.prompt_ids):
            raise ValueError(f"the prompt of response {i} is empty: the log-prob of its first token needs a token before it")
        if len(t.prompt_ids) + len(t.response_ids) <= rows.lengths[-1]:
            results[i] = np.zeros(len(t.response_ids), np.float32)
            if len(t.response_ids) and place.setdefault(_content(t), len(chosen)) == len(chosen):
                chosen.append(i)
    if not chosen:
        return results
    asked = [transitions[i] for i in chosen]
    packed = pack(asked, range(len(asked)), rows, multiple=multiple)
    lengths = [len(t.response_ids) for t in asked]
    flat = by_response(packed.edges, edge_logps(params, packed, score=score), lengths)
    computed = np.split(flat, np.cumsum(lengths)[:-1])
    for i, t in enumerate(transitions):
        if results[i] is not None and len(t.response_ids):
            results[i] = computed[place[_content(t)]]
    return results


def edge_logps(params: Params, packed: PackedBatch, *, score: Score) -> np.ndarray:
    """The log-prob of every edge, float32 [micro-batches, E], one micro-batch at a time: no shape depends on how many there are."""
    parts = [score(params, (r,), jax.tree.map(lambda x, i=i: x[i : i + 1], packed.edges)).logp for i, r in enumerate(packed.rows)]
    return np.concatenate(jax.device_get(parts))


def by_response(edges: TokenTable, values: Array, lengths: Sequence[int]) -> np.ndarray:
    """Values of edges in order of (transition, k): that of token k of transition n stands at Σ lengths before n, + k.

    Args:
      edges: of any shape, `transition` 0 … len(lengths)-1.
      values: float32 of that shape.
      lengths: response tokens of each transition.

    Returns:
      float32 [Σ lengths]; 0 at a token that has no edge.
    """
    flat, mask = np.zeros(sum(lengths), np.float32), np.asarray(edges.mask)
    start = np.concatenate([[0], np.cumsum(lengths)])[:-1].astype(np.int64)
    flat[start[np.asarray(edges.transition)[mask]] + np.asarray(edges.k)[mask]] = np.asarray(values)[mask]
    return flat


def table_calls(rollouts: Sequence[Rollout]) -> tuple[list[Transition], list[int]]:
    """The transitions in the table's order, and the number of the rollout of each."""
    pairs = [(t, r) for r, rollout in enumerate(trained_rollouts(rollouts)) for t in sorted(rollout.transitions, key=lambda t: t.turn)]
    return [t for t, _ in pairs], [r for _, r in pairs]


def padded(values: np.ndarray, multiple: int) -> np.ndarray:
    """With zeros behind, up to the least multiple of `multiple` that is not 0 and holds the first axis."""
    size = table_size(len(values), multiple)
    return np.pad(values, ((0, size - len(values)), *((0, 0) for _ in values.shape[1:])))


# ---- prompts


def opening_ids(tokenizer: Any) -> np.ndarray:
    """What the chat template ends a prompt with: the opening of the assistant's turn. int32 [n]."""
    return _ids(tokenizer, _rest(_rendered(tokenizer, [_ASKED], True), _rendered(tokenizer, [_ASKED], False)))


def message_ids(tokenizer: Any, role: str, text: str) -> np.ndarray:
    """What the chat template writes for one message more, before the assistant's turn is opened. int32 [n].

    Args:
      tokenizer: a transformers fast tokenizer with a chat template.
      role: one that the template lets follow a user's message.
      text: the message. Markers in it would become tokens of the template, so it must not be an agent's.
    """
    message = {"role": role, "content": text}
    return _ids(tokenizer, _rest(_rendered(tokenizer, [_ASKED, message], False), _rendered(tokenizer, [_ASKED], False)))


def next_turn_ids(tokenizer: Any) -> np.ndarray:
    """What follows the end of an assistant's turn if another one is opened at once. int32 [n], the end token not among them."""
    closed = _rendered(tokenizer, [_ASKED, _ANSWERED], False)
    end = closed.rfind(tokenizer.eos_token)
    if end < closed.rfind("!"):
        raise ValueError(f"the chat template does not close an assistant's turn with the end token {tokenizer.eos_token!r}")
    after_turn = closed[end + len(tokenizer.eos_token) :]
    return _ids(tokenizer, after_turn + _rest(_rendered(tokenizer, [_ASKED, _ANSWERED], True), closed))


def with_message(prompt_ids: np.ndarray, message: np.ndarray, opening: np.ndarray) -> np.ndarray:
    """The prompt with one message more at its end, every token of its own kept.

    Args:
      prompt_ids: int32 [p], ends with `opening`.
      message: int32 [m], of `message_ids`; opening: int32 [n], of `opening_ids`.

    Returns:
      int32 [p + m]: the prompt up to the opening, the message, the opening.

    Raises:
      ValueError: the prompt ends otherwise, as one that was not made by the chat template does.
    """
    cut = len(prompt_ids) - len(opening)
    if cut < 0 or not np.array_equal(prompt_ids[cut:], opening):
        raise ValueError("the prompt does not end with the opening of an assistant's turn, so no message can be put before it")
    return np.concatenate([prompt_ids[:cut], message, opening]).astype(np.int32)


def _content(t: Transition) -> tuple[bytes, bytes, float]:
    return np.asarray(t.prompt_ids, np.int32).tobytes(), np.asarray(t.response_ids, np.int32).tobytes(), t.temperature


def _rendered(tokenizer: Any, messages: Sequence[dict[str, str]], open_turn: bool) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_turn)


def _rest(text: str, start: str) -> str:
    if not text.startswith(start):
        raise ValueError("the chat template writes earlier messages otherwise once others follow them, so none can be added to its prompts")
    return text[len(start) :]


def _ids(tokenizer: Any, text: str) -> np.ndarray:
    return np.asarray(tokenizer.encode(text, add_special_tokens=False), np.int32)
