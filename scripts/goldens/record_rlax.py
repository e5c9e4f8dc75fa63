"""Runs rlax's returns and V-trace, over tokens and over turns: python record_rlax.py DIRECTORY."""

from __future__ import annotations

import pathlib
import re
import sys
from collections.abc import Callable

import inputs
import jax
import jax.numpy as jnp
import numpy as np
import rlax
from recorder import Recorder, demand

GAMMA, LAMBDA = 0.9, 0.8
CLIPS = {"clip_rho_threshold": 1.2, "clip_pg_rho_threshold": 1.1}  # rlax's c̄ is 1
# What of rlax has no counterpart in lightningrl.
NO_COUNTERPART = {
    "n_step_bootstrapped_returns": "n steps, for n that is neither 1 nor all",
    "leaky_vtrace": "a mixture of clipped and unclipped ratios",
    "leaky_vtrace_td_error_and_advantage": "the same",
    "general_off_policy_returns_from_action_values": "needs action values",
    "general_off_policy_returns_from_q_and_v": "needs action values",
    "transformed_general_off_policy_returns_from_action_values": "needs action values",
    "transformed_lambda_returns": "a transformed Bellman operator",
    "transformed_n_step_returns": "a transformed Bellman operator",
}

# The functions of one sequence: r and v of its T steps, 0 after the last, and the ratios.
METHODS: dict[str, Callable] = {
    "lambda_returns": lambda r, d, v, v_next, rho: {"returns": rlax.lambda_returns(r, d, v_next, LAMBDA)},
    "discounted_returns": lambda r, d, v, v_next, rho: {"returns": rlax.discounted_returns(r, d, jnp.zeros_like(r))},
    "truncated_generalized_advantage_estimation": lambda r, d, v, v_next, rho: {
        "advantages": rlax.truncated_generalized_advantage_estimation(r, d, LAMBDA, jnp.append(v, 0.0))
    },
    "vtrace": lambda r, d, v, v_next, rho: {"errors": rlax.vtrace(v, v_next, r, d, rho, LAMBDA, 1.2)},
    "vtrace_td_error_and_advantage": lambda r, d, v, v_next, rho: v_trace(r, d, v, v_next, rho),
}
OVER_TURNS = ("lambda_returns", "discounted_returns", "truncated_generalized_advantage_estimation")


def v_trace(r, d, v, v_next, rho, mask=None) -> dict[str, jax.Array]:
    errors, advantages, _ = rlax.vtrace_td_error_and_advantage(v, v_next, r, d, rho, LAMBDA, **CLIPS, sample_mask=mask)
    return {"errors": errors, "advantages": advantages}


def run(method: Callable, r, v, rho) -> dict[str, np.ndarray]:
    r, v, rho = (np.asarray(x, np.float32) for x in (r, v, rho))
    return method(r, np.full_like(r, GAMMA), v, np.append(v[1:], np.float32(0.0)), rho)


def record_tokens(out: Recorder, action, rewards, value, rho) -> None:
    """The action tokens of every row as one sequence, put back into their columns."""
    for name, method in METHODS.items():
        grids: dict[str, np.ndarray] = {}
        for i, row in enumerate(action > 0):
            for what, x in run(method, rewards[i, row], value[i, row], rho[i, row]).items():
                grids.setdefault(what, np.zeros_like(action))[i, row] = x
        settings = {"gamma": GAMMA, "lambda_": LAMBDA, **(CLIPS if name.startswith("vtrace") else {})}
        out.add(f"token/{name}", settings, **grids)


def record_turns(out: Recorder, action, rewards, value) -> None:
    """The turns of every row as one sequence; one after another."""
    ends = inputs.turn_ends(action)
    starts = inputs.turn_ends(action[:, ::-1])[:, ::-1]
    for name in OVER_TURNS:
        parts = [run(METHODS[name], rewards[i, ends[i]], value[i, starts[i]], np.ones(ends[i].sum())) for i in range(len(action))]
        out.add(
            f"turn/{name}", {"gamma": GAMMA, "lambda_": LAMBDA}, **{what: np.concatenate([p[what] for p in parts]) for what in parts[0]}
        )


def record_masked(out: Recorder, action, rewards, value, rho) -> None:
    """Whole rows under a mask. rlax bootstraps from the place beside it, so an observation must be given the next action's value.

    `own` gives it the critic's value of the observation instead, as one who hands in the values as they are.
    """
    for case in ("next", "own"):
        grids: dict[str, np.ndarray] = {}
        for i, row in enumerate(action > 0):
            following, before, after = 0.0, np.zeros_like(value[i]), np.zeros_like(value[i])
            for k in reversed(range(len(row))):
                after[k] = following
                following = value[i, k] if row[k] else following
                before[k] = following if case == "next" else value[i, k]
            discount = np.full_like(after, GAMMA)
            for what, x in v_trace(rewards[i], discount, before, after, rho[i], jnp.asarray(row)).items():
                grids.setdefault(what, np.zeros_like(action))[i, row] = np.asarray(x)[row]
        out.add(f"masked/{case}", {"gamma": GAMMA, "lambda_": LAMBDA, **CLIPS}, **grids)


def main(directory: str) -> None:
    offered = {name for name in dir(rlax) if re.search("vtrace|returns|generalized_advantage", name)}
    demand(set(METHODS) | set(NO_COUNTERPART), offered, "rlax's returns and V-trace")
    drawn, action = inputs.numbers(), inputs.masks()["action"]
    outcome = np.array(inputs.OUTCOME, np.float32)
    turn_reward = np.where(inputs.turn_ends(action), drawn["turn_reward"], np.float32(0.0))
    rewards = turn_reward + inputs.at_last_action(outcome, action)
    rho = np.exp(drawn["old_logp"] - drawn["behaviour_logp"])
    out = Recorder("rlax", "jax", "numpy")
    given = {name: drawn[name] for name in ("old_logp", "behaviour_logp", "value")}
    out.add("inputs", group=inputs.tasks(), outcome=outcome, action=action, turn_reward=turn_reward, **given)
    record_tokens(out, action, rewards, drawn["value"], rho)
    record_turns(out, action, rewards, drawn["value"])
    record_masked(out, action, rewards, drawn["value"], rho)
    out.write(pathlib.Path(directory) / "rlax.npz")


if __name__ == "__main__":
    main(sys.argv[1])
