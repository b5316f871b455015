"""Redirected ReLU gradients: Lucid's rule (redirected_relu_grad.py) written anew in NumPy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns.analysis.explain.backward_rules import redirect_gradients


def by_lucid(x, g, highest):
    """The gradient by x f32 [N H W C] of a ReLU whose output has the gradient g of a loss."""
    found = np.zeros_like(g)
    for image in range(len(x)):
        flat = (x[image] < 0) | (x[image] > highest)
        own = np.where(flat, 0, g[image])
        lower = (x[image] < 0) & (g[image] > 0)  # the step would make x smaller yet
        higher = (x[image] > highest) & (g[image] < 0)
        redirected = np.where(lower | higher, 0, g[image])
        found[image] = own if np.linalg.norm(own) > 0 else redirected
    return found


@pytest.mark.parametrize(("activation", "highest"), [(nn.relu, np.inf), (nn.relu6, 6.0)])
def test_redirected_gradients_are_lucids(activation, highest):
    rng = np.random.default_rng(0)
    x = rng.normal(0, 5, (4, 2, 3, 2)).astype(np.float32)
    x[1] = -abs(x[1])
    x[2] = np.where(x[2] > 0, 6 + x[2], x[2]) if highest == 6 else -abs(x[2])
    g = rng.normal(size=x.shape).astype(np.float32)
    g[3] = np.where((x[3] > 0) & (x[3] < highest), 0, g[3])  # only flat pixels get a gradient

    def loss(x):
        return (jax.jit(activation)(x) * g).sum()

    def gradient(redirected):
        return jax.jit(jax.grad(redirect_gradients(loss)))(x, redirected)

    wanted = by_lucid(x, g, highest)
    np.testing.assert_allclose(gradient(True), wanted)
    own = jax.grad(loss)(x)
    np.testing.assert_allclose(gradient(False), own)
    for image, blocked in enumerate((False, True, True, True)):
        assert np.allclose(wanted[image], own[image]) != blocked


def test_a_relu_in_a_loop_and_another_activation_keep_their_gradient():
    def loss(x):
        looped = jax.lax.fori_loop(0, 2, lambda _, y: nn.relu(y - 1), x)
        return (looped + nn.hard_sigmoid(x) + x).sum()

    x = jnp.full((1, 2), -9.0)
    found = jax.grad(redirect_gradients(loss))(x, True)
    np.testing.assert_allclose(found, jax.grad(loss)(x))
