"""Inception v3: counts by hand, table 1's sizes, the auxiliary head, Keras's differences."""

from __future__ import annotations

from itertools import chain

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns import tree as pytree
from flax_cnns.models import inception_v3
from flax_cnns.models.registry import create_model, init_variables
from flax_cnns.weights.inception_v3 import KERAS_ORDER
from tests.models.published import PUBLISHED
from tests.models.shapes import blank_model, cost_of

# (height, width, in, out) of each convolution in the release.
STEM = [(3, 3, 3, 32), (3, 3, 32, 32), (3, 3, 32, 64), (1, 1, 64, 80), (3, 3, 80, 192)]


def block_a(depth, pool):
    double = [(1, 1, depth, 64), (3, 3, 64, 96), (3, 3, 96, 96)]
    branch5 = [(1, 1, depth, 48), (5, 5, 48, 64)]
    return [(1, 1, depth, 64), *branch5, *double, (1, 1, depth, pool)]


def block_c(width):
    branch7 = [(1, 1, 768, width), (1, 7, width, width), (7, 1, width, 192)]
    double = [(1, 1, 768, width), *[(7, 1, width, width)] * 3, (1, 7, width, 192)]
    return [(1, 1, 768, 192), *branch7, *double, (1, 1, 768, 192)]


def block_e(depth):
    branch3 = [(1, 1, depth, 384), (1, 3, 384, 384), (3, 1, 384, 384)]
    double = [(1, 1, depth, 448), (3, 3, 448, 384), (1, 3, 384, 384), (3, 1, 384, 384)]
    return [(1, 1, depth, 320), *branch3, *double, (1, 1, depth, 192)]


BLOCKS = {
    "mixed5b": block_a(192, 32),
    "mixed5c": block_a(256, 64),
    "mixed5d": block_a(288, 64),
    "mixed6a": [(3, 3, 288, 384), (1, 1, 288, 64), (3, 3, 64, 96), (3, 3, 96, 96)],
    "mixed6b": block_c(128),
    "mixed6c": block_c(160),
    "mixed6d": block_c(160),
    "mixed6e": block_c(192),
    "mixed7a": [
        *[(1, 1, 768, 192), (3, 3, 192, 320)],
        *[(1, 1, 768, 192), (1, 7, 192, 192), (7, 1, 192, 192), (3, 3, 192, 192)],
    ],
    "mixed7b": block_e(1280),
    "mixed7c": block_e(2048),
}
AUX = [(1, 1, 768, 128), (5, 5, 128, 768)]


def by_hand(convs, scale=True):
    return sum(h * w * i * o + (2 if scale else 1) * o for h, w, i, o in convs)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("inception_v3", 27_161_264),  # torchvision 0.28.0's meta["num_params"]
        ("inception_v3_noaux", 23_834_568),  # timm 1.0.31's
        ("keras_inception_v3", 23_817_352),  # trainable, from Keras's model.summary
    ],
)
def test_count(name, published):
    convs = [*STEM, *chain(*BLOCKS.values())]
    expected = by_hand(convs, scale="keras" not in name) + 2048 * 1000 + 1000
    if name == "inception_v3":
        expected += by_hand(AUX) + 768 * 1000 + 1000
    assert PUBLISHED[name].params == published == expected


def test_parameters_and_operations_by_block():
    counted = cost_of("inception_v3_noaux")
    for block, convs in BLOCKS.items():
        own = [row for row in counted.layers if row.path.startswith(f"{block}/")]
        assert sum(row.params for row in own) == by_hand(convs), block
    # torchvision 0.28.0's meta["_ops"]
    assert counted.macs == pytest.approx(5.713e9, rel=1e-3)


def captured(name, size, train=False, **fields):
    """Returns (logits, {path: output shape}, auxiliary logits), without computing."""
    model = blank_model(name, **fields)

    def run():
        images = jnp.zeros((2, size, size, 3))
        variables = model.init(jax.random.key(0), images)
        return model.apply(
            variables,
            images,
            train=train,
            rngs={"dropout": jax.random.key(0)},
            capture_intermediates=True,
            mutable=["intermediates", "batch_stats", "aux_logits"],
        )

    out, state = jax.eval_shape(run)
    shapes = {
        path.removesuffix("/__call__/0"): leaf.shape
        for path, leaf in pytree.flatten(state["intermediates"]).items()
    }
    return out, shapes, pytree.flatten(state.get("aux_logits", {}))


