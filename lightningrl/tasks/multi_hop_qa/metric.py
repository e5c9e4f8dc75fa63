"""Exact match and F1 as SQuAD's evaluation defines them (arXiv 1606.05250, §6.1), and the reward made of them."""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Iterable, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_CLOSED = frozenset(("yes", "no", "noanswer"))


def normalized(text: str) -> str:
    """Lower case, without ASCII punctuation and the articles a, an, the, words parted by single spaces: in SQuAD's order."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Iterable[str]) -> float:
    """1 if the normalised prediction equals any of the normalised answers, else 0."""
    said = normalized(prediction)
    return float(any(said == normalized(answer) for answer in answers))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """max over answers of 2 · P · R / (P + R), of the bags of normalised words; in [0, 1], 0 for no answers.

    As HotpotQA's evaluation has it, 0 if one of the two is yes, no or noanswer and the other is something else. A text of no words
    (articles and punctuation alone) matches another such text and nothing else, as in SQuAD 2.0.
    """
    return max((_f1(normalized(prediction), normalized(answer)) for answer in answers), default=0.0)


def _f1(said: str, gold: str) -> float:
    if said != gold and (said in _CLOSED or gold in _CLOSED):
        return 0.0
    ours, theirs = said.split(), gold.split()
    if not ours or not theirs:
        return float(ours == theirs)
    shared = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs))


def answer_in(text: str) -> str | None:
    """What the last `<answer>…</answer>` of a reply holds, trimmed; None without one, and for an empty one."""
    found = _ANSWER.findall(text)
    return (found[-1].strip() or None) if found else None


def reward(text: str, answers: Sequence[str]) -> float:
    """0.9 · F1 + 0.1 · format, in [0, 1] (arXiv 2508.03680, §4.2).

    The paper does not say how its format score is graded; here it is 1 for a reply with an answer between `<answer>` and
    `</answer>`, else 0. A reply without one answers nothing: its F1 is 0.
    """
    said = answer_in(text)
    return 0.0 if said is None else 0.9 * f1(said, answers) + 0.1
