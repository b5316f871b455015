"""A flag that tells convolutions that they are traced in the body of a scan, a cond or a loop.

On a CPU, XLA's own convolution is 10 to 100 times slower inside such a body, and a lowering cannot
see whether its primitive is inside one. So the code that traces the body sets the flag, and
convolutions read the flag while they are traced:

    def body(x):
        with inside_control_flow():
            return convolve(x)

    lax.cond(keep, body, skip, x)

`layers.Stage` and `layers.residual` set the flag. It is part of the key of JAX's caches: a function
under `jax.jit`, `nn.jit` or `jax.checkpoint` that is called both inside and outside such a body is
traced twice. Gradients keep the flag. But JAX traces the rules of a `jax.custom_vjp` or
`jax.custom_jvp` when it differentiates, after it has traced the body. So a rule that convolves must
open the context itself. Without the flag, results are the same, but convolutions on a CPU are slow.
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
