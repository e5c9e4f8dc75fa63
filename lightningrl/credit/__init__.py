"""What each transition earned: `(table, evidence) -> Credit`.

A credit of kind "return" still wants a baseline taken off; one of kind "advantage" has had it and may only be scaled.
Settings are keyword arguments, fixed with `functools.partial`. Padding earns 0.
"""

from lightningrl.credit.critic import gae, gae_value_target
from lightningrl.credit.outcome import identical, intermediate
from lightningrl.credit.returns import reward_to_go, turn_rewards

__all__ = ["gae", "gae_value_target", "identical", "intermediate", "reward_to_go", "turn_rewards"]
