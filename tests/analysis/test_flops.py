"""Our count of FLOPs, against closed forms, `analysis.cost` and XLA's own count."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import lax

from flax_cnns.analysis.cost import cost
from flax_cnns.analysis.flops import count_flops
from flax_cnns.layers import Conv
from flax_cnns.models.registry import create_model


def count(function, *arguments, platform="tpu"):
    return count_flops(jax.make_jaxpr(function)(*arguments), platform)


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


@pytest.mark.parametrize("conv", [Conv, nn.Conv])
@pytest.mark.parametrize(("strides", "groups"), [(1, 1), (2, 1), (1, 4), (2, 8)])
def test_each_gradient_of_a_convolution_costs_what_it_costs_itself(conv, strides, groups):
    """All three products multiply the same pairs of numbers: by hand, 2 * N * 8/s * 8/s * 3 * 3 *
    (8 / groups) * 16."""
    module = conv(
        16, (3, 3), strides=(strides, strides), padding=((1, 1), (1, 1)), feature_group_count=groups
    )
    x = shape(2, 8, 8, 8)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    forward = 2 * 2 * (8 // strides) ** 2 * 9 * (8 // groups) * 16
    assert count(module.apply, variables, x) == forward
    both = jax.grad(lambda v, x: module.apply(v, x).sum(), argnums=(0, 1))
    assert count(both, variables, x) == 3 * forward


def test_a_network_costs_what_its_layers_cost():
    """The jaxpr's count is twice the MACs at the module boundary; a training step needs three times
    that, less the gradient by the images, which nobody asks for."""
    model = create_model("lenet5", num_classes=10, input_size=(32, 32, 1))
    x = shape(4, 32, 32, 1)
    variables = jax.eval_shape(lambda key, x: model.init(key, x, train=False), jax.random.key(0), x)
    table = cost(model, x.shape)
    loss = lambda v, x: model.apply(v, x, train=False).sum()  # noqa: E731
    assert count(loss, variables, x) == 2 * table.macs
    stem = table.layers[0].macs
    assert count(jax.grad(loss), variables, x) == 2 * (3 * table.macs - stem)


def test_loops_branches_and_platforms():
    a = shape(4, 4)
    product = 2 * 4**3

    def scanned(a):
        return lax.scan(lambda c, _: (c @ c, None), a, length=5)[0]

    assert count(scanned, a) == 5 * product
    branch = lambda a: lax.cond(a[0, 0] > 0, lambda a: a @ a @ a, lambda a: a @ a, a)  # noqa: E731
    assert count(branch, a) == 2 * product
    both = lambda a: lax.platform_dependent(a, cpu=lambda a: a @ a @ a, default=lambda a: a)  # noqa: E731
    assert count(both, a, platform="cpu") == 2 * product
    assert count(both, a, platform="gpu") == 0
    assert count(jax.jit(jax.checkpoint(lambda a: a @ a)), a) == product


def test_the_count_is_near_that_of_xla():
    """XLA's count has the elementwise operations too, and none for zeros of padding."""

    def loss(kernel, x):
        y = lax.conv_general_dilated(
            x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return (y @ jnp.ones((16, 16))).sum()

    arguments = shape(3, 3, 16, 16), shape(4, 12, 12, 16)
    ours = count(loss, *arguments, platform="cpu")
    theirs = jax.jit(loss).lower(*arguments).cost_analysis()["flops"]
    assert ours == pytest.approx(theirs, rel=0.01)
