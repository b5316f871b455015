"""Whether the code that is being traced stands in the body of a scan, a cond or a loop.

XLA's own convolution is 10 to 100 times slower there on a CPU, and no lowering can see where it
stands. So whoever traces such a body says so, and convolutions read it while they are traced:

    def body(x):
        with inside_control_flow():
            return convolve(x)

    lax.cond(keep, body, skip, x)

`layers.Stage` and `layers.residual` do. The value is part of the key of JAX's caches: a function
under `jax.jit`, `nn.jit` or `jax.checkpoint` that is called inside and outside is traced for each.
Gradients keep it. The rules of a `jax.custom_vjp` or `jax.custom_jvp` are traced only when JAX
differentiates, which is after the body: a rule that convolves opens the context itself. Where it is
forgotten, results are the same and a CPU is slow.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import jax

_inside = jax.make_user_context(False)


def inside_control_flow() -> AbstractContextManager[None]:
    """A context for the body of a scan, a cond or a loop: its convolutions avoid XLA's own."""
    return _inside(True)


def is_inside_control_flow() -> bool:
    return _inside.value
