"""AlexNet: counts from the paper's table, published shapes, LRN, dropout, initial values.

"The deck" is the lecture deck "Convolutional Neural Networks".
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

from flax_cnns import tree as pytree
from flax_cnns.errors import UserError
from flax_cnns.models import alexnet
from flax_cnns.models.registry import create_model, init_variables
from tests.models.published import PUBLISHED
from tests.models.shapes import capture_shapes, cost_of

# Section 3.5: (kernel size, input maps of a unit, output maps) of conv1 to conv5; (in, out).
TWO_GPUS = [(11, 3, 96), (5, 48, 256), (3, 256, 384), (3, 192, 384), (3, 192, 256)]
ONE_TOWER = [(11, 3, 96), (5, 96, 256), (3, 256, 384), (3, 384, 384), (3, 384, 256)]
TORCHVISION = [(11, 3, 64), (5, 64, 192), (3, 192, 384), (3, 384, 256), (3, 256, 256)]
DENSE = [(6 * 6 * 256, 4096), (4096, 4096), (4096, 1000)]
TABLES = {
    "alexnet_2gpu": TWO_GPUS,
    "alexnet_single_tower": ONE_TOWER,
    "alexnet": TORCHVISION,
}
NORMALIZED = ["alexnet_2gpu", "alexnet_single_tower"]


@pytest.mark.parametrize("name", alexnet.VARIANTS)
def test_count_by_hand(name):
    convolutions = TABLES[name]
    by_hand = sum(k * k * i * o + o for k, i, o in convolutions) + sum(i * o + o for i, o in DENSE)
    assert PUBLISHED[name].params == by_hand
    if name == "alexnet_2gpu":  # the abstract's 60 million
        assert by_hand == pytest.approx(60e6, rel=0.02)


def test_each_layer_of_two_gpus():
    rows = {layer.path: layer for layer in cost_of("alexnet_2gpu").layers}
    assert {path: (row.params, row.macs) for path, row in rows.items()} == {
        "conv1/conv": (34_944, 55 * 55 * 96 * 11 * 11 * 3),  # 35 K in the deck
        "conv2/conv": (307_456, 27 * 27 * 256 * 5 * 5 * 48),
        "conv3/conv": (885_120, 13 * 13 * 384 * 3 * 3 * 256),
        "conv4/conv": (663_936, 13 * 13 * 384 * 3 * 3 * 192),
        "conv5/conv": (442_624, 13 * 13 * 256 * 3 * 3 * 192),
        "fc6": (37_752_832, 9216 * 4096),
        "fc7": (16_781_312, 4096 * 4096),
        "head": (4_097_000, 4096 * 1000),
    }


def captured(name, height, width, **fields):
    """Returns the logits' shape, and the shape of each module's output by path."""
    out, shapes = capture_shapes(name, height, width, **fields)
    return out, {path: shape[1:] for path, shape in shapes.items()}


def test_the_decks_list_of_shapes():
    logits, shapes = captured("alexnet_single_tower", 227, 227)
    listed = {
        "conv1": (55, 55, 96),
        "pool1": (27, 27, 96),
        "norm1": (27, 27, 96),
        "conv2": (27, 27, 256),
        "pool2": (13, 13, 256),
        "norm2": (13, 13, 256),
        "conv3": (13, 13, 384),
        "conv4": (13, 13, 384),
        "conv5": (13, 13, 256),
        "pool5": (6, 6, 256),
        "fc6": (4096,),
        "fc7": (4096,),
        "head": (1000,),
    }
    assert {name: shapes[name] for name in listed} == listed
    assert logits.shape == (2, 1000)


def test_the_papers_shapes():
    """Figure 2 normalizes before pooling; torchvision's network only pools."""
    _, shapes = captured("alexnet_2gpu", 227, 227)
    assert shapes["norm1"] == shapes["conv1"] == (55, 55, 96)
    assert shapes["norm2"] == shapes["conv2"] == (27, 27, 256)
    assert shapes["conv3"] == shapes["conv4"] == (13, 13, 384)
    assert shapes["conv5"] == (13, 13, 256)
    _, shapes = captured("alexnet", 224, 224)
    assert shapes["conv1"] == (55, 55, 64)
    assert shapes["conv2"] == (27, 27, 192)
    assert shapes["conv5"] == (13, 13, 256)
    assert shapes["pool5"] == (6, 6, 256)
    assert "norm1" not in shapes


@pytest.mark.parametrize(
    ("name", "smallest"),
    [("alexnet_2gpu", 67), ("alexnet_single_tower", 67), ("alexnet", 63)],
)
def test_sizes(name, smallest):
    logits, shapes = captured(name, smallest, smallest)
    assert shapes["pool5"] == (1, 1, 256)
    assert logits.shape == (2, 1000)
    logits, shapes = captured(name, 227, 350)
    assert shapes["pool5"] == (6, 9, 256)
    assert logits.shape == (2, 1000)
    too_small = f"{smallest - 1}x{smallest} are too small: the smallest is {smallest}x{smallest}"
    with pytest.raises(UserError, match=too_small):
        captured(name, smallest - 1, smallest)
    with pytest.raises(UserError, match="expected images of 1 channels, got 3"):
        captured(name, smallest, smallest, input_size=(67, 67, 1))


