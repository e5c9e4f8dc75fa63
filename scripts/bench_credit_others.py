"""The worker of bench_credit.py: times another library's functions, in that library's own Python.

    PYTHON scripts/bench_credit_others.py verl|rlax INPUT.npz OUTPUT.npz [INPUT.npz OUTPUT.npz …]

An input holds rows of tokens, [B, L], as those libraries want them; an output has `seconds/NAME` and `result/NAME` for every function.
Needs NumPy and the library, nothing of lightningrl.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping

import numpy as np

GAMMA, LAMBDA = 0.99, 0.95
SECONDS = 1.0  # time enough for one function


def fastest(call: Callable[[], object]) -> float:
    """Seconds of the fastest of up to ten calls, after one that counts only if it took long."""
    started = time.perf_counter()
    call()
    taken = [time.perf_counter() - started]
    if taken[0] > SECONDS:
        return taken[0]
    taken.clear()
    while len(taken) < 10 and sum(taken) < SECONDS:
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return min(taken)


def verl_functions(given: Mapping[str, np.ndarray]) -> dict[str, Callable[[], object]]:
    import torch
    from verl.trainer.config import AlgoConfig
    from verl.trainer.ppo import core_algos as verl

    rewards, mask, values, logp, sum_pi2 = (torch.from_numpy(given[n]) for n in ("rewards", "mask", "values", "logp", "sum_pi2"))
    greedy, index, config = torch.from_numpy(given["greedy"]), given["group"], AlgoConfig(gamma=GAMMA, lam=LAMBDA)
    by_score = {"token_level_rewards": rewards, "response_mask": mask}
    grouped = {**by_score, "index": index, "config": config}
    tokens = {**by_score, "index": index, "old_log_probs": logp, "sum_pi_squared": sum_pi2}
    calls: dict[str, Callable[[], object]] = {
        name: lambda name=name: verl.get_adv_estimator_fn(name)(**grouped)[0]
        for name in (
            "grpo",
            "grpo_vectorized",
            "rloo",
            "rloo_vectorized",
            "opo",
            "grpo_passk",
            "reinforce_plus_plus_baseline",
            "gpg",
            "reinforce_plus_plus",
        )
    }
    # Its configured form reads columns of a dataframe; this is the same arithmetic on one reward.
    calls["gdpo"] = lambda: verl.get_adv_estimator_fn("gdpo")(**by_score, index=index)[0]
    calls["remax"] = lambda: verl.get_adv_estimator_fn("remax")(**by_score, reward_baselines=greedy, config=config)[0]
    calls["gae"] = lambda: verl.get_adv_estimator_fn("gae")(**by_score, values=values, gamma=GAMMA, lam=LAMBDA)[0]
    for name in ("optimal_token_baseline", "tir_optimal_token_baseline"):
        calls[name] = lambda name=name: verl.get_adv_estimator_fn(name)(**tokens)[0]
    return calls


def rlax_functions(given: Mapping[str, np.ndarray]) -> dict[str, Callable[[], object]]:
    import jax
    import jax.numpy as jnp
    import rlax

    rewards, values, rho = (jnp.asarray(given[name]) for name in ("rewards", "values", "rho"))
    following = jnp.concatenate([values[:, 1:], jnp.zeros_like(values[:, :1])], axis=1)
    discounts = jnp.full_like(rewards, GAMMA)

    def gae(r, v):
        every = jnp.concatenate([v, jnp.zeros((1,))])
        return rlax.truncated_generalized_advantage_estimation(r, jnp.full_like(r, GAMMA), LAMBDA, every)

    def v_trace(v, after, r, d, ratio):
        return rlax.vtrace_td_error_and_advantage(v, after, r, d, ratio, jnp.full_like(r, LAMBDA)).pg_advantage

    jitted = {
        "gae": (jax.jit(jax.vmap(gae)), (rewards, values)),
        "lambda_returns": (
            jax.jit(jax.vmap(lambda r, d, v: rlax.lambda_returns(r, d, v, jnp.full_like(r, LAMBDA)))),
            (rewards, discounts, following),
        ),
        "v_trace": (jax.jit(jax.vmap(v_trace)), (values, following, rewards, discounts, rho)),
    }
    return {name: lambda f=f, x=x: jax.block_until_ready(f(*x)) for name, (f, x) in jitted.items()}


def main(arguments: list[str]) -> int:
    functions = {"verl": verl_functions, "rlax": rlax_functions}[arguments[0]]
    for source, target in zip(arguments[1::2], arguments[2::2], strict=True):
        with np.load(source) as file:
            calls = functions(dict(file))
        measured = {}
        for name, call in calls.items():
            measured[f"result/{name}"] = np.asarray(call())
            measured[f"seconds/{name}"] = np.float64(fastest(call))
        np.savez(target, **measured)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
