"""Guided backpropagation, the deconvnet, redirected gradients: another rule at every ReLU.

The traced program is evaluated again, and the calls named relu and relu6 get another gradient. Max
pooling keeps its own: it goes to the largest pixel, which is the deconvnet's unpooling by recorded
switches. Both methods are defined only for ReLU networks. Other activations raise `UserError`.

Adebayo et al. 2018 (arXiv 1810.03292) find that guided backpropagation hardly depends on the upper
layers: its pictures look like the image, not like what the network learned. `quality.randomize`
tests this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend import core

from flax_cnns.analysis import tracing
from flax_cnns.analysis.explain.features import Variables, unroll
from flax_cnns.analysis.explain.gradients import check_floats
from flax_cnns.analysis.explain.targets import Target, TargetLike, make_target
from flax_cnns.errors import UserError
from flax_cnns.types import Array

Rule = Literal["guided", "deconvnet", "redirected"]

_HIGHEST = {"relu": jnp.inf, "relu6": 6.0}  # the value above which the activation is flat
# Calls and primitives that are activations or gates of another kind.
_OTHERS = {
    *("silu", "swish", "gelu", "sigmoid", "hard_silu", "hard_swish", "hard_sigmoid", "elu", "selu"),
    *("celu", "softplus", "leaky_relu", "mish", "softmax", "log_softmax", "hard_tanh"),
    *("squareplus", "tanh", "logistic", "erf", "exp"),
}


def guided_backprop(
    model: nn.Module, variables: Variables, images: Array, target: TargetLike = None
) -> Array:
    """Returns the gradient [N H W C] that passes a ReLU only where it is positive and the ReLU's
    input was positive (Springenberg et al. 2015, arXiv 1412.6806, section 3.4).

    Raises `UserError` for a network without ReLU or with another activation, and as `make_target`.
    """
    return _backward(model, variables, images, target, "guided")


def deconvnet(
    model: nn.Module, variables: Variables, images: Array, target: TargetLike = None
) -> Array:
    """Returns the gradient [N H W C] that passes a ReLU where it is positive, regardless of the
    ReLU's input (Zeiler & Fergus 2014, arXiv 1311.2901, section 2.1).

    Raises `UserError` as `guided_backprop` does.
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
        program = jax.make_jaxpr(function)(x)
        (found,) = _evaluate(program, [x], "redirected", redirected)
        return found

    return replaced


def _backward(
    model: nn.Module, variables: Variables, images: Array, target: TargetLike, rule: Rule
) -> Array:
    check_floats(images)
    goal = make_target(target, model, variables, images)
    model, variables = unroll(model, variables)
    return _gradient(model, variables, images, goal, rule)


@tracing.jit("rule")
def _gradient(
    model: nn.Module, variables: Variables, images: Array, target: Target, rule: Rule
) -> Array:
    def forward(images: Array) -> Any:
        # `layers.Stage` does not scan while outputs could be captured.
        return model.apply(variables, images, train=False, mutable=["intermediates"])[0]

    def score(images: Array) -> Array:
        program = jax.make_jaxpr(forward)(images)
        _check_activations(program.jaxpr, type(model).__name__)
        (logits,) = _evaluate(program, [images], rule)
        return target.score(logits).sum()

    return jax.grad(score)(images)


def _evaluate(
    program: core.ClosedJaxpr,
    args: Sequence[Array],
    rule: Rule,
    redirected: Array | bool = False,
) -> list[Array]:
    """The outputs of a program whose activations have the gradient of `rule`."""
    values: dict[core.Var, Any] = dict(zip(program.jaxpr.constvars, program.consts))
    values |= dict(zip(program.jaxpr.invars, args))

    def read(var: core.Var | core.Literal) -> Any:
        return var.val if isinstance(var, core.Literal) else values[var]

    for eqn in program.jaxpr.eqns:
        given = [read(var) for var in eqn.invars]
        inner = _inner_program(eqn)
        if eqn.params.get("name") in _HIGHEST and len(given) == 1:
            found = [_activation(rule, _HIGHEST[eqn.params["name"]])(given[0], redirected)]
        elif eqn.params.get("name") in _OTHERS or not any(
            any(_names(each, set(_HIGHEST))) for each in jaxprs_in(eqn)
        ):
            found = _evaluate_one(eqn, given)
        elif inner is not None:
            found = _evaluate(inner, given, rule, redirected)
        elif rule == "redirected":
            found = _evaluate_one(eqn, given)
        else:
            raise UserError(
                f"a ReLU is inside a {eqn.primitive.name}, where guided backpropagation and the"
                " deconvnet cannot replace its gradient; run the blocks one by one"
            )
        values |= dict(zip(eqn.outvars, found))
    return [read(var) for var in program.jaxpr.outvars]