IMAGES = 30 * np.random.RandomState(0).randn(2, 67, 67, 3).astype(np.float32)
TINY = dict(hidden=400, num_classes=5)


def run(name, init="he", **fields):
    """Returns (variables, logits, modules' outputs, training's logits, training's outputs)."""
    model = create_model(name, **TINY, init=init, **fields)
    variables = init_variables(model, jax.random.key(0), IMAGES.shape)
    capture = dict(capture_intermediates=True, mutable=["intermediates"])

    def both(variables):
        logits, state = model.apply(variables, IMAGES, **capture)
        rngs = {"dropout": jax.random.key(1)}
        trained, train_state = model.apply(variables, IMAGES, train=True, rngs=rngs, **capture)
        return logits, state["intermediates"], trained, train_state["intermediates"]

    # Compiling takes nearly all of the time.
    both = jax.jit(both, compiler_options={"xla_backend_optimization_level": 0})
    logits, seen, trained, train_seen = jax.tree.map(np.asarray, both(variables))
    short = [
        {path.removesuffix("/__call__/0"): leaf for path, leaf in pytree.flatten(tree).items()}
        for tree in (seen, train_seen)
    ]
    return variables["params"], logits, short[0], trained, short[1]


@pytest.fixture(scope="module")
def runs():
    return {name: run(name, init="paper" if "2gpu" in name else "he") for name in alexnet.VARIANTS}


@pytest.mark.parametrize("name", NORMALIZED)
def test_response_normalization_by_its_definition(runs, name):
    _, _, seen, *_ = runs[name]
    x = seen["conv1"] if name == "alexnet_2gpu" else seen["pool1"]
    assert x.min() == 0  # after ReLU
    expected = np.empty_like(x)
    for i in range(96):
        near = x[..., max(i - 2, 0) : min(i + 2, 95) + 1]
        expected[..., i] = x[..., i] / (2 + 1e-4 * np.square(near).sum(-1)) ** 0.75
    np.testing.assert_allclose(seen["norm1"], expected, rtol=1e-4, atol=1e-6)


def test_pooling_overlaps(runs):
    _, _, seen, *_ = runs["alexnet"]
    windows = np.lib.stride_tricks.sliding_window_view(seen["conv1"], (3, 3), axis=(1, 2))
    np.testing.assert_array_equal(seen["pool1"], windows[:, ::2, ::2].max((-2, -1)))


def test_each_gpu_sees_its_own_maps(runs):
    params, *_ = runs["alexnet_2gpu"]
    seen = {name: params[name]["conv"]["kernel"].shape for name in params if "conv" in name}
    assert seen == {
        f"conv{i + 1}": (k, k, maps, width) for i, (k, maps, width) in enumerate(TWO_GPUS)
    }


@pytest.mark.parametrize("name", alexnet.VARIANTS)
def test_half_is_dropped_in_training_only(runs, name):
    """The paper drops outputs of fc6 and fc7, torchvision drops their inputs."""
    assert create_model(name).dropout == 0.5
    _, logits, seen, trained, train_seen = runs[name]
    assert np.abs(logits - trained).max() > 1e-3 * np.abs(logits).max()
    if name == "alexnet":
        # fc6 takes 6x6 means, here copies of the 1x1 maps.
        pooled = np.broadcast_to(train_seen["pool5"], (2, 6, 6, 256)).reshape(2, -1)
        befores = pooled, np.maximum(train_seen["fc6"], 0)
    else:
        befores = np.maximum(train_seen["fc6"], 0), np.maximum(train_seen["fc7"], 0)
    for before, i in zip(befores, (6, 7)):
        after = train_seen[f"dropout{i}"]
        kept = after != 0
        assert 0.4 < kept[before > 0].mean() < 0.6
        np.testing.assert_allclose(after[kept], 2 * before[kept], rtol=1e-5)
        assert (seen[f"dropout{i}"] > 0).mean() > 1.5 * (after > 0).mean()


def test_initial_values_of_the_paper(runs):
    """Section 5: N(0, 0.01^2); biases 1 in conv2, conv4, conv5 and the hidden dense layers."""
    params, *_ = runs["alexnet_2gpu"]
    flat = pytree.flatten(params)
    ones = [
        path.split("/")[0] for path, leaf in flat.items() if "bias" in path and (leaf == 1).all()
    ]
    assert ones == ["conv2", "conv4", "conv5", "fc6", "fc7"]
    for path, leaf in flat.items():
        if path.endswith("kernel"):
            assert np.std(leaf) == pytest.approx(0.01, rel=0.05), path
            assert np.abs(leaf).max() > 0.025, path  # neither uniform nor truncated
        elif path.split("/")[0] not in ones:
            assert (leaf == 0).all(), path


def test_initial_values_of_he(runs):
    params, *_ = runs["alexnet_single_tower"]
    std = np.std(params["conv3"]["conv"]["kernel"])
    assert std == pytest.approx(np.sqrt(2 / (3 * 3 * 384)), rel=0.01)
    assert np.std(params["head"]["kernel"]) == pytest.approx(np.sqrt(1 / 400), rel=0.1)
    assert not any(np.any(v) for p, v in pytree.flatten(params).items() if p.endswith("bias"))
