"""ReLUs written in other ways have the backward rules of `nn.relu`; others are refused."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns.analysis.explain import backward_rules, gradients, relus
from flax_cnns.errors import UserError

IMAGES = jax.random.normal(jax.random.key(3), (2, 3, 3, 2))


class Hand(nn.Module):
    """For each activation: a dense layer between two of them, with a norm that guards its variance
    by max(x, 0). All share their parameters, and the logits are sums."""

    activations: Sequence[Callable] = (nn.relu,)

    @nn.compact
    def __call__(self, images, *, train=False):
        hidden = nn.Dense(6, name="hidden", kernel_init=nn.initializers.normal(3.0))
        norm, head = nn.GroupNorm(2, name="norm"), nn.Dense(3, name="head")
        x = images.reshape(len(images), -1)
        return sum(head(each(norm(hidden(each(x))))) for each in self.activations)


@jax.jit
def _nested(x):
    return jnp.where(x <= 0, 0.0, x)


RELUS = (
    lambda x: jnp.maximum(x, 0),
    lambda x: jax.lax.max(jnp.zeros_like(x), x),
    lambda x: jnp.where(x > 0, x, 0),
    lambda x: x * (x > 0),
    lambda x: jnp.clip(x, 0),
    _nested,
)
RELU6S = (lambda x: jnp.minimum(jnp.maximum(x, 0), 6), lambda x: jnp.clip(x, 0, 6))


@pytest.fixture(scope="module")
def variables():
    return Hand().init(jax.random.key(4), IMAGES)


@pytest.mark.parametrize("method", [backward_rules.guided_backprop, backward_rules.deconvnet])
def test_relus_without_their_name(variables, method):
    """One network has all of them, so that it is compiled once."""
    wanted = method(Hand(), variables, IMAGES, 0)
    found = method(Hand(RELUS), variables, IMAGES, 0)
    np.testing.assert_allclose(found / len(RELUS), wanted, rtol=1e-4, atol=1e-6)
    assert not np.allclose(wanted, gradients.gradient(Hand(), variables, IMAGES, 0))


@pytest.mark.parametrize("method", [backward_rules.guided_backprop, backward_rules.deconvnet])
def test_relu6s_without_their_name(variables, method):
    found = method(Hand(RELU6S), variables, 9 * IMAGES, 0)
    by_name = method(Hand((nn.relu6,)), variables, 9 * IMAGES, 0)
    np.testing.assert_allclose(found / 2, by_name, rtol=1e-4, atol=1e-6)
    assert not np.allclose(by_name, method(Hand(), variables, 9 * IMAGES, 0))


@pytest.mark.parametrize("activate", [*RELUS, *RELU6S])
def test_each_is_found(activate):
    program = relus.Program(jax.make_jaxpr(activate)(jnp.ones((2, 3))))
    assert set(program.list_activations()) == {"relu"}


@pytest.mark.parametrize(
    ("activate", "name"),
    [
        (lambda x: jnp.maximum(x, 0.1 * x), "leaky_relu"),
        (nn.soft_sign, "soft_sign"),
        (lambda x: jnp.maximum(x, -1), r"max\(x, -1\)"),
        (lambda x: jnp.where(x > 0, x, 0.1 * x), r"where\(x > c, ...\)"),
    ],
)
def test_other_activations_without_a_name_are_refused(variables, activate, name):
    with pytest.raises(UserError, match=f"Hand has the activation {name}: .* defined for ReLU"):
        backward_rules.guided_backprop(Hand((activate,)), variables, IMAGES, 0)
