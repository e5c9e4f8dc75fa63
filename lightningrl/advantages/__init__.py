"""Credit minus a baseline, scaled: `(table, credit, evidence) -> f32[N]`; and its spread over tokens, `-> f32[E]`.

Statistics count rollouts unless told otherwise. A credit that is already an advantage may only be scaled.
"""

from lightningrl.advantages.baselines import accepted, gpg, maxrl, opo, rae_update, remax, role_baseline
from lightningrl.advantages.batch import unchanged, whiten
from lightningrl.advantages.bilevel import bi_level_gae, bi_level_value_target
from lightningrl.advantages.group import group_norm, leave_one_out
from lightningrl.advantages.multi_reward import gdpo
from lightningrl.advantages.passk import pass_at_k
from lightningrl.advantages.presets import PRESET_ORIGINS, PRESETS, preset
from lightningrl.advantages.process_rewards import istar, prime
from lightningrl.advantages.token_baseline import multi_turn_optimal_token_baseline, optimal_token_baseline
from lightningrl.advantages.token_returns import (
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    token_gae,
    token_lambda_return,
    v_trace,
    v_trace_target,
    whiten_tokens,
)
from lightningrl.advantages.tokens import broadcast
from lightningrl.advantages.units import Count, require_return, statistics_weights

__all__ = [
    "Count",
    "PRESETS",
    "PRESET_ORIGINS",
    "accepted",
    "bi_level_gae",
    "bi_level_value_target",
    "broadcast",
    "gdpo",
    "gpg",
    "group_norm",
    "istar",
    "leave_one_out",
    "maxrl",
    "multi_turn_optimal_token_baseline",
    "opo",
    "optimal_token_baseline",
    "pass_at_k",
    "preset",
    "prime",
    "rae_update",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "remax",
    "require_return",
    "role_baseline",
    "statistics_weights",
    "token_gae",
    "token_lambda_return",
    "unchanged",
    "v_trace",
    "v_trace_target",
    "whiten",
    "whiten_tokens",
]
