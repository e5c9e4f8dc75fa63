"""What a run starts from."""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest

from lightningrl.errors import UserError
from lightningrl.start import that_fit, with_value_head
from lightningrl.types import Transition
from tests.tiny import tiny_policy


def demonstration(*tokens: int) -> list[Transition]:
    """Calls of so many tokens, one of them answered."""
    ids = [np.zeros(n - 1, np.int32) for n in tokens]
    return [Transition(i, np.zeros(1, np.int32), np.zeros(1, np.float32), 1.0, 0, "writer", turn) for turn, i in enumerate(ids)]


def test_a_few_demonstrations_past_the_context_are_left_out_whole_and_said_so(capsys: pytest.CaptureFixture[str]) -> None:
    fit = [demonstration(5, 64) for _ in range(19)]
    assert that_fit([*fit, demonstration(5, 65, 6)], 64) == fit
    assert capsys.readouterr().out == "1 of 20 demonstrations are longer than context_length=64 and left out\n"
    assert that_fit(fit, 64) == fit
    assert capsys.readouterr().out == ""


def test_many_of_them_end_the_run_with_the_length_that_would_do() -> None:
    says = "2 of 20 demonstrations have a call of more tokens than context_length=64: the longest has 80"
    with pytest.raises(UserError, match=re.escape(says)):
        that_fit([*[demonstration(64) for _ in range(18)], demonstration(65), demonstration(80)], 64)


def test_a_policy_without_a_critic_gets_one_that_says_0() -> None:
    policy = tiny_policy()
    assert not policy.config.value_head
    with_head = with_value_head(policy)
    assert with_head.config.value_head and (np.asarray(with_head.params["value_head"]) == 0).all()
    assert jax.tree.map(np.shape, with_head.params) == {**jax.tree.map(np.shape, policy.params), "value_head": (policy.config.hidden_size,)}
    assert with_value_head(with_head) is with_head
