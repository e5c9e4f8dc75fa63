"""Credit minus a baseline, scaled: `(table, credit, evidence) -> f32[N]`; and its spread over tokens, `-> f32[E]`.

Statistics count rollouts unless told otherwise. A credit that is already an advantage may only be scaled.
"""

from lightningrl.advantages.batch import whiten
from lightningrl.advantages.group import group_norm, group_normalize, leave_one_out
from lightningrl.advantages.tokens import broadcast
from lightningrl.advantages.units import Count, require_return, statistics_weights

__all__ = [
    "Count",
    "broadcast",
    "group_norm",
    "group_normalize",
    "leave_one_out",
    "require_return",
    "statistics_weights",
    "whiten",
]
