"""Network in Network: counts by hand, shapes and costs of the released files, initial values."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from flax_cnns import tree as pytree
from flax_cnns.models import nin
from flax_cnns.models.registry import create_model, init_variables
from tests.models.published import PUBLISHED
from tests.models.shapes import capture_shapes, cost_of

# The released files: kernel size, input and output channels of every convolution, all with biases,
# and the height of its output for the released input size.
CIFAR = [
    *((5, 3, 192, 32), (1, 192, 160, 32), (1, 160, 96, 32)),
    *((5, 96, 192, 16), (1, 192, 192, 16), (1, 192, 192, 16)),
    *((3, 192, 192, 8), (1, 192, 192, 8)),
]
TABLES = {
    "nin_cifar10": [*CIFAR, (1, 192, 10, 8)],
    "nin_cifar100": [*CIFAR, (1, 192, 100, 8)],
    "nin_imagenet": [
        *((11, 3, 96, 54), (1, 96, 96, 54), (1, 96, 96, 54)),
        *((5, 96, 256, 27), (1, 256, 256, 27), (1, 256, 256, 27)),
        *((3, 256, 384, 13), (1, 384, 384, 13), (1, 384, 384, 13)),
        *((3, 384, 1024, 6), (1, 1024, 1024, 6), (1, 1024, 1000, 6)),
    ],
}
TINY = dict(
    rows=(
        nin.Row(3, (8, 6), padding=1),
        nin.Row(3, (8, 8), padding=1, pool=None, drop=False),
    ),
    num_classes=3,
    input_size=(8, 8, 3),
)


@pytest.mark.parametrize("name", TABLES)
def test_count_and_cost_of_every_layer_by_hand(name):
    expected = [
        ((1, side, side, out), window**2 * width * out + out, side**2 * window**2 * width * out)
        for window, width, out, side in TABLES[name]
    ]
    whole = cost_of(name)
    assert [(row.output_shape, row.params, row.macs) for row in whole.layers] == expected
    assert PUBLISHED[name].params == sum(params for _, params, _ in expected)
    if name == "nin_cifar10":
        assert round(whole.macs / 1e9, 4) == 0.2225


@pytest.mark.parametrize(
    ("name", "size", "stages"),
    [
        ("nin_cifar10", 32, [(32, 96), (16, 192), (8, 192)]),
        ("nin_cifar10", 29, [(29, 96), (14, 192), (7, 192)]),
        ("nin_imagenet", 224, [(54, 96), (27, 256), (13, 384), (6, 1024)]),
    ],
)
def test_output_shape_of_each_stage(name, size, stages):
    logits, shapes = capture_shapes(name, size)
    for i, (side, width) in enumerate(stages, 1):
        assert shapes[f"mlpconv{i}"] == (2, side, side, width)
    assert logits.shape == (2, create_model(name).num_classes)


def test_second_pooling_of_cifar_averages():
    pools = [row.pool for row in create_model("nin_cifar10").rows]
    assert [pool and pool.__name__ for pool in pools] == ["max_pool", "avg_pool", None]
    pools = [row.pool for row in create_model("nin_imagenet").rows]
    assert [pool and pool.__name__ for pool in pools] == ["max_pool"] * 3 + [None]


@pytest.mark.parametrize(
    ("name", "where"), [("nin_cifar10", {"dropout1", "dropout2"}), ("nin_imagenet", {"dropout3"})]
)
def test_dropout_is_where_the_files_have_it(name, where):
    _, shapes = capture_shapes(name, 64)
    assert {path for path in shapes if path.startswith("dropout")} == where
    assert create_model(name).dropout == 0.5


def test_training_is_random_and_evaluation_is_not():
    model = create_model("nin_cifar10", **TINY)
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    variables = init_variables(model, jax.random.key(0))

    def logits(seed, train):
        rngs = {"dropout": jax.random.key(seed)}
        return np.asarray(model.apply(variables, images, train=train, rngs=rngs))

    np.testing.assert_array_equal(logits(0, False), logits(1, False))
    assert (logits(0, True) != logits(1, True)).any()
    assert (logits(0, False) >= 0).all()  # ReLU before the mean


def test_papers_first_values():
    fields = dict(num_classes=200, input_size=(64, 64, 3), init="paper")
    params = init_variables(create_model("nin_imagenet", **fields), jax.random.key(0))["params"]
    for path, leaf in pytree.flatten(params).items():
        if path.endswith("bias"):
            assert not leaf.any()
            continue
        narrow = path in ("mlpconv1/conv/kernel", "mlpconv3/conv/kernel", "head/kernel")
        std = 0.01 if narrow else 0.05
        assert np.std(leaf) == pytest.approx(std, rel=0.05), path
        assert np.abs(leaf).max() > 3 * std, path  # not truncated
