"""Runs verl's advantage estimators, policy losses, aggregations and corrections: python record_verl.py DIRECTORY."""

from __future__ import annotations

import inspect
import pathlib
import re
import sys

import inputs
import numpy as np
import torch
from recorder import Recorder, demand
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos, rollout_corr_helper
from verl.workers.config import ActorConfig, PolicyLossConfig

AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
DISPATCHES = {"bypass_mode"}  # calls `vanilla` or REINFORCE on masked tokens; `record_losses` checks that it does

GAMMA, LAMBDA = 0.9, 0.8
CLIP = {"clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.28}
LOSSES = {
    "vanilla": {**CLIP, "clip_ratio_c": 3.0},
    "dppo_tv": {"clip_ratio": 0.1, "clip_ratio_low": 0.08, "clip_ratio_high": 0.12, "clip_ratio_c": 1.5},
    "dppo_kl": {"clip_ratio": 0.02, "clip_ratio_low": 0.02, "clip_ratio_high": 0.03, "clip_ratio_c": 1.5},
    "gspo": CLIP,
    "sapo": {"tau_pos": 1.0, "tau_neg": 1.05},
    "gpg": {},
    "clip_cov": {**CLIP, "policy_loss": {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.1, "clip_cov_ub": 1.5}},
    "kl_cov": {"policy_loss": {"kl_cov_ratio": 0.2, "ppo_kl_coef": 0.7}},
    "geo_mean": {"clip_ratio": 0.4, "clip_ratio_low": 0.3, "clip_ratio_high": 0.4},
    "dro": {"policy_loss": {"dro_beta": 0.3}},
    "cispo": CLIP,
}


def tensor(x) -> torch.Tensor:
    return torch.tensor(np.asarray(x))


def record_advantages(out: Recorder) -> None:
    drawn, group, covered = inputs.numbers(), inputs.tasks(), set()
    outcome = np.array(inputs.OUTCOME, np.float32)

    def run(case: str, settings=None, *, rows=slice(None), action=None, rewards=None, **arguments) -> None:
        estimator = case.split("/")[0]
        action = inputs.masks()["action"] if action is None else action
        rewards = inputs.at_last_action(outcome, action) if rewards is None else rewards
        if estimator not in ("gae", "remax", "reinforce_plus_plus"):
            arguments["index"] = group[rows]
        covered.add(estimator)
        advantages, returns = core_algos.ADV_ESTIMATOR_REGISTRY[estimator](
            token_level_rewards=tensor(rewards[rows]), response_mask=tensor(action[rows]), **arguments
        )
        out.add(f"advantage/{case}", settings, mask=action[rows], rewards=rewards[rows], advantages=advantages, returns=returns)

    action, ends = inputs.masks()["action"], inputs.turn_ends(inputs.masks()["action"])
    by_turn = np.where(ends, drawn["turn_reward"], 0.0) + inputs.at_last_action(outcome, action)
    several = np.array([task != "t3" for task in group])
    values = tensor(drawn["value"])

    run("gae", {"gamma": GAMMA, "lambda_": LAMBDA}, rewards=by_turn, values=values, gamma=GAMMA, lam=LAMBDA)
    run("reinforce_plus_plus", {"gamma": GAMMA}, rewards=by_turn, config=AlgoConfig(gamma=GAMMA))
    run("remax", rewards=inputs.at_last_action(outcome, action), reward_baselines=tensor(np.array(inputs.GREEDY, np.float32)))
    for name in ("grpo", "grpo_vectorized"):
        run(name)
        run(f"{name}/no_std", norm_adv_by_std_in_grpo=False)
    for name in ("rloo", "rloo_vectorized", "opo", "gpg", "reinforce_plus_plus_baseline"):
        run(name)
    for scaled in (True, False):
        config = AlgoConfig(norm_adv_by_std_in_grpo=scaled)
        run("grpo_passk" if scaled else "grpo_passk/no_std", rows=several, config=config)

    run("gdpo")
    attention = inputs.masks()["attention"]
    two = AlgoConfig(gdpo_reward_keys=["accuracy", "format"], gdpo_reward_weights=[1.0, 0.5])
    named = {"accuracy": outcome, "format": np.array(inputs.FORMAT, np.float32)}
    whole = np.concatenate([np.ones_like(attention[:, :3]), attention], axis=1)
    batch = {"prompts": torch.zeros(len(group), 3), "attention_mask": torch.tensor(whole, dtype=torch.long)}
    run("gdpo/two_rewards", {"weights": [1.0, 0.5]}, config=two, non_tensor_batch=named, batch=batch)

    plain = inputs.masks(observations=False)["action"]
    policy = {"old_log_probs": tensor(drawn["old_logp"]), "sum_pi_squared": tensor(drawn["sum_pi2"])}
    ratio = np.minimum(np.exp(drawn["old_logp"] - drawn["behaviour_logp"]), 2.0)
    for name, mask in (("optimal_token_baseline", plain), ("tir_optimal_token_baseline", action)):
        run(name, {"tail": "raw"}, action=mask, handle_zero_tail=True, **policy)
        run(f"{name}/zero_tail", {"tail": "zero"}, action=mask, handle_zero_tail=False, **policy)
        run(f"{name}/weighted", {"tail": "raw", "rho": True}, action=mask, rollout_is_weights=tensor(ratio), **policy)
    # Positions are columns, so an observation of one row stands beside an action of another.
    run("optimal_token_baseline/observations", {"tail": "raw"}, handle_zero_tail=True, **policy)

    demand(covered, set(core_algos.ADV_ESTIMATOR_REGISTRY), "verl's advantage estimators")
    record_small(out)
    record_hazards(out, drawn)


def record_small(out: Recorder) -> None:
    """Rewards that differ by little: here the epsilon of a division shows."""
    rewards, mask = np.array(inputs.SMALL_OUTCOME, np.float32)[:, None], np.ones((6, 1), np.float32)
    for name in ("grpo", "grpo_vectorized", "grpo_passk", "gdpo"):
        settings = {"config": AlgoConfig()} if name == "grpo_passk" else {}
        advantages, _ = core_algos.ADV_ESTIMATOR_REGISTRY[name](
            token_level_rewards=tensor(rewards), response_mask=tensor(mask), index=np.array(inputs.SMALL_GROUP), **settings
        )
        out.add(f"small/{name}", group=np.array(inputs.SMALL_GROUP), outcome=rewards[:, 0], advantages=advantages)


def record_hazards(out: Recorder, drawn) -> None:
    """Where what verl does is not what is on paper: seven equal rewards of 0.1, and a reward that is paid at an observation."""
    registry, ones = core_algos.ADV_ESTIMATOR_REGISTRY, np.ones((7, 1), np.float32)
    rewards, index = np.full((7, 1), 0.1, np.float32), np.array(["t"] * 7)
    for name in ("grpo", "grpo_vectorized", "gdpo", "reinforce_plus_plus_baseline", "rloo", "rloo_vectorized", "opo", "gpg"):
        advantages, _ = registry[name](token_level_rewards=tensor(rewards), response_mask=tensor(ones), index=index)
        out.add(f"hazard/constant/{name}", advantages=advantages)

    mask = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], np.float32)
    late = np.array([[0, 0, 0, 1.0], [0, 0, 0, 0]], np.float32)
    values = drawn["value"][:2, :4]
    config = AlgoConfig(gamma=GAMMA)
    gae = registry["gae"](tensor(late), tensor(values), tensor(mask), GAMMA, LAMBDA)
    plus = registry["reinforce_plus_plus"](token_level_rewards=tensor(late), response_mask=tensor(mask), config=config)
    remax = registry["remax"](tensor(late), torch.zeros(2), tensor(mask))
    for name, (advantages, returns) in {"gae": gae, "reinforce_plus_plus": plus, "remax": remax}.items():
        settings = {"gamma": GAMMA, "lambda_": LAMBDA}
        out.add(f"hazard/late_reward/{name}", settings, mask=mask, value=values, advantages=advantages, returns=returns)


