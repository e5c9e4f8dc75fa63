"""What an experiment says of a run, from metrics that were made up."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from experiments import math_tool, multi_hop_qa, text_to_sql
from experiments.agents import math_autogen, qa_agents_sdk, sql_langgraph
from experiments.text_to_sql import Config
from experiments.training import Data, check_roles, summarize
from lightningrl.errors import UserError
from lightningrl.fit import Fitted


@pytest.mark.parametrize("experiment", [text_to_sql, multi_hop_qa, math_tool])
@pytest.mark.parametrize("name", ["questions", "heldout_questions"])
def test_a_run_needs_something_to_be_judged_by(experiment: Any, name: str) -> None:
    with pytest.raises(UserError, match=f"^{name}=0 must be at least 1$"):
        experiment.Config(**{name: 0})


SPENT = {"continuing_calls": 4, "continuing_calls_exact": 4}
ROWS: tuple[dict[str, Any], ...] = (
    {"iteration": 0, "heldout_reward": 0.25, "rollouts_so_far": 0, "tokens_so_far": 0},
    {"iteration": 1, **SPENT, "rollouts_so_far": 8, "tokens_so_far": 100, "logprob_gap_max": 2e-5, "logprob_gap_mean": 1e-7},
    {
        "iteration": 2,
        **SPENT,
        "rollouts_so_far": 16,
        "tokens_so_far": 200,
        "logprob_gap_max": 1e-5,
        "logprob_gap_mean": 3e-7,
        "heldout_reward": 0.5,
    },
)


def summary_of(rows: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    fitted = Fitted(policy=None, metrics=rows, out=Path("out"), compiled=3)  # type: ignore[arg-type]  # nobody asks for the policy
    return summarize(Config(), Data(train=[], heldout=[]), fitted, 5.0)


@pytest.mark.parametrize(("experiment", "module"), [(text_to_sql, sql_langgraph), (multi_hop_qa, qa_agents_sdk), (math_tool, math_autogen)])
def test_an_experiment_names_the_roles_of_its_agent(experiment: Any, module: Any) -> None:
    names = re.findall(r'^[A-Z]+ = "policy(?::(\w+))?"$', Path(module.__file__).read_text(), re.MULTILINE)
    assert set(experiment.EXPERIMENT.roles) == {name or "policy" for name in names}
    check_roles(experiment.EXPERIMENT.roles, experiment.EXPERIMENT)
    with pytest.raises(UserError, match=f"^the agent has no role 'wirter': choose among {', '.join(experiment.EXPERIMENT.roles)}$"):
        check_roles(("wirter",), experiment.EXPERIMENT)


def test_a_run_is_summed_up() -> None:
    said = summary_of(ROWS)
    assert (said["heldout_reward_before"], said["heldout_reward_after"], said["iterations"]) == (0.25, 0.5, 2)
    assert (said["rollouts"], said["tokens"], said["continuing_calls_exact"]) == (16, 200, 8)
    assert (said["logprob_gap_max"], said["logprob_gap_mean"], said["programs_compiled"]) == (2e-5, 3e-7, 3)


def test_a_run_that_sampled_ahead_has_no_gap_to_sum_up() -> None:
    """With --max_staleness=1 rollouts are of an older policy than the one that scores them."""
    ahead = tuple({name: x for name, x in row.items() if "gap" not in name} for row in ROWS)
    said = summary_of(ahead)
    assert said["logprob_gap_max"] is None and said["logprob_gap_mean"] is None and said["rollouts"] == 16
