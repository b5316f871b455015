"""Convolutions know that they stand in control flow, whatever is cached between it and them."""

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
    """Of each convolution in a program: (whether it stands in control flow, whether it knows)."""
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


def found(function, *args):
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
def test_what_is_cached_on_one_side_does_not_serve_the_other(name, order):
    """The same function outside of control flow and inside, and its gradients."""
    wrapped = WRAPPED[name](conv2d)

    def loss(x, kernel):
        f = lambda x: wrapped(x, kernel)  # noqa: E731
        x = f(x) if order == "outside first" else x
        x = inside_scan(f, inside_cond(f, x))
        return jnp.sin(x if order == "outside first" else f(x)).sum()

    for function, count in ((loss, 3), (jax.grad(loss, (0, 1)), 9)):
        pairs = found(function, X, KERNEL)
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


@pytest.mark.parametrize("says_so", [False, True])
def test_a_rule_of_ones_own_is_traced_too_late_to_know(says_so):
    """A known limit: JAX asks for it when the body has been left. It may say so itself."""

    def rule(x):
        with inside_control_flow() if says_so else contextlib.nullcontext():
            return conv2d(x, KERNEL)

    f = jax.custom_vjp(lambda x: conv2d(x, KERNEL))
    f.defvjp(lambda x: (rule(x), None), lambda _, dy: (rule(dy),))
    pairs = found(jax.grad(lambda x: inside_cond(f, x).sum()), X)
    assert {inside for inside, _ in pairs} == {True}
    assert all(knows for _, knows in pairs) is says_so


# ---------------------------------------------------------------------------- of Stage, residual


class Block(nn.Module):
    """shortcut(x) + conv(conv(x)), dropped as `drop` says."""

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
def test_stage_and_residual_say_so(name, scan):
    stage = layers.Stage(WRAPPED_BLOCKS[name](Block), Conv, 3, None, scan=scan)
    keys = jax.random.split(jax.random.key(0), 3)
    drop = DropPath(jnp.full(3, 0.5), keys, "batch")
    variables = jax.eval_shape(stage.init, jax.random.key(0), X)
    if scan:
        variables = tree.stack_blocks(variables)
    for given in (None, drop):
        loss = lambda v, given=given: stage.apply(v, X, given).sum()  # noqa: E731
        for function in (loss, jax.grad(loss)):
            pairs = found(function, variables)
            assert {inside for inside, _ in pairs} == {False, scan or given is not None}
            assert all(knows == inside for inside, knows in pairs)


# ---------------------------------------------------------------------------- the results


class Transformed(nn.Module):
    """Three convolutions: rematerialised, under a branch that runs, and scanned over."""

    conv: Any
    says_so: bool = False

    @nn.compact
    def __call__(self, x, kept):
        def body(conv, x):
            if not self.says_so:
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


@pytest.mark.parametrize("says_so", [False, True])
def test_results_under_remat_cond_and_scan(says_so):
    x = np.random.RandomState(0).randn(2, 4, 4, 4).astype(np.float32)
    theirs, ours = Transformed(nn.Conv), Transformed(Conv, says_so)
    params = theirs.init(jax.random.key(0), x, True)

    def run(model):
        loss = lambda p, x, kept: jnp.sin(model.apply(p, x, kept)).sum()  # noqa: E731
        step = quick_jit(jax.value_and_grad(loss, (0, 1)))
        return [step(params, x, kept) for kept in (True, False)]

    same(run(ours), run(theirs))