def actor(settings, **batch) -> ActorConfig:
    settings = dict(settings)
    policy_loss = PolicyLossConfig(**settings.pop("policy_loss", {}))
    return ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=policy_loss, global_batch_info=batch, **settings
    )


def loss_and_gradient(name: str, settings, drawn, mask, advantage: str, mode: str, **arguments):
    logp = tensor(drawn["logp"]).requires_grad_()
    loss, _ = core_algos.POLICY_LOSS_REGISTRY[name](
        old_log_prob=tensor(drawn["old_logp"]),
        log_prob=logp,
        advantages=tensor(drawn[advantage]),
        response_mask=tensor(mask),
        loss_agg_mode=mode,
        config=actor(settings),
        **arguments,
    )
    loss.backward()
    return {"loss": loss.detach(), "gradient": logp.grad}


def record_losses(out: Recorder) -> None:
    demand(set(LOSSES) | DISPATCHES, set(core_algos.POLICY_LOSS_REGISTRY), "verl's policy losses")
    drawn, far, action = inputs.numbers(), inputs.far_policies(), inputs.masks()["action"]
    one_empty = action.copy()
    one_empty[5] = 0.0
    weight = np.minimum(np.exp(drawn["old_logp"] - drawn["behaviour_logp"]), 2.0)
    for name, settings in LOSSES.items():
        for advantage in ("row_advantage", "token_advantage"):
            for mode in AGGREGATIONS:
                case = f"loss/{name}/{advantage.split('_')[0]}/{mode}"
                result = loss_and_gradient(name, settings, drawn, action, advantage, mode)
                out.add(case, {**settings, "advantage": advantage, "mode": mode}, **result)
        given = {**settings, "advantage": "row_advantage", "mode": "seq-mean-token-mean"}
        result = loss_and_gradient(name, settings, drawn, one_empty, given["advantage"], given["mode"])
        out.add(f"empty_row/{name}", given, **result)
        result = loss_and_gradient(name, settings, drawn, action, given["advantage"], given["mode"], rollout_is_weights=tensor(weight))
        out.add(f"weighted/{name}", given, **result)
        given = {**settings, "advantage": "token_advantage", "mode": "token-sum"}
        out.add(f"far/{name}", given, **loss_and_gradient(name, settings, far, action, given["advantage"], given["mode"]))
    record_clip_cov_draw(out, drawn, action)
    check_dispatch(drawn, action)


