"""Highway networks: counts by hand, the gate by its equation, shapes, initial values."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.scipy.special import expit

from flax_cnns import tree as pytree
from flax_cnns.models import highway
from flax_cnns.models.registry import create_model, init_variables
from tests.models.published import PUBLISHED
from tests.models.shapes import capture_shapes, cost_of

# PRINTED: layers and parameters in millions, from the paper's table 2.
# STAGES: width, kernel size of each layer, and side of the maps of a 32x32 image. The kernel sizes
# of highway_19 are the released file's, those of highway_32 are ours.
PRINTED = {"highway_19": (19, 2.3), "highway_32": (32, 1.25)}
STAGES = {
    "highway_19": [(32, [3] * 5, 32), (80, [3] * 6, 16), (128, [3] * 6, 8)],
    "highway_32": [(32, [3, 1] * 5, 32), (64, [3, 1] * 5, 16), (96, [3, 1] * 5, 8)],
}
TINY = dict(
    widths=(4, 6), windows=((3,), (1,)), last=5, num_classes=3, input_size=(6, 6, 3), dropout=0.5
)


@pytest.mark.parametrize("name", highway.VARIANTS)
def test_count_and_cost_by_hand(name):
    params = macs = 0
    layers, before = 2, 3  # the 1x1 convolution and the dense layer are the last two
    for width, windows, side in STAGES[name]:
        first = windows[0] ** 2 * before * width
        params += first + width
        macs += first * side**2
        for window in windows[1:]:
            weights = window**2 * width * width
            params += 2 * (weights + width)  # the block's convolution and its gate's
            macs += 2 * weights * side**2
        layers, before = layers + len(windows), width
    params += before * 100 + 100 + 100 * 10 + 10
    macs += before * 100 * 8 * 8 + 100 * 10
    whole = cost_of(name)
    assert (whole.params, whole.macs) == (params, macs)
    assert PUBLISHED[name].params == params
    published_layers, millions = PRINTED[name]
    assert layers == published_layers
    assert params / 1e6 == pytest.approx(millions, rel=0.02)


def test_count_and_shape_of_every_layer_of_the_release():
    rows = {row.path: row for row in cost_of("highway_19").layers}
    for stage, (width, depth, side) in enumerate(((32, 4, 32), (80, 5, 16), (128, 5, 8)), 1):
        for i in range(1, depth + 1):
            pair = [rows.pop(f"stage{stage}/highway{i}/{part}") for part in ("conv", "gate")]
            assert sum(row.params for row in pair) == {32: 18_496, 80: 115_360, 128: 295_168}[width]
            assert {row.output_shape for row in pair} == {(1, side, side, width)}
    assert {path: row.params for path, row in rows.items()} == {
        "stage1/conv": 896,
        "stage2/conv": 23_120,
        "stage3/conv": 92_288,
        "last/conv": 12_900,
        "head": 1_010,
    }


@pytest.mark.parametrize(
    ("name", "widths"), [("highway_19", (32, 80, 128)), ("highway_32", (32, 64, 96))]
)
@pytest.mark.parametrize(("size", "sides"), [(32, (32, 16, 8)), (27, (27, 14, 7)), (1, (1, 1, 1))])
def test_output_shape_of_each_stage(name, widths, size, sides):
    logits, shapes = capture_shapes(name, size)
    for i, (side, width) in enumerate(zip(sides, widths), 1):
        assert shapes[f"stage{i}"] == (2, side, side, width)
    assert shapes["pool1"] == (2, sides[1], sides[1], widths[0])
    assert shapes["pool2"] == (2, sides[2], sides[2], widths[1])
    assert shapes["last"] == (2, sides[-1], sides[-1], 100)
    assert logits.shape == (2, 10)


def variables_and_layer(**fields):
    model = create_model("highway_19", **TINY, **fields)
    variables = init_variables(model, jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (2, 6, 6, 3))
    _, state = model.apply(variables, images, capture_intermediates=True, mutable="intermediates")
    return variables, state["intermediates"]


def test_a_highway_layer_is_its_equation():
    variables, seen = variables_and_layer()
    seen = seen["stage2"]
    layer, params = seen["highway1"], variables["params"]["stage2"]["highway1"]
    x = np.maximum(seen["conv"]["__call__"][0], 0)
    (y,) = layer["__call__"]
    h, t = (  # 1x1 convolutions
        np.einsum("nhwc,co->nhwo", x, params[part]["kernel"][0, 0]) + params[part]["bias"]
        for part in ("conv", "gate")
    )
    t = expit(t)
    np.testing.assert_allclose(y, np.maximum(h, 0) * t + x * (1 - t), atol=1e-5)


def test_closed_gates_carry_and_open_gates_transform():
    seen = variables_and_layer(gate_bias=-50.0)[1]["stage2"]
    x = np.maximum(seen["conv"]["__call__"][0], 0)
    np.testing.assert_allclose(seen["highway1"]["__call__"][0], x, atol=1e-6)
    seen = variables_and_layer(gate_bias=50.0)[1]["stage2"]
    h = np.maximum(seen["highway1"]["conv"]["__call__"][0], 0)
    np.testing.assert_allclose(seen["highway1"]["__call__"][0], h, atol=1e-6)


def test_the_output_named_last_is_after_relu():
    _, seen = variables_and_layer()
    (sums,), (maps,) = seen["last"]["conv"]["__call__"], seen["last"]["__call__"]
    assert np.min(sums) < 0
    np.testing.assert_array_equal(maps, np.maximum(sums, 0))


def test_dropout_is_where_the_release_has_it():
    _, shapes = capture_shapes("highway_19", 32)
    assert {path: shape for path, shape in shapes.items() if path.startswith("dropout")} == {
        "dropout0": (2, 32, 32, 3),
        "dropout1": (2, 16, 16, 32),
        "dropout2": (2, 8, 8, 80),
        "dropout_head": (2, 100),
    }
    assert create_model("highway_19").dropout == 0.2


def test_training_is_random_and_evaluation_is_not():
    model = create_model("highway_19", **TINY)
    images = jax.random.normal(jax.random.key(1), (2, 6, 6, 3))
    variables = init_variables(model, jax.random.key(0))

    def logits(seed, train):
        rngs = {"dropout": jax.random.key(seed)}
        return np.asarray(model.apply(variables, images, train=train, rngs=rngs))

    np.testing.assert_array_equal(logits(0, False), logits(1, False))
    assert (logits(0, True) != logits(1, True)).any()


def test_papers_initial_values():
    fields = dict(widths=(24, 48), windows=((3,), (1,)), last=100, num_classes=50)
    params = init_variables(create_model("highway_19", **fields, init="paper"), jax.random.key(0))
    for path, leaf in pytree.flatten(params["params"]).items():
        leaf = np.asarray(leaf)
        if path.endswith("bias"):
            assert (leaf == (-2 if "gate" in path else 0)).all(), path
            continue
        std = 0.05 if path == "head/kernel" else np.sqrt(2 / np.prod(leaf.shape[:-1]))
        assert np.std(leaf) == pytest.approx(std, rel=0.1), path
        inside = np.mean(np.abs(leaf) < std)
        assert inside == pytest.approx(0.683, abs=0.06), path  # normal; uniform has 0.577
