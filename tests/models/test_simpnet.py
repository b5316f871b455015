"""SimpNet: the published layer lists, dropout and its rates, initial values."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns import tree as pytree
from flax_cnns.errors import UserError
from flax_cnns.models.registry import create_model, init_variables
from tests.models.published import PUBLISHED
from tests.models.shapes import cost_of

# The authors' network definitions for CIFAR-10: (input, output channels) of each 3x3 with bias,
# which BatchNorm with scale and bias follows; then those of the dense layer.
LISTS = {
    "simpnet_5m": (
        [
            *((3, 66), (66, 128), (128, 128), (128, 128), (128, 192)),
            *((192, 192), (192, 192), (192, 192), (192, 192), (192, 288)),
            *((288, 288), (288, 355), (355, 432)),
        ],
        (432, 10),
    ),
    "simpnet_9m": (
        [
            *((3, 128), (128, 182), (182, 182), (182, 182), (182, 182)),
            *((182, 182), (182, 182), (182, 182), (182, 182), (182, 430)),
            *((430, 430), (430, 455), (455, 600)),
        ],
        (600, 10),
    ),
    "simpnet_slim_300k": (
        [
            *((3, 30), (30, 40), (40, 40), (40, 40), (40, 50)),
            *((50, 50), (50, 50), (50, 50), (50, 50), (50, 58)),
            *((58, 58), (58, 70), (70, 90)),
        ],
        (90, 10),
    ),
    "simpnet_slim_600k": (
        [
            *((3, 40), (40, 60), (60, 60), (60, 60), (60, 72)),
            *((72, 73), (73, 73), (73, 73), (73, 75), (75, 81)),
            *((81, 82), (82, 90), (90, 120)),
        ],
        (120, 10),
    ),
}
# README of Coderx7/SimpNet, rounded there.
README = {
    "simpnet_5m": 5.4e6,
    "simpnet_9m": 8.9e6,
    "simpnet_slim_300k": 300e3,
    "simpnet_slim_600k": 600e3,
}
# After layers 1 to 13; after 5, 10 and 13 a pooling comes first.
RATES = {
    "simpnet_5m": [0.2] * 9 + [0.3] * 4,
    "simpnet_9m": [0.2] * 13,
    "simpnet_slim_300k": [0.0] * 13,
    "simpnet_slim_600k": [0.1] * 9 + [0.2] * 4,
}
TINY = dict(widths=((4, 4), (4,), (8,)), input_size=(8, 8, 3), num_classes=4)


@pytest.mark.parametrize("name", LISTS)
def test_count_from_the_published_list(name):
    layers, (features, classes) = LISTS[name]
    convolutions = sum(3 * 3 * i * o + o + 2 * o for i, o in layers)
    total = convolutions + features * classes + classes
    assert PUBLISHED[name].params == total
    assert abs(total / README[name] - 1) < 0.02


@pytest.mark.parametrize("name", LISTS)
def test_each_layers_parameters_and_macs(name):
    rows = {row.path: row for row in cost_of(name).layers}
    layers, (features, classes) = LISTS[name]
    for number, (i, o) in enumerate(layers, 1):
        side = 32 if number <= 5 else 16 if number <= 10 else 8
        row = rows[f"conv{number}/conv"]
        assert (row.params, row.macs) == (9 * i * o + o, side * side * 9 * i * o)
        assert row.output_shape == (1, side, side, o)
        assert rows[f"conv{number}/norm"].params == 2 * o
    assert rows["head"].macs == features * classes


def run(model, size, train=False):
    """Returns (output, outputs of modules by name), as shapes."""

    def forward():
        images = jnp.zeros((2, size, size, 3))
        rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
        variables = model.init(rngs, images)
        return model.apply(
            variables,
            images,
            train=train,
            rngs=rngs,
            capture_intermediates=True,
            mutable=["intermediates", "batch_stats"],
        )

    out, state = jax.eval_shape(forward)
    flat = pytree.flatten(state["intermediates"])
    return out, {path.removesuffix("/__call__/0"): leaf.shape for path, leaf in flat.items()}


@pytest.mark.parametrize(("size", "sides"), [(32, (32, 16, 8)), (37, (37, 18, 9)), (4, (4, 2, 1))])
def test_features_by_name(size, sides):
    logits, shapes = run(create_model("simpnet_5m"), size)
    for number, side in ((1, sides[0]), (5, sides[0]), (6, sides[1]), (10, sides[1])):
        width = LISTS["simpnet_5m"][0][number - 1][1]
        assert shapes[f"conv{number}"] == (2, side, side, width)
    assert shapes["pool1"] == (2, sides[1], sides[1], 192)
    assert shapes["pool2"] == (2, sides[2], sides[2], 288)
    assert shapes["conv13"] == (2, sides[2], sides[2], 432)
    assert shapes["pool3"] == (2, 432)
    assert logits.shape == (2, 10)


@pytest.mark.parametrize("name", LISTS)
def test_dropout_after_every_layer_at_the_published_rate(name):
    rates = []

    def note(call, args, kwargs, context):
        module = context.module
        if isinstance(module, nn.Dropout) and kwargs.get("deterministic") is not True:
            rates.append(("/".join(module.path), module.rate))
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        run(create_model(name), 8, train=True)
    places = [f"dropout{number}" for number in range(1, 14)]
    places[4], places[9], places[12] = (f"pool{i}/dropout" for i in (1, 2, 3))
    assert dict(rates) == dict(zip(places, RATES[name]))


def test_evaluation_is_deterministic_and_training_random():
    model = create_model("simpnet_9m", **TINY)
    images = np.random.RandomState(0).rand(2, 8, 8, 3).astype(np.float32)
    variables = init_variables(model, jax.random.key(0))
    np.testing.assert_array_equal(model.apply(variables, images), model.apply(variables, images))

    @jax.jit
    def train(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return model.apply(variables, images, train=True, mutable=["batch_stats"], rngs=rngs)

    (first, updates), (second, _) = train(0), train(1)
    assert (first != second).any()
    old, new = pytree.flatten(variables["batch_stats"]), pytree.flatten(updates["batch_stats"])
    assert all((old[path] != new[path]).any() for path in old)


def test_saf_of_the_strongest_is_an_option():
    model = create_model("simpnet_slim_300k", **TINY, saf_rate=0.25, saf="strongest")
    images = np.random.RandomState(0).rand(2, 8, 8, 3).astype(np.float32)
    variables = init_variables(model, jax.random.key(0))
    apply = dict(train=True, mutable=["batch_stats"])  # no random stream: nothing is random
    with_saf, _ = model.apply(variables, images, **apply)
    without, _ = model.clone(saf_rate=0.0).apply(variables, images, **apply)
    assert (with_saf != without).any()
    np.testing.assert_array_equal(
        model.apply(variables, images), model.clone(saf_rate=0.0).apply(variables, images)
    )


def test_rates_for_other_groups():
    with pytest.raises(
        UserError, match="saf_rate must be one rate, or 3: one for each pooling; got 2"
    ):
        run(create_model("simpnet_9m", saf_rate=(0.1, 0.2)), 32)


def test_first_values_of_the_published_networks():
    model = create_model("simpnet_5m", init="paper")
    params = init_variables(model, jax.random.key(0))["params"]
    for number, (i, _) in enumerate(LISTS["simpnet_5m"][0], 1):
        kernel = np.asarray(params[f"conv{number}"]["conv"]["kernel"])
        assert (params[f"conv{number}"]["conv"]["bias"] == 0).all()
        if number in (3, 4, 5):
            assert kernel.std() == pytest.approx(0.01, rel=0.02)
            assert np.abs(kernel).max() > 0.03  # normal
        else:  # Caffe's xavier: uniform in +-sqrt(3 / fan_in)
            bound = np.sqrt(3 / (9 * i))
            assert 0.99 < np.abs(kernel).max() / bound < 1 + 1e-6
            assert kernel.std() == pytest.approx(bound / np.sqrt(3), rel=0.05)
    head = np.asarray(params["head"]["kernel"])
    assert 0.99 < np.abs(head).max() / np.sqrt(3 / 432) < 1 + 1e-6  # uniform as well
    slim = create_model("simpnet_slim_300k", init="paper")
    slim = init_variables(slim, jax.random.key(0))["params"]
    assert np.asarray(slim["conv3"]["conv"]["kernel"]).std() == pytest.approx(
        1 / 360**0.5, rel=0.05
    )


@pytest.mark.parametrize(("name", "momentum"), [("simpnet_5m", 0.95), ("simpnet_slim_600k", 0.99)])
def test_momentum_of_the_statistics(name, momentum):
    model = create_model(name, **TINY)
    images = np.random.RandomState(0).rand(2, 8, 8, 3).astype(np.float32)
    variables = init_variables(model, jax.random.key(0))
    model = model.clone(dropout=0.0, saf_rate=0.0)
    _, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])
    kernel = variables["params"]["conv1"]["conv"]["kernel"]
    mean = np.asarray(
        nn.Conv(4, (3, 3)).apply({"params": {"kernel": kernel, "bias": jnp.zeros(4)}}, images)
    )
    np.testing.assert_allclose(
        updates["batch_stats"]["conv1"]["norm"]["mean"],
        (1 - momentum) * mean.mean((0, 1, 2)),
        rtol=1e-4,
        atol=1e-7,
    )
