"""Numbers of a config for each parameter: one for all, or by rules (regex, number)."""

from __future__ import annotations

from typing import Any

import jax

from flax_cnns import tree as pytree
from flax_cnns.types import PyTree


def per_parameter(spec: tuple, params: PyTree, *, what: str, default: Any) -> PyTree:
    """`()`, `(number,)` or rules (regex, value) -> a tree of values in the shape of `params`.

    The regexes see `"params/" + path`; in a stack of blocks that of each block, and where the
    values differ they are an array along the stack (`pytree.mask`). Raises `UserError` for a rule
    that decides nothing.
    """
    if isinstance(spec, (int, float)):
        spec = (spec,)
    if not spec:
        return jax.tree.map(lambda _: default, params)
    if len(spec) == 1 and isinstance(spec[0], (int, float)):
        return jax.tree.map(lambda _: spec[0], params)
    return pytree.mask(spec, params, what=what, prefix="params/")
