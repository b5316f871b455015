"""Trees as `{"params/stage1/block2/conv1/kernel": leaf}`: paths, rules, stacks of blocks."""

from flax_cnns.tree.paths import count, flatten, merge, partition, unflatten
from flax_cnns.tree.rules import Rules, compile_rules, decide, mask, match, nearest, per_parameter
from flax_cnns.tree.stacking import members, stack_blocks, unstack_blocks

__all__ = [
    "Rules",
    "compile_rules",
    "count",
    "decide",
    "flatten",
    "mask",
    "match",
    "members",
    "merge",
    "nearest",
    "partition",
    "per_parameter",
    "stack_blocks",
    "unflatten",
    "unstack_blocks",
]
