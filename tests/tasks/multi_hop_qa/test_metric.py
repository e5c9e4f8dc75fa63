"""EM and F1 against SQuAD's definition written out in plain loops, and the reward made of them."""

from __future__ import annotations

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightningrl.tasks.multi_hop_qa.metric import answer_in, exact_match, f1, normalized, reward

ADVERSARIAL = [
    "",
    " ",
    "the",
    "A",
    "The The",
    "the an a",
    "an apple",
    "An Apple.",
    "apple, an",
    "theatre",
    "the-atre",
    "a.b.c.",
    "U.S.A.",
    "u s a",
    "usa",
    "yes",
    "Yes.",
    "no",
    "the yes",
    "yes no",
    "noanswer",
    "No Answer",
    "no, the answer",
    "Beyoncé Knowles",
    "beyonce\u0301 knowles",
    "İstanbul",
    "straße",
    "“Quoted” — dash",
    "'quoted'",
    "東京 の 塔",
    "a\u00a0b",
    "tab\tand\nnewline",
    "1,000",
    "1000",
    "1 000",
    "x x y",
    "x y y",
    "y x",
    "the\u00a0end",
    "§ 5 the",
    "an_apple",
]


def words_of(text: str) -> list[str]:
    """SQuAD's normalisation character by character: lower case, punctuation out, articles that stand as words out, words."""
    kept = [character for character in text.lower() if character not in string.punctuation]
    pieces, piece = [], ""
    for character in kept:  # runs of what counts as part of a word, and everything between them
        inside = character.isalnum() or character == "_"
        if piece and (piece[-1].isalnum() or piece[-1] == "_") != inside:
            pieces.append(piece)
            piece = ""
        piece += character
    pieces.append(piece)
    return "".join(" " if piece in ("a", "an", "the") else piece for piece in pieces).split()


def plain_f1(said: list[str], gold: list[str]) -> float:
    """HotpotQA's F1, with SQuAD 2.0's rule for texts of no words."""
    closed = (["yes"], ["no"], ["noanswer"])
    if said != gold and (said in closed or gold in closed):
        return 0.0
    if not said or not gold:
        return 1.0 if said == gold else 0.0
    left, shared = list(gold), 0
    for word in said:
        if word in left:
            left.remove(word)
            shared += 1
    if shared == 0:
        return 0.0
    precision, recall = shared / len(said), shared / len(gold)
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize("said", ADVERSARIAL)
def test_scores_are_squads_on_adversarial_strings(said: str) -> None:
    for gold in ADVERSARIAL:
        assert normalized(gold).split() == words_of(gold)
        assert exact_match(said, [gold]) == float(" ".join(words_of(said)) == " ".join(words_of(gold)))
        assert f1(said, [gold]) == pytest.approx(plain_f1(words_of(said), words_of(gold)), abs=1e-15)


@settings(max_examples=300, deadline=None)
@given(*[st.text(st.sampled_from("aAntheThE .,-'xyÉ\t_5 ßn"), max_size=14)] * 2)
def test_scores_are_squads_on_drawn_strings(said: str, gold: str) -> None:
    assert normalized(gold).split() == words_of(gold)
    assert f1(said, [gold]) == pytest.approx(plain_f1(words_of(said), words_of(gold)), abs=1e-15)
    assert exact_match(said, [gold]) == float(words_of(said) == words_of(gold))


def test_the_best_of_the_aliases_counts() -> None:
    assert f1("New York City", ["Boston", "New York", "the City of New York"]) == pytest.approx(2 * 3 / (3 + 4))
    assert exact_match("the big apple!", ["New York", "Big Apple"]) == 1.0
    assert (f1("x", []), exact_match("x", [])) == (0.0, 0.0)


def test_yes_and_no_are_all_or_nothing() -> None:
    assert f1("yes", ["no"]) == f1("yes indeed", ["yes"]) == f1("no", ["no way"]) == f1("noanswer", ["noanswer found"]) == 0.0
    assert f1("Yes!", ["yes"]) == 1.0
    assert f1("yes indeed", ["yes of course"]) == pytest.approx(2 / 5)  # neither is the bare word
    assert f1("yes indeed", ["yes", "yes indeed"]) == 1.0  # the mismatch is with one alias only


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>Paris</answer>", "Paris"),
        ("I think <answer> Paris,\nFrance </answer> it is", "Paris,\nFrance"),
        ("<answer>Rome</answer> no, <answer>Paris</answer>", "Paris"),
        ("<answer></answer>", None),
        ("<answer> \n</answer>", None),
        ("Paris", None),
        ("<answer>Paris", None),
        ("", None),
        ("<Answer>Paris</Answer>", None),
    ],
)
def test_what_is_between_the_tags_is_the_answer(text: str, answer: str | None) -> None:
    assert answer_in(text) == answer


def test_the_reward_is_f1_and_a_tenth_for_the_form() -> None:
    assert reward("<answer>Paris</answer>", ["Paris"]) == 1.0
    assert reward("<answer>Rome</answer>", ["Paris"]) == 0.1
    assert reward("<answer>Paris France</answer>", ["Paris"]) == pytest.approx(0.9 * 2 / 3 + 0.1)
    assert reward("Paris", ["Paris"]) == reward("", ["Paris"]) == reward("<answer></answer>", ["The"]) == 0.0
