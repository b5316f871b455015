"""A flag that tells convolutions that they are traced in the body of a scan, a cond or a loop.

XLA's own convolution is 10 to 100 times slower there on a CPU, and a lowering cannot see where its
primitive is. So the code that traces such a body sets the flag, and convolutions read it while they
are traced:

    def body(x):
        with inside_control_flow():
            return convolve(x)

    lax.cond(keep, body, skip, x)

`layers.Stage` and `layers.residual` set it. The flag is part of the key of JAX's caches: a function
under `jax.jit`, `nn.jit` or `jax.checkpoint` that is called inside and outside such a body is
traced for each. Gradients keep the flag. JAX traces the rules of a `jax.custom_vjp` or
`jax.custom_jvp` when it differentiates, which is after the body. So a rule that convolves must open
the context itself. Without the flag, results are the same, but convolutions on a CPU are slow.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import jax

_inside = jax.make_user_context(False)


def inside_control_flow() -> AbstractContextManager[None]:
    """Returns a context for the body of a scan, a cond or a loop.

    On a CPU, the convolutions inside it avoid XLA's own.
    """
    return _inside(True)


def is_inside_control_flow() -> bool:
    """Returns whether the code that is being traced is in the context `inside_control_flow`."""
    return _inside.value