def _evaluate_one(eqn: core.JaxprEqn, given: Sequence[Any]) -> list[Any]:
    """The outputs of one equation, with its own derivative."""
    variables = [(var, x) for var, x in zip(eqn.invars, given) if isinstance(var, core.Var)]
    unique = dict(variables)
    program = core.Jaxpr((), list(unique), eqn.outvars, [eqn], eqn.effects)
    return core.jaxpr_as_fun(core.ClosedJaxpr(program, ()))(*unique.values())


def _activation(rule: Rule, highest: float) -> Callable[[Array, Array | bool], Array]:
    """min(max(x, 0), highest) with the gradient of `rule`; the second argument is that of
    `redirect_gradients`."""

    @jax.custom_vjp
    def activation(x: Array, redirected: Array | bool) -> Array:
        return jnp.clip(x, 0, highest)

    def backward(kept: tuple[Array, Array | bool], g: Array) -> tuple[Array, None]:
        x, redirected = kept
        open_, up = (x > 0) & (x < highest), g > 0
        if rule == "deconvnet":
            return jnp.where(up, g, 0), None
        if rule == "guided":
            return jnp.where(open_ & up, g, 0), None
        own = jnp.where(open_, g, 0)
        # The step is against the gradient: a negative one enlarges x.
        back = jnp.where(open_ | ((x <= 0) & (g < 0)) | ((x >= highest) & up), g, 0)
        blocked = ~jnp.any(own != 0, axis=tuple(range(1, x.ndim)), keepdims=True)
        return jnp.where(blocked & redirected, back, own), None

    activation.defvjp(lambda x, active: (activation(x, active), (x, active)), backward)
    return activation


def _check_activations(program: core.Jaxpr, network: str) -> None:
    for name in _names(program, _OTHERS | set(_HIGHEST)):
        if name in _OTHERS:
            raise UserError(
                f"{network} has the activation {name}: guided backpropagation and the"
                " deconvnet are defined for ReLU; take gradient, smooth_grad or grad_cam"
            )
    if not any(_names(program, set(_HIGHEST))):
        raise UserError(f"{network} has no ReLU: these methods would equal gradient")


def _names(program: core.Jaxpr, wanted: set[str]) -> Iterator[str]:
    """Names of calls and primitives in the program that are in `wanted`; an activation's own
    program is not searched."""
    for eqn in program.eqns:
        for name in (eqn.params.get("name"), eqn.primitive.name):
            if name in wanted:
                yield name
                break
        else:
            for inner in jaxprs_in(eqn):
                yield from _names(inner, wanted)


def _inner_program(eqn: core.JaxprEqn) -> core.ClosedJaxpr | None:
    """The program of an equation that calls it once, with its own arguments."""
    inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    calls = ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "remat2", "checkpoint")
    if inner is None or eqn.primitive.name not in calls:
        return None
    return inner if isinstance(inner, core.ClosedJaxpr) else core.ClosedJaxpr(inner, ())


def jaxprs_in(eqn: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    """The programs among an equation's parameters: of calls, branches and loops."""
    for value in eqn.params.values():
        for inner in value if isinstance(value, tuple | list) else (value,):
            if isinstance(inner, core.ClosedJaxpr | core.Jaxpr):
                yield inner.jaxpr if isinstance(inner, core.ClosedJaxpr) else inner