def record_clip_cov_draw(out: Recorder, drawn, action) -> None:
    """A draw of fewer tokens than may be drawn; which ones is seen in the gradient."""
    settings = {**CLIP, "policy_loss": {"clip_cov_ratio": 0.05, "clip_cov_lb": 0.1, "clip_cov_ub": 1.5}}
    torch.manual_seed(inputs.SEED)
    result = loss_and_gradient("clip_cov", settings, drawn, action, "token_advantage", "token-mean")
    out.add("draw/clip_cov", {**settings, "advantage": "token_advantage", "mode": "token-mean"}, **result)


def check_dispatch(drawn, action) -> None:
    """`bypass_mode` adds nothing of its own: it is `vanilla`, under a mask that rejection may shrink."""
    settings = {**LOSSES["vanilla"], "policy_loss": {"rollout_correction": {"loss_type": "ppo_clip"}}}
    one = loss_and_gradient("bypass_mode", settings, drawn, action, "row_advantage", "token-mean")
    other = loss_and_gradient("vanilla", LOSSES["vanilla"], drawn, action, "row_advantage", "token-mean")
    if not all(torch.equal(one[key], other[key]) for key in one):
        sys.exit("verl's bypass_mode is no longer its vanilla loss: record it as a loss of its own.")


def record_aggregations(out: Recorder) -> None:
    drawn, action = inputs.numbers(), inputs.masks()["action"]
    action[5] = 0.0  # a row without actions, which verl's means over sequences leave out
    loss = tensor(drawn["loss"])
    for mode in AGGREGATIONS:
        values = loss.clone().requires_grad_()
        total = core_algos.agg_loss(values, tensor(action), mode)
        total.backward()
        counts = {"batch_num_tokens": int(action.sum()), "global_batch_size": int((action.sum(axis=1) > 0).sum())}
        parts = [core_algos.agg_loss(loss[part], tensor(action)[part], mode, **counts) for part in (slice(4), slice(4, None))]
        out.add(f"aggregation/{mode}", mask=action, loss=total.detach(), gradient=values.grad, parts=torch.stack(parts))
    offered = set(re.findall(r'"((?:token|seq)-[a-z-]+)"', inspect.getsource(core_algos.agg_loss)))
    demand(set(AGGREGATIONS), offered, "verl's aggregations")


