"""Pytrees as `{"params/stage1/block2/conv1/kernel": leaf}`: paths, rules, stacked blocks."""

from flax_cnns.tree.paths import count, flatten, merge, partition, unflatten
from flax_cnns.tree.rules import (
    Rules,
    compile_rules,
    decide,
    expand_per_parameter,
    find_nearest,
    mask,
    match,
)
from flax_cnns.tree.stacking import expand_stack, stack_blocks, unstack_blocks

__all__ = [
    "Rules",
    "compile_rules",
    "count",
    "decide",
    "expand_per_parameter",
    "expand_stack",
    "find_nearest",
    "flatten",
    "mask",
    "match",
    "merge",
    "partition",
    "stack_blocks",
    "unflatten",
    "unstack_blocks",
]
