"""SqueezeNet: counts and shapes of the paper's table, the fire module, bypass, dropout."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import numpy as np
import pytest

from flax_cnns import layers
from flax_cnns import tree as pytree
from flax_cnns.models import squeezenet
from flax_cnns.models.registry import create_model, init_variables
from tests.models.published import PUBLISHED
from tests.models.shapes import capture_shapes, cost_of, variable_shapes

# Table 1, column "# parameter before pruning", with biases, and the factors of each sum:
# squeeze in * s + s, expand1x1 s * e + e, expand3x3 9 * s * e + e.
TABLE_1 = {
    "conv1": (14_208, 7 * 7 * 3 * 96 + 96),
    "fire2": (11_920, 96 * 16 + 16 + 16 * 64 + 64 + 9 * 16 * 64 + 64),
    "fire3": (12_432, 128 * 16 + 16 + 16 * 64 + 64 + 9 * 16 * 64 + 64),
    "fire4": (45_344, 128 * 32 + 32 + 32 * 128 + 128 + 9 * 32 * 128 + 128),
    "fire5": (49_440, 256 * 32 + 32 + 32 * 128 + 128 + 9 * 32 * 128 + 128),
    "fire6": (104_880, 256 * 48 + 48 + 48 * 192 + 192 + 9 * 48 * 192 + 192),
    "fire7": (111_024, 384 * 48 + 48 + 48 * 192 + 192 + 9 * 48 * 192 + 192),
    "fire8": (188_992, 384 * 64 + 64 + 64 * 256 + 256 + 9 * 64 * 256 + 256),
    "fire9": (197_184, 512 * 64 + 64 + 64 * 256 + 256 + 9 * 64 * 256 + 256),
    "head": (513_000, 512 * 1000 + 1000),
}
# In 1.1 conv1 has 64 channels and 3x3, and fire2 takes 64 channels.
SMALLER = (14_208 - (3 * 3 * 3 * 64 + 64)) + (96 - 64) * 16
TEN_CLASSES = 513_000 - (512 * 10 + 10)


def test_counts_by_hand():
    counts = {name: PUBLISHED[name].params for name in squeezenet.VARIANTS}
    assert all(published == by_hand for published, by_hand in TABLE_1.values())
    assert sum(published for published, _ in TABLE_1.values()) == counts["squeezenet1_0"]
    assert counts["squeezenet1_0_bypass"] == counts["squeezenet1_0"]  # section 6: no parameters
    assert counts["squeezenet1_1"] == counts["squeezenet1_0"] - SMALLER
    assert counts["squeezenet1_1_c10"] == counts["squeezenet1_1"] - TEN_CLASSES


def test_the_tables_parameters_of_each_row():
    rows = {name: 0 for name in TABLE_1}
    for layer in cost_of("squeezenet1_0").layers:
        rows[layer.path.partition("/")[0]] += layer.params
    assert rows == {name: published for name, (published, _) in TABLE_1.items()}


@pytest.mark.parametrize(
    ("name", "size", "pools", "sides"),  # of conv1, fire2 to fire9
    [
        ("squeezenet1_0_bypass", 227, (4, 8), (111, 55, 55, 55, 27, 27, 27, 27, 13)),  # table 1
        ("squeezenet1_0", 224, (4, 8), (109, 54, 54, 54, 27, 27, 27, 27, 13)),
        ("squeezenet1_1", 227, (3, 5), (113, 56, 56, 28, 28, 14, 14, 14, 14)),
        ("squeezenet1_1_c10", 32, (3, 5), (15, 7, 7, 3, 3, 1, 1, 1, 1)),
        # Coderx7/SimpNet, SqueezeNet_v1.1_tests
        ("cifar_squeezenet1_1", 32, (3, 5), (30, 28, 28, 14, 14, 7, 7, 7, 7)),
    ],
)
def test_output_shape_of_each_module(name, size, pools, sides):
    logits, shapes = capture_shapes(name, size, size)
    classes = create_model(name).num_classes
    widths = (128, 128, 256, 256, 384, 384, 512, 512)
    assert shapes["conv1"][:3] == (2, sides[0], sides[0])
    for i, (side, width) in enumerate(zip(sides[1:], widths), 2):
        assert shapes[f"fire{i}"] == (2, side, side, width)
        assert (f"pool{i}" in shapes) == (i in pools)
    assert shapes["pool1"][1:3] == sides[1:2] * 2
    for i in pools:
        assert shapes[f"pool{i}"][1:3] == sides[i : i + 1] * 2
    assert shapes["head"] == (2, sides[-1], sides[-1], classes)
    assert logits.shape == (2, classes)


def fire(**fields):
    """Returns (module, variables, input, output); no channel of the output is 0 everywhere."""
    conv = partial(layers.Conv, bias_init=nn.initializers.normal())
    module = squeezenet.Fire(4, 3, partial(layers.ConvUnit, conv=conv), **fields)
    x = np.random.RandomState(0).randn(2, 5, 4, 6).astype(np.float32)
    y, variables = module.init_with_output(jax.random.key(0), x)
    return module, variables, x, np.asarray(y)


def test_a_fire_module_is_its_definition():
    _, variables, x, y = fire()
    p = {name: jax.tree.map(np.asarray, unit["conv"]) for name, unit in variables["params"].items()}
    s = np.maximum(x @ p["squeeze"]["kernel"][0, 0] + p["squeeze"]["bias"], 0)
    small = s @ p["expand1x1"]["kernel"][0, 0] + p["expand1x1"]["bias"]
    around = np.pad(s, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(around, (3, 3), axis=(1, 2))
    large = np.einsum("nhwcij,ijco->nhwo", windows, p["expand3x3"]["kernel"])
    expected = np.concatenate([small, large + p["expand3x3"]["bias"]], axis=-1)
    np.testing.assert_allclose(y, np.maximum(expected, 0), atol=1e-5)


def test_the_bypass_adds_the_input():
    _, _, x, plain = fire()
    np.testing.assert_allclose(fire(bypass=True)[3], x + plain, atol=1e-6)
    assert create_model("squeezenet1_0_bypass").bypass == (3, 5, 7, 9)  # figure 2
    assert create_model("squeezenet1_0").bypass == ()


@pytest.fixture(scope="module")
def variables():
    model = create_model("squeezenet1_0_bypass", num_classes=3)
    return init_variables(model, jax.random.key(0), (1, 32, 32, 3))


# Compiling takes nearly all of the time here.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
IMAGES = np.random.RandomState(0).randn(2, 32, 32, 3).astype(np.float32)


def test_fires_3_5_7_9_are_bypassed_and_half_of_fire9_is_dropped_in_training_only(variables):
    model = create_model("squeezenet1_0_bypass", num_classes=3)
    assert model.dropout == create_model("squeezenet1_1").dropout == 0.5

    @quick_jit
    def run(variables, key):
        rngs = {"dropout": key}
        logits, state = model.apply(
            variables, IMAGES, train=True, rngs=rngs, capture_intermediates=True, mutable=True
        )
        return logits, state["intermediates"], model.apply(variables, IMAGES)

    logits, seen, evaluated = run(variables, jax.random.key(0))
    assert np.min(seen["conv1"]["__call__"][0]) == 0  # ReLU precedes its output
    outputs = {i: np.asarray(seen[f"fire{i}"]["__call__"][0]) for i in range(2, 10)}
    for i in (3, 5, 7, 9):
        pair = [seen[f"fire{i}"][f"expand{k}x{k}"]["__call__"][0] for k in (1, 3)]
        before = outputs[i - 1]
        if i in (5, 9):  # a pooling is in between
            before = layers.max_pool(before, 3, 2, ceil=True)
        added = outputs[i] - np.concatenate(pair, axis=-1)
        np.testing.assert_allclose(added, before, atol=1e-4)
    before, after = outputs[9], np.asarray(seen["dropout9"]["__call__"][0])
    assert 0.4 < (after[before > 0] != 0).mean() < 0.6
    np.testing.assert_allclose(after[after != 0], 2 * before[after != 0], rtol=1e-6)
    assert np.abs(logits - run(variables, jax.random.key(1))[0]).max() > 1e-4
    # Evaluation has no dropout: logits are means over all positions, after ReLU.
    head = jax.tree.map(np.asarray, variables["params"]["head"])
    maps = np.maximum(before @ head["kernel"][0, 0] + head["bias"], 0)
    np.testing.assert_allclose(evaluated, maps.mean((1, 2)), atol=1e-4)


@pytest.mark.slow
def test_the_papers_initialization():
    fields = dict(num_classes=50, init="paper")
    model = create_model("squeezenet1_1", **fields)
    params = init_variables(model, jax.random.key(0), (1, 32, 32, 3))["params"]
    for path, leaf in pytree.flatten(params).items():
        if path.endswith("bias"):
            assert not np.any(leaf), path
        elif path == "head/kernel":
            assert np.std(leaf) == pytest.approx(0.01, rel=0.05)
            assert np.abs(leaf).max() > 0.03
        else:  # Caffe's "xavier": uniform up to sqrt(3 / fan_in)
            bound = np.sqrt(3 / np.prod(leaf.shape[:-1]))
            assert 0.98 * bound < np.abs(leaf).max() <= bound, path
            assert np.std(leaf) == pytest.approx(bound / np.sqrt(3), rel=0.06), path


def test_batch_norm_where_it_is_asked_for():
    shapes = variable_shapes("squeezenet1_1_c10", norm="batch")
    # Scale and shift of conv1's 64 channels, and of 16 + 128, 32 + 256, 48 + 384, 64 + 512 twice.
    extra = 2 * (64 + 2 * (144 + 288 + 432 + 576))
    assert (
        sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == 727_626 + extra == 733_514
    )
    assert shapes["batch_stats"]["fire2"]["expand3x3"]["norm"]["mean"].shape == (64,)
