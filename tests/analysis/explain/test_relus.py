"""ReLUs written in other ways have the backward rules of `nn.relu`; others are refused."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns.analysis.explain import backward_rules, gradients
from flax_cnns.errors import UserError

IMAGES = jax.random.normal(jax.random.key(3), (2, 3, 3, 2))


class Hand(nn.Module):
    """A dense layer between two activations, with a norm that guards its variance by max(x, 0)."""

    activate: Callable = nn.relu

    @nn.compact
    def __call__(self, images, *, train=False):
        x = self.activate(images.reshape(len(images), -1))
        x = nn.Dense(6, name="hidden", kernel_init=nn.initializers.normal(3.0))(x)
        x = nn.GroupNorm(2, name="norm")(x)
        return nn.Dense(3, name="head")(self.activate(x))


@jax.jit
def _nested(x):
    return jnp.where(x <= 0, 0.0, x)


@pytest.fixture(scope="module")
def variables():
    return Hand().init(jax.random.key(4), IMAGES)


@pytest.fixture(scope="module")
def wanted(variables):
    return {
        method: method(Hand(), variables, IMAGES, 0)
        for method in (backward_rules.guided_backprop, backward_rules.deconvnet)
    }


@pytest.mark.parametrize(
    "activate",
    [
        lambda x: jnp.maximum(x, 0),
        lambda x: jax.lax.max(jnp.zeros_like(x), x),
        lambda x: jnp.where(x > 0, x, 0),
        lambda x: x * (x > 0),
        lambda x: jnp.clip(x, 0),
        _nested,
    ],
)
def test_a_relu_without_its_name(variables, wanted, activate):
    plain = gradients.gradient(Hand(), variables, IMAGES, 0)
    for method, each in wanted.items():
        found = method(Hand(activate), variables, IMAGES, 0)
        np.testing.assert_allclose(found, each, rtol=1e-5, atol=1e-7)
        assert not np.allclose(found, plain)


@pytest.mark.parametrize(
    "activate", [lambda x: jnp.minimum(jnp.maximum(x, 0), 6), lambda x: jnp.clip(x, 0, 6)]
)
def test_a_relu6_without_its_name(variables, activate):
    for method in (backward_rules.guided_backprop, backward_rules.deconvnet):
        found = method(Hand(activate), variables, 9 * IMAGES, 0)
        by_name = method(Hand(lambda x: nn.relu6(x)), variables, 9 * IMAGES, 0)
        np.testing.assert_allclose(found, by_name, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("activate", "name"),
    [
        (lambda x: jnp.maximum(x, 0.1 * x), "leaky_relu"),
        (lambda x: jnp.maximum(x, -1), r"max\(x, -1\)"),
        (lambda x: jnp.where(x > 0, x, 0.1 * x), r"where\(x > c, ...\)"),
    ],
)
def test_other_activations_without_a_name_are_refused(variables, activate, name):
    with pytest.raises(UserError, match=f"Hand has the activation {name}: .* defined for ReLU"):
        backward_rules.guided_backprop(Hand(activate), variables, IMAGES, 0)
