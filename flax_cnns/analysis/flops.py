"""Counts the floating-point operations of a traced program, such as a whole training step.

Convolutions and matrix products count, with two operations for a multiplication and its addition,
as in papers. They are what an accelerator's peak FLOP/s is made of. Everything else (norms,
activations, augmentation, the optimizer) costs memory traffic rather than operations.

The count is of the useful operations: zeros that a strided convolution's gradient inserts do not
count, but padding does. What rematerialization computes twice counts twice.
"""

from __future__ import annotations

import math
from typing import Any

# The convolution primitives of `layers.Conv`; all three products of a convolution cost the same.
_OURS = ("conv2d", "conv2d_input_grad", "conv2d_kernel_grad")


def count_flops(jaxpr: Any, platform: str) -> int:
    """Returns the FLOPs of a program (a `Jaxpr`, perhaps closed) that is compiled for `platform`.

    In a program mapped by `shard_map`, these are the FLOPs of one device. The body of `lax.scan`
    counts as often as it runs, that of `lax.while_loop` once. Of the branches of `lax.cond`, the
    most expensive one counts; of `lax.platform_dependent`, the one of `platform`.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return sum(_count_equation(equation, platform) for equation in jaxpr.eqns)


def _count_equation(equation: Any, platform: str) -> int:
    name, fields = equation.primitive.name, equation.params
    shapes: list[tuple[int, ...]] = [getattr(v.aval, "shape", ()) for v in equation.invars]
    out: tuple[int, ...] = (
        getattr(equation.outvars[0].aval, "shape", ()) if equation.outvars else ()
    )
    if name == "dot_general":
        (contracted, _), _ = fields["dimension_numbers"]
        return 2 * math.prod(out) * math.prod(shapes[0][axis] for axis in contracted)
    if name == "conv_general_dilated":
        # rhs_spec: (output features, input features per group, *window)
        _, in_features, *window = tuple(fields["dimension_numbers"].rhs_spec)
        taps = math.prod(shapes[1][axis] for axis in (in_features, *window))
        return 2 * math.prod(out) * taps // math.prod(fields["lhs_dilation"])
    if name in _OURS:
        geometry = fields["geometry"]
        images = shapes[0] if name != "conv2d_kernel_grad" else shapes[1]
        kernel = out if name == "conv2d_kernel_grad" else shapes[1]
        return 2 * images[0] * geometry.positions * math.prod(kernel)
    if name == "cond":
        branches = fields["branches"]
        if platforms := fields.get("branches_platforms"):
            return count_flops(branches[_find_branch(platforms, platform)], platform)
        return max(count_flops(branch, platform) for branch in branches)
    times = fields["length"] if name == "scan" else 1
    inner = [
        value
        for field in fields.values()
        for value in (field if isinstance(field, tuple | list) else (field,))
        if hasattr(getattr(value, "jaxpr", value), "eqns")
    ]
    return times * sum(count_flops(value, platform) for value in inner)


def _find_branch(platforms: tuple[tuple[str, ...] | None, ...], platform: str) -> int:
    """Returns the index of the branch for `platform`; None in `platforms` is the default."""
    names = {"gpu": {"gpu", "cuda", "rocm"}}.get(platform, {platform})
    for index, branch in enumerate(platforms):
        if branch is not None and names & set(branch):
            return index
    return platforms.index(None)