def test_table_1s_sizes():
    logits, shapes, heads = captured("inception_v3", 299, train=True)
    sizes = {
        "conv1a": (149, 32),
        "conv2a": (147, 32),
        "conv2b": (147, 64),
        "pool1": (73, 64),
        "conv3b": (73, 80),
        "conv4a": (71, 192),
        "pool2": (35, 192),
        "mixed5b": (35, 256),
        "mixed5c": (35, 288),
        "mixed5d": (35, 288),
        "mixed6a": (17, 768),
        "mixed6e": (17, 768),
        "mixed7a": (8, 1280),
        "mixed7b": (8, 2048),
        "mixed7c": (8, 2048),
        "aux1/conv1": (5, 128),
        "aux1/conv2": (1, 768),
    }
    for path, (side, depth) in sizes.items():
        assert shapes[path] == (2, side, side, depth), path
    assert shapes["dropout"] == (2, 2048)
    assert logits.shape == (2, 1000)
    assert {path: leaf.shape for path, leaf in heads.items()} == {"aux1/logits/0": (2, 1000)}


def test_the_head_in_training_only():
    _, shapes, heads = captured("inception_v3", 299)
    assert not heads
    assert "aux1/conv1" not in shapes
    assert not captured("inception_v3_noaux", 299, train=True)[2]


@pytest.mark.parametrize(("name", "rate"), [("inception_v3", 0.5), ("keras_inception_v3", 0.0)])
def test_dropout_and_norms(name, rate):
    rates, norms = {}, set()

    def note(call, args, kwargs, context):
        module = context.module
        if isinstance(module, nn.Dropout):
            rates["/".join(module.path)] = module.rate
        if isinstance(module, nn.BatchNorm):
            norms.add((module.momentum, module.epsilon, module.use_scale))
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        captured(name, 75, train=True)
    assert rates == {"dropout": rate}
    keras = name == "keras_inception_v3"
    assert norms == {(0.99 if keras else 0.9, 1e-3, not keras)}


def test_keras_excludes_the_padding_from_its_means():
    for name in ("inception_v3", "keras_inception_v3"):
        model, means = create_model(name), []

        def note(call, args, kwargs, context, means=means):
            if isinstance(context.module, inception_v3.BlockA):
                means.append(context.module.mean)
            return call(*args, **kwargs)

        with nn.intercept_methods(note):
            jax.eval_shape(lambda m=model: init_variables(m, jax.random.key(0), (1, 75, 75, 3)))
        corner = means[0](jnp.ones((1, 4, 4, 1)))[0, 0, 0, 0]
        assert corner == pytest.approx(1.0 if name.startswith("keras") else 4 / 9)


def test_keras_creates_layers_in_the_order_in_which_ours_run():
    paths = [row.path for row in cost_of("keras_inception_v3").layers if row.macs]
    assert [f"{path}/conv" for path in KERAS_ORDER] == paths[:-1]
    assert paths[-1] == "head"


def test_tensorflows_initial_values():
    """Normal of deviation 0.1, truncated at two; 0.01 and 0.001 at the end of the head."""
    inits = {}

    def note(call, args, kwargs, context):
        if isinstance(context.module, nn.Conv | nn.Dense):
            inits["/".join(context.module.path)] = context.module.kernel_init
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        captured("inception_v3", 75, init="paper")
    deviations = {}
    for path, init in inits.items():
        values = init(jax.random.key(0), (100, 200), jnp.float32)
        # A normal of deviation 1 that is truncated at two has the deviation 0.88.
        deviations[path] = round(float(np.std(values) / 0.8796), 4)
        assert np.abs(values).max() == pytest.approx(2 * deviations[path], rel=0.02)
    ends = {"aux1/conv2/conv": 0.01, "aux1/head": 0.001}
    assert deviations == pytest.approx({path: ends.get(path, 0.1) for path in inits}, rel=0.02)


@pytest.mark.parametrize("norm", ["group", "none"])
@pytest.mark.parametrize("name", ["inception_v3", "keras_inception_v3"])
def test_other_norms(name, norm):
    short = dict(pool_projs=(32,), widths=(128,))
    logits, _, _ = captured(name, 75, norm=norm, **short)
    assert logits.shape == (2, 1000)
