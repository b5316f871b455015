"""ZFNet: counts and shapes of figure 3, the variant of table 2, dropout, initial values."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from flax_cnns import tree as pytree
from flax_cnns.errors import UserError
from flax_cnns.models.registry import create_model, init_variables
from tests.models.published import PUBLISHED
from tests.models.shapes import capture_shapes, cost_of

# (kernel size, input, output channels) of conv1 ... conv5, then (input, output) of fc6 ...
FIGURE_3 = [(7, 3, 96), (5, 96, 256), (3, 256, 384), (3, 384, 384), (3, 384, 256)]
BIG = [(7, 3, 96), (5, 96, 256), (3, 256, 512), (3, 512, 1024), (3, 1024, 512)]
DENSE = [(4096, 4096), (4096, 1000)]

QUICK = {"xla_backend_optimization_level": 0}  # to compile


@pytest.mark.parametrize(
    ("name", "convolutions"),
    [("zfnet_fig3", FIGURE_3), ("zfnet_big", BIG)],
)
def test_count_by_hand(name, convolutions):
    dense = [(6 * 6 * convolutions[-1][2], 4096), *DENSE]
    by_hand = sum(k * k * i * o + o for k, i, o in convolutions) + sum(i * o + o for i, o in dense)
    assert PUBLISHED[name].params == by_hand


def test_each_layer_of_figure_3():
    layers = cost_of("zfnet_fig3").layers
    sides = [110, 26, 13, 13, 13]
    for layer, (k, i, o), side in zip(layers, FIGURE_3, sides):
        assert layer.output_shape == (1, side, side, o)
        assert layer.macs == side * side * k * k * i * o
        assert layer.params == k * k * i * o + o
    assert [(layer.path, layer.macs) for layer in layers[5:]] == [
        ("fc6", 6 * 6 * 256 * 4096),
        ("fc7", 4096 * 4096),
        ("head", 4096 * 1000),
    ]


def captured(name, height, width, **fields):
    """Returns the shape of the logits and {path: shape of the module's output}."""
    out, shapes = capture_shapes(name, height, width, **fields)
    return out, {path: shape[1:] for path, shape in shapes.items()}


@pytest.mark.parametrize(
    ("name", "widths"), [("zfnet_fig3", (384, 384, 256)), ("zfnet_big", (512, 1024, 512))]
)
def test_shapes_of_figure_3(name, widths):
    logits, shapes = captured(name, 224, 224)
    listed = {
        "conv1": (110, 110, 96),
        "pool1": (55, 55, 96),
        "norm1": (55, 55, 96),
        "conv2": (26, 26, 256),
        "pool2": (13, 13, 256),
        "norm2": (13, 13, 256),
        "conv3": (13, 13, widths[0]),
        "conv4": (13, 13, widths[1]),
        "conv5": (13, 13, widths[2]),
        "pool5": (6, 6, widths[2]),
        "fc6": (4096,),
        "fc7": (4096,),
        "head": (1000,),
    }
    assert {path: shapes[path] for path in listed} == listed
    assert logits.shape == (2, 1000)


def test_sizes():
    logits, shapes = captured("zfnet_fig3", 47, 47)
    assert shapes["pool5"] == (1, 1, 256)
    assert logits.shape == (2, 1000)
    logits, shapes = captured("zfnet_fig3", 225, 300)
    assert shapes["pool5"] == (6, 8, 256)
    assert logits.shape == (2, 1000)
    with pytest.raises(UserError, match="46x47 are too small: the smallest is 47x47"):
        captured("zfnet_fig3", 46, 47)
    with pytest.raises(UserError, match="expected images of 4 channels, got 3"):
        captured("zfnet_fig3", 47, 47, input_size=(47, 47, 4))


def test_dropout_normalization_and_first_values():
    """Section 3: 0.5 of fc6 and fc7 in training; N(0, 0.01^2) and biases of 0."""
    assert create_model("zfnet_big").dropout == create_model("zfnet_fig3").dropout == 0.5
    small = dict(widths=(8, 8, 8), hidden=400, num_classes=5)
    model = create_model("zfnet_fig3", **small, init="paper")
    images = 30 * np.random.RandomState(0).randn(2, 47, 47, 3).astype(np.float32)
    variables = init_variables(model, jax.random.key(0), images.shape)

    def run(key):
        capture = dict(capture_intermediates=True, mutable=["intermediates"])
        rngs = {"dropout": key}
        logits, state = model.apply(variables, images, train=True, rngs=rngs, **capture)
        return logits, state["intermediates"]

    run = jax.jit(run, compiler_options=QUICK)
    logits, state = jax.tree.map(np.asarray, run(jax.random.key(1)))
    seen = {path.removesuffix("/__call__/0"): v for path, v in pytree.flatten(state).items()}
    for i in (6, 7):
        before, after = np.maximum(seen[f"fc{i}"], 0), seen[f"dropout{i}"]
        kept = after != 0
        assert 0.4 < kept[before > 0].mean() < 0.6
        np.testing.assert_allclose(after[kept], 2 * before[kept], rtol=1e-5)
    assert np.abs(run(jax.random.key(2))[0] - logits).max() > 0.1 * np.abs(logits).max()
    evaluate = jax.jit(model.apply, compiler_options=QUICK)  # needs no rng
    np.testing.assert_array_equal(evaluate(variables, images), evaluate(variables, images))

    x = seen["pool1"]  # pooled first
    near = [np.square(x[..., max(i - 2, 0) : i + 3]).sum(-1) for i in range(96)]
    normalized = x / (2 + 1e-4 * np.stack(near, -1)) ** 0.75
    np.testing.assert_allclose(seen["norm1"], normalized, rtol=1e-4, atol=1e-6)

    for path, leaf in pytree.flatten(variables["params"]).items():
        if path.endswith("bias"):
            assert not np.any(leaf), path
        else:
            assert np.std(leaf) == pytest.approx(0.01, rel=0.1), path
            assert np.abs(leaf).max() > 0.025, path
