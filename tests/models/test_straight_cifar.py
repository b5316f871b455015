"""The small-image families beside second forward passes in NumPy, written from the papers alone."""

import zlib

import jax
import numpy as np
import pytest

import flax_cnns
from flax_cnns import create_model, pytree
from flax_cnns.layers import SAFPool
from tests.models import foreign
from tests.models.straight import all_cnn, dsn, highway, nin, simpnet
from tests.parity import LIMIT, difference, disturb, spread

# (ours, NumPy's, size of the images). The sizes keep maps above 1x1, and wherever a pooling of 3x3
# with stride 2 rounds up, rounding down would give another map.
CASES = [
    ("nin_cifar10", nin.nin_cifar10, 20),
    ("nin_imagenet", nin.nin_imagenet, 71),
    ("all_cnn_a", all_cnn.all_cnn_a, 20),
    ("all_cnn_b", all_cnn.all_cnn_b, 20),
    ("all_cnn_c", all_cnn.all_cnn_c, 20),
    ("dsn", dsn.dsn, 20),
    ("highway_19", highway.highway_19, 12),
    ("highway_32", highway.highway_32, 12),
    ("simpnet_5m", simpnet.simpnet_5m, 12),
    ("simpnet_slim_300k", simpnet.simpnet_slim_300k, 12),
]


def redrawn(name, size, **fields):
    """(model, {path: array}), nothing zero and nothing constant.

    Biases of transform gates lie about -2, where the authors start them: about 0, thirty layers
    pass so little on that the logits hardly vary over the images.
    """
    model = create_model(name, input_size=(size, size, 3), **fields)
    shapes = jax.eval_shape(lambda key: flax_cnns.init_variables(model, key), jax.random.key(0))
    leaves = pytree.flatten(shapes).items()
    tensors = {path: foreign.redraw(path, leaf.shape, "keras") for path, leaf in leaves}
    for path in tensors:
        if path.endswith("gate/bias"):
            tensors[path] -= 2
    return model, tensors


def jit(function):
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def double(tensors):
    return {path: value.astype(np.float64) for path, value in tensors.items()}


def agree(ours, theirs):
    """Whether float32 logits [N K] differ by at most LIMIT of their spread over the images."""
    assert ours.dtype == np.float32
    assert ours.shape == theirs.shape
    assert spread(theirs) > 1e-3 * np.sqrt(np.mean(theirs**2))
    return difference(np.asarray(ours), theirs) <= LIMIT


@pytest.mark.parametrize(("name", "straight", "size"), CASES, ids=[case[0] for case in CASES])
def test_logits(name, straight, size):
    model, tensors = redrawn(name, size)
    x = foreign.images(4, size)
    apply = jit(model.apply)
    theirs = straight(double(tensors), x.astype(np.float64))
    assert agree(apply(pytree.unflatten(tensors), x), theirs)
    used = [path for path in tensors if "/aux" not in path]
    victim = used[zlib.crc32(name.encode()) % len(used)]
    assert not agree(apply(pytree.unflatten(disturb(tensors, victim, "keras")), x), theirs)


def test_dsn_companions():
    model, tensors = redrawn("dsn", 12, dropout=0.0)
    x = foreign.images(4, 12)
    apply = jit(lambda tree, x: model.apply(tree, x, train=True, mutable=["aux_logits"]))
    theirs = dsn.dsn_companions(double(tensors), x.astype(np.float64))

    def ours(tensors):
        _, sown = apply(pytree.unflatten(tensors), x)
        return {head: given["logits"][0] for head, given in sown["aux_logits"].items()}

    right = ours(tensors)
    assert list(right) == list(theirs) == ["aux1", "aux2", "aux3"]
    assert all(agree(right[head], theirs[head]) for head in theirs)
    wrong = ours(disturb(tensors, "params/conv2/bias", "keras"))
    assert [agree(wrong[head], theirs[head]) for head in theirs] == [True, False, False]


def test_simpnet_in_training():
    """SAF pooling stands where the released files have pooling and then dropout, with its rate."""
    rates = (0.2, 0.3, 0.4)
    model, tensors = redrawn("simpnet_slim_300k", 12, saf="strongest", saf_rate=rates)
    x = foreign.images(4, 12)
    apply = jit(lambda tree, x: model.apply(tree, x, train=True, mutable=["batch_stats"])[0])
    ours = apply(pytree.unflatten(tensors), x)
    tensors, x = double(tensors), x.astype(np.float64)
    assert agree(ours, simpnet.simpnet_training(tensors, x, rates))
    assert not agree(ours, simpnet.simpnet_training(tensors, x, (0.2, 0.4, 0.3)))


@pytest.mark.parametrize("window", [2, 3, None])
def test_saf_pooling_of_the_strongest(window):
    x = foreign.images(4, 8, 5)  # rounds down where the window is 3
    pool = SAFPool(0.3, window=window, choose="strongest")
    for train, rate in ((True, 0.3), (False, 0)):
        expected = simpnet.saf_strongest(x, window, rate)
        np.testing.assert_array_equal(pool.apply({}, x, train=train), expected)


@pytest.mark.parametrize("window", [2, None])
def test_saf_pooling_as_released(window):
    """Max pooling, then Caffe's dropout: off at random, the others over 1 - rate."""
    x = foreign.images(4, 16, 64)
    pooled = simpnet.saf_strongest(x, window, 0)
    pool = SAFPool(0.3, window=window, choose="random")
    ours = np.asarray(pool.apply({}, x, train=True, rngs={"dropout": jax.random.key(0)}))
    on = ours != 0
    np.testing.assert_allclose(ours[on], pooled[on] / 0.7, rtol=1e-6)
    assert abs(np.mean(~on) - 0.3) < 4 * np.sqrt(0.3 * 0.7 / on.size)
    other = np.asarray(pool.apply({}, x, train=True, rngs={"dropout": jax.random.key(1)}))
    assert np.any((other != 0) != on)
    strong = pooled > np.median(pooled)  # off by chance, not by strength
    assert abs(np.mean(~on[strong]) - np.mean(~on[~strong])) < 8 * np.sqrt(0.3 * 0.7 / on.size)
    np.testing.assert_array_equal(pool.apply({}, x, train=False), pooled)
