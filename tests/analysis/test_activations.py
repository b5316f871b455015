"""Statistics of activations against NumPy, LSUV against its definition."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns import create_model, init_variables
from flax_cnns import tree as pytree
from flax_cnns.analysis import activations
from flax_cnns.analysis.explain.features import features
from flax_cnns.errors import UserError


@pytest.fixture(scope="module")
def lenet():
    model = create_model("lenet5", input_size=(32, 32, 1))
    images = jax.random.normal(jax.random.key(1), (6, 32, 32, 1))
    return model, init_variables(model, jax.random.key(0)), images


def test_statistics_over_batches_are_those_of_all_images(lenet):
    model, variables, images = lenet
    found = activations.measure_activations(model, variables, [images[:4], images[4:]], bins=7)
    paths = [layer.path for layer in found]
    assert paths == activations.find_layers(*lenet)
    assert len(paths) == 5
    outputs = features(model, variables, images, paths)
    for layer in found:
        output = np.asarray(outputs[layer.path], np.float64)
        assert layer.values == output.size == layer.counts.sum()
        np.testing.assert_allclose([layer.mean, layer.std], [output.mean(), output.std()], 1e-5)
        highest = output.reshape(-1, output.shape[-1]).max(0)
        assert layer.dead == (highest <= 0).mean()
        inside = np.clip(output, layer.edges[0], layer.edges[-1])
        np.testing.assert_array_equal(layer.counts, np.histogram(inside, layer.edges)[0])


def test_a_unit_that_is_never_positive_is_dead(lenet):
    model, variables, images = lenet
    params = pytree.flatten(variables["params"])
    path = next(p for p in params if p.endswith("/bias"))
    broken = params | {path: params[path].at[0].set(-1e3)}
    variables = {**variables, "params": pytree.unflatten(broken)}
    layer = path.rpartition("/")[0]
    (found,) = activations.measure_activations(model, variables, images, [layer])
    assert found.dead >= 1 / len(params[path])


class Halves(nn.Module):
    @nn.compact
    def __call__(self, images):
        return nn.relu(jnp.concatenate([images, -jnp.abs(images)], -1))


class HalfDead(nn.Module):
    """A module whose last channels are zero behind their ReLU."""

    @nn.compact
    def __call__(self, images, *, train=False):
        return nn.Dense(2, name="head")(Halves(name="halves")(images).mean((1, 2)))


def test_channels_that_are_always_zero_are_dead():
    images = jax.random.normal(jax.random.key(0), (4, 3, 3, 3))
    variables = HalfDead().init(jax.random.key(1), images)
    (found,) = activations.measure_activations(HalfDead(), variables, images, ["halves"])
    assert found.dead == 0.5


@pytest.mark.parametrize("paths", [None, ["head"]])
def test_no_images_is_one_line(lenet, paths):
    with pytest.raises(UserError, match="at least one batch"):
        activations.measure_activations(*lenet[:2], [], paths)


def test_images_in_numpy_are_one_batch_and_must_give_finite_outputs(lenet):
    model, variables, images = lenet
    (found,) = activations.measure_activations(model, variables, np.asarray(images), ["head"])
    assert found.values == 60
    with pytest.raises(UserError, match="output of 'head' is not finite"):
        activations.measure_activations(model, variables, np.nan * images, ["head"])


def test_gradient_norms_by_layer(lenet):
    model, variables, images = lenet
    labels = jnp.arange(6) % 10
    found = activations.measure_gradients(model, variables, images, labels)

    def loss(params):
        logits = model.apply({**variables, "params": params}, images, train=False)
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(6), labels])

    grads = jax.jit(jax.grad(loss))(variables["params"])
    head = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(grads["head"])])
    np.testing.assert_allclose(found["head"], np.linalg.norm(head), rtol=1e-4)
    total = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(grads)))
    np.testing.assert_allclose(np.linalg.norm(list(found.values())), total, rtol=1e-4)


class Deep(nn.Module):
    """Eight dense layers whose kernels are far too small."""

    @nn.compact
    def __call__(self, images, *, train=False):
        x = images.reshape(len(images), -1)
        for i in range(8):
            x = nn.tanh(nn.Dense(32, kernel_init=nn.initializers.normal(0.01), name=f"fc{i}")(x))
        return nn.Dense(4, name="head")(x)


def test_lsuv_gives_every_layer_unit_variance_and_orthogonal_kernels():
    images = jax.random.normal(jax.random.key(2), (64, 4, 4, 2))
    variables = Deep().init(jax.random.key(0), images)
    before = activations.measure_activations(Deep(), variables, images)
    assert before[-2].std < 1e-3  # vanished
    found = activations.lsuv(Deep(), variables, images, key=jax.random.key(5))
    assert jax.tree.structure(found) == jax.tree.structure(variables)
    for layer in activations.measure_activations(Deep(), found, images):
        assert abs(layer.std**2 - 1) < 0.1, layer.path
        kernel = np.asarray(found["params"][layer.path]["kernel"])
        gram = kernel.T @ kernel
        np.testing.assert_allclose(gram / gram[0, 0], np.eye(len(gram)), atol=1e-4)


def test_lsuv_of_constant_images_is_one_line():
    images = jnp.zeros((2, 4, 4, 2))
    variables = Deep().init(jax.random.key(0), images)
    with pytest.raises(UserError, match=r"'fc0' has the variance 0\.0 over 2 images"):
        activations.lsuv(Deep(), variables, images, key=jax.random.key(5))