def record_terms(out: Recorder) -> None:
    """KL estimators and the critic's loss."""
    drawn, action = inputs.numbers(), inputs.masks()["action"]
    for name in ("k1", "k2", "k3", "k3+"):
        logp = tensor(drawn["logp"]).requires_grad_()
        values = core_algos.kl_penalty(logp, tensor(drawn["ref_logp"]), name)
        torch.sum(values * tensor(action) * tensor(drawn["loss"])).backward()
        out.add(f"kl/{name}", values=values.detach() * tensor(action), gradient=logp.grad)
    value = tensor(drawn["value"]).requires_grad_()
    loss, _ = core_algos.compute_value_loss(
        value, tensor(drawn["value_target"]), tensor(drawn["old_value"]), tensor(action), cliprange_value=0.2
    )
    loss.backward()
    out.add("value_loss", {"clip": 0.2}, loss=loss.detach(), gradient=value.grad)


def record_corrections(out: Recorder) -> None:
    drawn, action = inputs.numbers(), tensor(inputs.masks()["action"])
    logs = tensor(drawn["old_logp"] - drawn["behaviour_logp"])
    for level in ("token", "sequence"):
        for limit in (1.2, "0.7_1.3"):
            for normalised in (False, True):
                weights, _ = rollout_corr_helper.compute_rollout_correction_weights(logs, action, level, limit, normalised)
                case = f"correction/{level}/{'truncated' if limit == 1.2 else 'masked'}" + ("/normalised" if normalised else "")
                out.add(case, weights=weights)
    limits = {"k1": "0.8_1.3", "k2": "0.03", "k3": "0.03"}
    for option in sorted(rollout_corr_helper.SUPPORTED_ROLLOUT_RS_OPTIONS):
        level, estimator = option.rsplit("_", 1)
        limit = limits[estimator] if level != "seq_sum" or estimator == "k1" else "0.3"
        mask, _ = rollout_corr_helper.compute_rollout_rejection_mask(logs, action, option, limit)
        out.add(f"rejection/{option}", {"level": level, "estimator": estimator, "limit": limit}, mask=mask)


def main(directory: str) -> None:
    out = Recorder("verl", "torch")
    mask = inputs.masks()
    out.add("inputs", group=inputs.tasks(), outcome=np.array(inputs.OUTCOME, np.float32), **mask, **inputs.numbers())
    out.add("inputs/far", **inputs.far_policies())
    out.add("inputs/rewards", format=np.array(inputs.FORMAT, np.float32), greedy=np.array(inputs.GREEDY, np.float32))
    for record in (record_advantages, record_losses, record_aggregations, record_terms, record_corrections):
        record(out)
    out.write(pathlib.Path(directory) / "verl.npz")


if __name__ == "__main__":
    main(sys.argv[1])
