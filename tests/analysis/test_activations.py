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
    found = activations.measure_activations(model, variables, [images[:3], images[3:]], bins=7)
    paths = [layer.path for layer in found]
    assert paths == activations.find_layers(*lenet)
    assert len(paths) == 5
    outputs = features(model, variables, images, paths)
    for layer in found:
        output = np.asarray(outputs[layer.path], np.float64)
        assert layer.values == output.size == layer.counts.sum()
        np.testing.assert_allclose([layer.mean, layer.std], [output.mean(), output.std()], 1e-5)
        assert layer.dead is None  # tanh has no dead units
        inside = np.clip(output, layer.edges[0], layer.edges[-1])
        counts = np.histogram(inside, layer.edges)[0]
        np.testing.assert_allclose(layer.counts, counts, atol=2)  # float32 at the edges


class Halves(nn.Module):
    @nn.compact
    def __call__(self, images):
        return nn.relu(jnp.concatenate([images, -jnp.abs(images)], -1))


class HalfDead(nn.Module):
    """Its dead shares follow from its weights: those of `rising`, half of `halves`, none else."""

    @nn.compact
    def __call__(self, images, *, train=False):
        x = Halves(name="halves")(images)
        x = jnp.maximum(nn.Conv(4, (1, 1), name="rising")(x), 0)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        y = nn.relu6(nn.Conv(4, (1, 1), name="shared")(x))
        x = nn.silu(nn.Conv(4, (1, 1), name="smooth")(nn.relu(x)))
        x = nn.relu(x + nn.Conv(4, (1, 1), name="branch")(y))
        return nn.Dense(2, name="head")(x.mean((1, 2)))


@pytest.fixture(scope="module")
def half_dead():
    images = 3 + 2 * jax.random.normal(jax.random.key(0), (8, 3, 3, 3))
    variables = HalfDead().init(jax.random.key(1), images)
    params = pytree.flatten(variables["params"])
    params["rising/bias"] = jnp.array([-50.0, 50.0, 50.0, -50.0])
    return HalfDead(), {**variables, "params": pytree.unflatten(params)}, images


def test_dead_channels_are_those_whose_relu_is_always_zero(half_dead):
    model, variables, images = half_dead
    paths = ["halves", "rising", "norm", "shared", "smooth", "branch", "head"]
    found = activations.measure_activations(model, variables, [images[:4], images[4:]], paths)
    dead = {layer.path: layer.dead for layer in found}
    assert dead.pop("halves") == 0.5  # comes from a ReLU
    assert dead.pop("rising") == 0.5  # goes into a ReLU
    assert dead.pop("shared") is not None  # goes into a ReLU6
    # Into a ReLU and a convolution; SiLU; added first; logits.
    assert dead == dict.fromkeys(["norm", "smooth", "branch", "head"])


def test_batchnorm_by_the_batch_normalizes_what_its_running_statistics_do_not(half_dead):
    model, variables, images = half_dead
    measure = activations.measure_activations
    (running,) = measure(model, variables, images, ["norm"])
    (batch,) = measure(model, variables, images, ["norm"], batchnorm="batch")
    assert running.std > 20  # the running statistics are 0 and 1
    assert abs(batch.mean) < 1e-3
    assert batch.std < 1.01
    labels = jnp.arange(8) % 2
    norms = {
        mode: activations.measure_gradients(model, variables, images, labels, batchnorm=mode)
        for mode in ("running", "batch")
    }

    def loss(params):
        given = {**variables, "params": params}
        logits = model.apply(given, images, train=True, mutable=["batch_stats"])[0]
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(8), labels])

    grads = jax.jit(jax.grad(loss))(variables["params"])  # the network has no dropout
    for layer, found in norms["batch"].items():
        wanted = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in grads[layer].values()))
        np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=1e-5)
    assert norms["running"]["head"] > 5 * norms["batch"]["head"]


def test_gradients_of_several_labels_are_those_of_the_binary_cross_entropy(half_dead):
    model, variables, images = half_dead
    variables = dict(variables)
    labels = jnp.tile(jnp.array([[1.0, 0.0], [1.0, 1.0]]), (4, 1))

    def loss(head):
        params = {**variables["params"], "head": head}
        p = jax.nn.sigmoid(model.apply({**variables, "params": params}, images, train=False))
        return -jnp.mean(jnp.sum(jnp.log(jnp.where(labels > 0, p, 1 - p)), 1))

    head = variables["params"]["head"]
    small = {**variables["params"], "head": jax.tree.map(lambda leaf: leaf / 1e3, head)}
    variables["params"] = small
    found = activations.measure_gradients(model, variables, images, labels)
    grads = jax.grad(loss)(small["head"])
    wanted = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in grads.values()))
    np.testing.assert_allclose(found["head"], wanted, rtol=1e-4)


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
