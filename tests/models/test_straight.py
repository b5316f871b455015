"""Networks compared with second forward passes in NumPy.

These are written only from the papers and, where a paper leaves details open, from what its
authors, Caffe and torchvision released.
"""

import sys
from functools import partial

import jax
import numpy as np
import pytest

from flax_cnns import tree as pytree
from flax_cnns.layers import SAFPool
from tests.models import foreign
from tests.models.straight import dsn, nasnet, preact_resnet, simpnet
from tests.models.straight.cases import CASES, DEPTHS, SHALLOW, Case, in_numpy, redrawn
from tests.models.straight.numpy_layers import local_response_norm
from tests.parity import LIMIT, compare_numpy, difference, disturb, spread


def by_name(cases):
    marks = [[pytest.mark.slow] if case.slow else [] for case in cases]
    return [pytest.param(case, id=case.name, marks=mark) for case, mark in zip(cases, marks)]


@pytest.mark.parametrize("case", by_name(CASES))
def test_logits(case):
    result = compare_numpy(case)
    assert result.passed, result


NORMALIZED = [case for case in CASES if case.strength > 1]


@pytest.mark.parametrize("case", by_name(NORMALIZED))
def test_response_normalization_is_seen(case, monkeypatch):
    """The comparison would notice Caffe's alpha, which is the paper's divided by the 5 maps."""
    _, tensors, images = redrawn(case)
    right = in_numpy(case.straight, tensors, images)
    monkeypatch.setattr(
        sys.modules[case.straight.__module__],
        "local_response_norm",
        lambda x, alpha, **constants: local_response_norm(x, alpha=alpha / 5, **constants),
    )
    assert difference(in_numpy(case.straight, tensors, images), right) > 1000 * LIMIT


@pytest.mark.parametrize("order", preact_resnet.ORDERS, ids=lambda order: order.__name__)
def test_orders_of_figure_4(order):
    straight = partial(preact_resnet.cifar_preact, depths=DEPTHS, order=order)
    fields = {"order": order.__name__} | SHALLOW
    result = compare_numpy(Case("cifar_preact110", straight, 13, fields))
    assert result.passed, result


def jit(function):
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def agree(ours, theirs):
    """Returns whether logits [N K] differ by at most LIMIT times their spread over the images."""
    assert ours.shape == theirs.shape
    assert spread(theirs) > 1e-3 * np.sqrt(np.mean(theirs**2))
    return difference(np.asarray(ours), theirs) <= LIMIT


def test_dsn_companions():
    model, tensors, images = redrawn(Case("dsn", dsn.dsn, 12, {"dropout": 0.0}))
    apply = jit(lambda tree, x: model.apply(tree, x, train=True, mutable=["aux_logits"]))
    theirs = in_numpy(dsn.dsn_companions, tensors, images)

    def ours(tensors):
        _, sown = apply(pytree.unflatten(tensors), images)
        return {head: given["logits"][0] for head, given in sown["aux_logits"].items()}

    right = ours(tensors)
    assert list(right) == list(theirs) == ["aux1", "aux2", "aux3"]
    assert all(agree(right[head], theirs[head]) for head in theirs)
    wrong = ours(disturb(tensors, "params/conv2/bias", "keras"))
    assert [agree(wrong[head], theirs[head]) for head in theirs] == [True, False, False]


@pytest.mark.slow
def test_nasnet_auxiliary_head():
    depths = (1, 1, 1)
    fields = {"depths": depths, "width": 4, "aux": 2, "drop_path": 0.0}
    model, tensors, images = redrawn(Case("nasnet_a_6_768", nasnet.cifar_auxiliary, 20, fields))
    straight = partial(nasnet.cifar_auxiliary, depths=depths)
    mutable = ["aux_logits", "batch_stats"]
    apply = jit(lambda tree, x: model.apply(tree, x, train=True, mutable=mutable)[1]["aux_logits"])
    ours = apply(pytree.unflatten(tensors), images)["aux1"]["logits"][0]
    assert agree(ours, in_numpy(straight, tensors, images))
    wrong = disturb(tensors, "params/stage2/normal1/squeeze/conv/kernel", "keras")
    assert not agree(ours, in_numpy(straight, wrong, images))


def test_simpnet_in_training():
    """SAF pooling replaces the released files' pooling and dropout, with the dropout's rate."""
    rates = (0.2, 0.3, 0.4)
    fields = {"saf": "strongest", "saf_rate": rates}
    model, tensors, images = redrawn(Case("simpnet_slim_300k", simpnet.simpnet, 12, fields))
    apply = jit(lambda tree, x: model.apply(tree, x, train=True, mutable=["batch_stats"])[0])
    ours = apply(pytree.unflatten(tensors), images)
    assert agree(ours, in_numpy(simpnet.simpnet_training, tensors, images, rates=rates))
    swapped = in_numpy(simpnet.simpnet_training, tensors, images, rates=(0.2, 0.4, 0.3))
    assert not agree(ours, swapped)


@pytest.mark.parametrize("window", [2, 3, None])
def test_saf_pooling_of_the_strongest(window):
    x = foreign.images(4, 8, 5)  # rounds down where the window is 3
    pool = SAFPool(0.3, window=window, choose="strongest")
    for train, rate in ((True, 0.3), (False, 0)):
        expected = simpnet.saf_strongest(x, window, rate)
        np.testing.assert_array_equal(pool.apply({}, x, train=train), expected)


@pytest.mark.parametrize("window", [2, None])
def test_saf_pooling_as_released(window):
    """Max pooling, then Caffe's dropout: random zeros, all other values divided by 1 - rate."""
    x = foreign.images(4, 16, 64)
    pooled = simpnet.saf_strongest(x, window, 0)
    pool = SAFPool(0.3, window=window, choose="random")
    ours = np.asarray(pool.apply({}, x, train=True, rngs={"dropout": jax.random.key(0)}))
    on = ours != 0
    np.testing.assert_allclose(ours[on], pooled[on] / 0.7, rtol=1e-6)
    assert abs(np.mean(~on) - 0.3) < 4 * np.sqrt(0.3 * 0.7 / on.size)
    other = np.asarray(pool.apply({}, x, train=True, rngs={"dropout": jax.random.key(1)}))
    assert np.any((other != 0) != on)
    strong = pooled > np.median(pooled)  # dropped by chance, not by strength
    assert abs(np.mean(~on[strong]) - np.mean(~on[~strong])) < 8 * np.sqrt(0.3 * 0.7 / on.size)
    np.testing.assert_array_equal(pool.apply({}, x, train=False), pooled)
