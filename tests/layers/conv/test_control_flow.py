"""Convolutions know that they are in control flow, even if functions in between are cached."""

from __future__ import annotations

import contextlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from flax_cnns import layers, tree
from flax_cnns.layers import Conv, inside_control_flow
from flax_cnns.layers.conv import conv2d
from flax_cnns.layers.drop_path import DropPath
from tests.layers.conv.cases import quick_jit, same

X = np.random.RandomState(0).randn(2, 4, 4, 3).astype(np.float32)
KERNEL = np.random.RandomState(1).randn(3, 3, 3, 3).astype(np.float32)


def convolutions(jaxpr, inside=False):
    """Yields (is in control flow, has the flag) for each convolution in a program."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name.startswith("conv2d"):
            yield inside, equation.params["geometry"].control_flow
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=is_program):
            if is_program(value):
                program = getattr(value, "jaxpr", value)
                yield from convolutions(program, inside or name in ("cond", "scan", "while"))


def is_program(value):
    return hasattr(getattr(value, "jaxpr", value), "eqns")


def find_convolutions(function, *args):
    return list(convolutions(jax.make_jaxpr(function)(*args).jaxpr))


def inside_cond(f, x):
    def body(x):
        with inside_control_flow():
            return f(x)

    return lax.cond(x.sum() > 0, body, lambda x: x, x)


def inside_scan(f, x):
    def body(x, _):
        with inside_control_flow():
            return f(x), None

    return lax.scan(body, x, None, length=2)[0]


def per_image(f):
    return jax.vmap(jax.jit(lambda x, kernel: f(x[None], kernel)[0]), (0, None))


WRAPPED = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "jit of checkpoint of jit": lambda f: jax.jit(jax.checkpoint(jax.jit(f))),
    "jit under vmap": per_image,
}


@pytest.mark.parametrize("order", ["outside first", "inside first"])
@pytest.mark.parametrize("name", WRAPPED)
def test_inside_and_outside_do_not_share_a_cache(name, order):
    """Calls one function, and its gradients, outside and inside control flow."""
    wrapped = WRAPPED[name](conv2d)

    def loss(x, kernel):
        f = lambda x: wrapped(x, kernel)  # noqa: E731
        x = f(x) if order == "outside first" else x
        x = inside_scan(f, inside_cond(f, x))
        return jnp.sin(x if order == "outside first" else f(x)).sum()

    for function, count in ((loss, 3), (jax.grad(loss, (0, 1)), 9)):
        pairs = find_convolutions(function, X, KERNEL)
        assert len(pairs) >= count
        assert {inside for inside, _ in pairs} == {False, True}
        assert all(knows == inside for inside, knows in pairs)


def test_a_compiled_function_is_compiled_again_inside():
    f = jax.jit(conv2d)
    f(X, KERNEL)
    with inside_control_flow():
        text = f.lower(X, KERNEL).as_text()
    assert "stablehlo.convolution" not in text
    assert "stablehlo.convolution" in f.lower(X, KERNEL).as_text()


@pytest.mark.parametrize("opens_context", [False, True])
def test_a_custom_rule_is_traced_too_late_to_know(opens_context):
    """A known limit: JAX traces the rule after the body, so the rule must open the context."""

    def rule(x):
        with inside_control_flow() if opens_context else contextlib.nullcontext():
            return conv2d(x, KERNEL)

    f = jax.custom_vjp(lambda x: conv2d(x, KERNEL))
    f.defvjp(lambda x: (rule(x), None), lambda _, dy: (rule(dy),))
    pairs = find_convolutions(jax.grad(lambda x: inside_cond(f, x).sum()), X)
    assert {inside for inside, _ in pairs} == {True}
    assert all(knows for _, knows in pairs) is opens_context


# ---------------------------------------------------------------------------- Stage and residual


class Block(nn.Module):
    """shortcut(x) + conv(conv(x)), where the branch is dropped as `drop` says."""

    conv: Any

    @nn.compact
    def __call__(self, x, drop=None):
        def branch(block, x):
            x = block.conv(3, (3, 3), name="conv1")(x)
            return block.conv(3, (3, 3), name="conv2")(nn.relu(x))

        shortcut = self.conv(3, (1, 1), name="projection")(x)
        return layers.residual(shortcut, branch, self, x, drop)


WRAPPED_BLOCKS = {"plain": lambda block: block, "jit": nn.jit, "remat": nn.remat}


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", WRAPPED_BLOCKS)
def test_stage_and_residual_open_the_context(name, scan):
    stage = layers.Stage(WRAPPED_BLOCKS[name](Block), Conv, 3, None, scan=scan)
    keys = jax.random.split(jax.random.key(0), 3)
    drop = DropPath(jnp.full(3, 0.5), keys, "batch")
    variables = jax.eval_shape(stage.init, jax.random.key(0), X)
    if scan:
        variables = tree.stack_blocks(variables)
    for given in (None, drop):
        loss = lambda v, given=given: stage.apply(v, X, given).sum()  # noqa: E731
        for function in (loss, jax.grad(loss)):
            pairs = find_convolutions(function, variables)
            assert {inside for inside, _ in pairs} == {False, scan or given is not None}
            assert all(knows == inside for inside, knows in pairs)


# ---------------------------------------------------------------------------- results


class Transformed(nn.Module):
    """Three convolutions: rematerialized, in a conditional, and scanned."""

    conv: Any
    opens_context: bool = False

    @nn.compact
    def __call__(self, x, kept):
        def body(conv, x):
            if not self.opens_context:
                return conv(x)
            with inside_control_flow():
                return conv(x)

        x = nn.remat(self.conv)(4, (3, 3), name="remat")(x)
        branch = self.conv(4, (3, 3), feature_group_count=2, name="branch")
        branch(x)  # both branches need the parameters
        x = nn.cond(kept, body, lambda conv, x: x, branch, x)
        run = nn.scan(
            lambda conv, x, _: (nn.relu(body(conv, x)), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return run(self.conv(4, (3, 3), name="scanned"), x, None)[0]


@pytest.mark.parametrize("opens_context", [False, True])
def test_results_under_remat_cond_and_scan(opens_context):
    x = np.random.RandomState(0).randn(2, 4, 4, 4).astype(np.float32)
    theirs, ours = Transformed(nn.Conv), Transformed(Conv, opens_context)
    params = theirs.init(jax.random.key(0), x, True)

    def run(model):
        loss = lambda p, x, kept: jnp.sin(model.apply(p, x, kept)).sum()  # noqa: E731
        step = quick_jit(jax.value_and_grad(loss, (0, 1)))
        return [step(params, x, kept) for kept in (True, False)]

    same(run(ours), run(theirs))
