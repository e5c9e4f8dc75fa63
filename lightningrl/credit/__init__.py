"""What each transition earned: `(table, evidence) -> Credit`.

A credit of kind "return" still wants a baseline taken off; one of kind "advantage" has had it and may only be scaled.
Settings are keyword arguments, fixed with `functools.partial`. Padding earns 0.
"""

from lightningrl.credit.anchors import gigpo, hgpo
from lightningrl.credit.critic import gae, gae_value_target, lambda_return
from lightningrl.credit.graph import rewardflow, salt, state_values
from lightningrl.credit.judged import judged
from lightningrl.credit.likelihood import hcapo, hindsight, igpo
from lightningrl.credit.monte_carlo import counterfactual, vineppo
from lightningrl.credit.outcome import identical, intermediate, last_only, uniform_split
from lightningrl.credit.redistribution import attention_based, rudder, spa
from lightningrl.credit.returns import mt_grpo, potential_difference, reward_to_go, turn_rewards
from lightningrl.credit.shapley import leave_one_call_out, shapley, shapley_sampled
from lightningrl.credit.trees import node_values, spo_tree, tree_grpo, treeadv, treerl

__all__ = [
    "attention_based",
    "counterfactual",
    "gae",
    "gae_value_target",
    "gigpo",
    "hcapo",
    "hgpo",
    "hindsight",
    "identical",
    "igpo",
    "intermediate",
    "judged",
    "lambda_return",
    "last_only",
    "leave_one_call_out",
    "mt_grpo",
    "node_values",
    "potential_difference",
    "reward_to_go",
    "rewardflow",
    "rudder",
    "salt",
    "shapley",
    "shapley_sampled",
    "spa",
    "spo_tree",
    "state_values",
    "tree_grpo",
    "treeadv",
    "treerl",
    "turn_rewards",
    "uniform_split",
    "vineppo",
]
