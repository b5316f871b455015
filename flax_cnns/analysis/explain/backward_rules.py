"""Guided backpropagation, the deconvnet, redirected gradients: another rule at every ReLU.

The network is traced, and the traced program is evaluated with another gradient at its ReLUs, which
`relus` finds. Max pooling keeps its own gradient: it goes to the largest pixel, which is the
deconvnet's unpooling by recorded switches. The first two are defined only for ReLU networks. Other
activations raise `UndefinedRule`.

Adebayo et al. 2018 (arXiv 1810.03292) find that guided backpropagation hardly depends on the upper
layers: its pictures look like the image, not like what the network learned. `quality.randomize`
tests this.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from flax_cnns.analysis import tracing
from flax_cnns.analysis.explain import programs, relus
from flax_cnns.analysis.explain.features import Variables, unroll
from flax_cnns.analysis.explain.gradients import take_floats
from flax_cnns.analysis.explain.targets import (
    Feature,
    FeatureLike,
    Target,
    make_feature_or_target,
    trace_output,
)
from flax_cnns.errors import UserError
from flax_cnns.types import Array

Rule = Literal["guided", "deconvnet", "redirected"]


class UndefinedRule(UserError):
    """The network is not a ReLU network, so guided backpropagation and the deconvnet are not
    defined for it."""


def guided_backprop(
    model: nn.Module, variables: Variables, images: Array, target: FeatureLike = None
) -> Array:
    """Returns the gradient [N H W C] that passes a ReLU only where it is positive and the ReLU's
    input was positive (Springenberg et al. 2015, arXiv 1412.6806, section 3.4).

    `target` is a function of the logits, or a `Feature`: the activation of a module's unit. Raises
    `UndefinedRule`, a `UserError`, for a network with another activation, and for logits of a
    network without ReLU. Raises `UserError` as `make_feature_or_target` does.
    """
    return _backward(model, variables, images, target, "guided")


def deconvnet(
    model: nn.Module, variables: Variables, images: Array, target: FeatureLike = None
) -> Array:
    """Returns the gradient [N H W C] that passes a ReLU where it is positive, regardless of the
    ReLU's input (Zeiler & Fergus 2014, arXiv 1311.2901, section 2.1).

    For a `Feature` with positions, this is the paper's picture of one activation, where all others
    are set to 0. The paper starts from the activation's value and this function from 1, so pictures
    differ by that positive factor. Raises `UserError` as `guided_backprop` does.
    """
    return _backward(model, variables, images, target, "deconvnet")


def redirect_gradients(
    function: Callable[[Array], Array],
) -> Callable[[Array, Array | bool], Array]:
    """Returns f(x, redirected) with the values of `function(x)` and other gradients.

    While the boolean `redirected` is true, a ReLU or ReLU6 that would pass no gradient at all for
    an image passes the part that leads its input back to where it is not flat. This is the rule of
    the library Lucid (redirected_relu_grad.py), by which the visualization of a dead unit starts.
    The sign is that of a loss: what is differentiated must be made small, not large. A ReLU inside
    a loop and any other activation keep their own gradient.
    """

    def replaced(x: Array, redirected: Array | bool) -> Array:
        program = relus.Program(jax.make_jaxpr(function)(x))
        (found,) = _evaluate(program, [x], "redirected", redirected)
        return found

    return replaced


def _backward(
    model: nn.Module, variables: Variables, images: Array, target: FeatureLike, rule: Rule
) -> Array:
    images = take_floats(images)
    goal = make_feature_or_target(target, model, variables, images)
    model, variables = unroll(model, variables)
    return _gradient(model, variables, images, goal, rule)


@tracing.jit("rule")
def _gradient(
    model: nn.Module, variables: Variables, images: Array, target: Target | Feature, rule: Rule
) -> Array:
    def forward(images: Array) -> Array:
        # With `capture`, `layers.Stage` runs its blocks one by one, without a scan.
        return trace_output(model, variables, images, target, capture=True)

    def score(images: Array) -> Array:
        program = relus.Program(programs.drop_unused(jax.make_jaxpr(forward)(images)))
        _check_activations(program, type(model).__name__, isinstance(target, Feature))
        (output,) = _evaluate(program, [images], rule)
        return target.score(output).sum()

    return jax.grad(score)(images)


def _evaluate(
    program: relus.Program,
    args: Sequence[Array],
    rule: Rule,
    redirected: Array | bool = False,
) -> list[Array]:
    """Returns the outputs of a program whose ReLUs have the gradient of `rule`."""
    jaxpr, consts = program.program.jaxpr, program.program.consts
    values: dict[core.Var, Any] = dict(zip(jaxpr.constvars, consts))
    values |= dict(zip(jaxpr.invars, args))

    def read(var: core.Var | core.Literal) -> Any:
        return var.val if isinstance(var, core.Literal) else values[var]

    for eqn in jaxpr.eqns:
        given = [read(var) for var in eqn.invars]
        activation, inner = program.find_activation(eqn), list(program.list_programs(eqn))
        found: list[Any]
        if activation is not None and activation.name == "relu":
            apply = _make_activation(rule, activation.lowest, activation.highest)
            found = [apply(given[activation.read], redirected)]
        elif activation is not None or not any("relu" in each.list_activations() for each in inner):
            found = programs.evaluate_equation(eqn, given)
        elif programs.is_call(eqn):
            found = _evaluate(inner[0], given, rule, redirected)
        elif rule == "redirected":
            found = programs.evaluate_equation(eqn, given)
        else:
            raise UndefinedRule(
                f"a ReLU is inside a {eqn.primitive.name}, where guided backpropagation and the"
                " deconvnet cannot replace its gradient; run the blocks one by one"
            )
        values |= dict(zip(eqn.outvars, found))
    return [read(var) for var in jaxpr.outvars]


@functools.cache  # one function for all equal ReLUs, so that JAX traces it once
def _make_activation(
    rule: Rule, lowest: float, highest: float
) -> Callable[[Array, Array | bool], Array]:
    """Returns min(max(x, lowest), highest) with the gradient of `rule`; the second argument is that
    of `redirect_gradients`."""

    @jax.custom_vjp
    def activation(x: Array, redirected: Array | bool) -> Array:
        above = x if lowest == -jnp.inf else lax.max(x, jnp.asarray(lowest, x.dtype))
        return above if highest == jnp.inf else lax.min(above, jnp.asarray(highest, x.dtype))

    def backward(kept: tuple[Array, Array | bool], g: Array) -> tuple[Array, None]:
        x, redirected = kept
        is_open, up = (x > lowest) & (x < highest), g > 0
        if rule == "deconvnet":
            return _keep(up, g), None
        if rule == "guided":
            return _keep(is_open & up, g), None
        own = _keep(is_open, g)
        # The step is against the gradient: a negative one enlarges x.
        back = _keep(is_open | ((x <= lowest) & (g < 0)) | ((x >= highest) & up), g)
        blocked = ~jnp.any(own != 0, axis=tuple(range(1, x.ndim)), keepdims=True)
        return jnp.where(blocked & redirected, back, own), None

    activation.defvjp(lambda x, active: (activation(x, active), (x, active)), backward)
    return activation


def _keep(passed: Array, g: Array) -> Array:
    return lax.select(passed, g, jnp.zeros_like(g))


def _check_activations(program: relus.Program, network: str, needs_none: bool) -> None:
    """Raises `UndefinedRule` for another activation than ReLU. `needs_none`: whether a program
    without ReLU is allowed."""
    names = list(program.list_activations())
    for name in names:
        if name != "relu":
            raise UndefinedRule(
                f"{network} has the activation {name}: guided backpropagation and the"
                " deconvnet are defined for ReLU; take gradient, smooth_grad or grad_cam"
            )
    if not names and not needs_none:
        raise UndefinedRule(f"{network} has no ReLU: these methods would equal gradient")
