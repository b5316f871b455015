"""GoogLeNet: table 1's counts, shapes and operations; its heads, dropout and initial values."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns import layers
from flax_cnns import tree as pytree
from flax_cnns.analysis.cost import cost
from flax_cnns.errors import UserError
from flax_cnns.models import googlenet
from flax_cnns.models.registry import create_model, init_variables
from tests.models.published import PUBLISHED
from tests.models.shapes import blank_model, cost_of, variable_shapes

# Table 1: side and depth of the output; input depth and the widths #1x1, #3x3 reduce, #3x3,
# #5x5 reduce, #5x5, pool proj; params in Ki (1024 weights, no biases), ops in millions.
TABLE1 = {
    "mixed3a": (28, 256, 192, (64, 96, 128, 16, 32, 32), 159, 128),
    "mixed3b": (28, 480, 256, (128, 128, 192, 32, 96, 64), 380, 304),
    "mixed4a": (14, 512, 480, (192, 96, 208, 16, 48, 64), 364, 73),
    "mixed4b": (14, 512, 512, (160, 112, 224, 24, 64, 64), 437, 88),
    "mixed4c": (14, 512, 512, (128, 128, 256, 24, 64, 64), 463, 100),
    "mixed4d": (14, 528, 512, (112, 144, 288, 32, 64, 64), 580, 119),
    "mixed4e": (14, 832, 528, (256, 160, 320, 32, 128, 128), 840, 170),
    "mixed5a": (7, 832, 832, (256, 160, 320, 32, 128, 128), 1072, 54),
    "mixed5b": (7, 1024, 832, (384, 192, 384, 48, 128, 128), 1388, 71),
}
# Values that follow from the table's widths, where its columns have others.
RIGHT_PARAMS = {"mixed4c": 497.5, "mixed4d": 590.5, "mixed5a": 1018, "mixed5b": 1409}
RIGHT_OPS = {"mixed5a": 51}

TINY = (("mixed4a", (4, 4, 4, 4, 4, 4)), ("mixed4d", (4, 4, 4, 4, 4, 4)))


def by_hand(window5: int, norm: bool, aux: bool) -> int:
    """Counts weights, and for each output of a convolution a bias, or a scale and a bias."""
    convs = [(7, 3, 64), (1, 64, 64), (3, 64, 192)]
    for _, _, depth, (width1, reduce3, width3, reduce5, width5, proj), _, _ in TABLE1.values():
        convs += [(1, depth, width1), (1, depth, reduce3), (3, reduce3, width3)]
        convs += [(1, depth, reduce5), (window5, reduce5, width5), (1, depth, proj)]
    dense = [(1024, 1000)]
    if aux:
        convs += [(1, 512, 128), (1, 528, 128)]
        dense += [(4 * 4 * 128, 1024), (1024, 1000)] * 2
    each = 2 if norm else 1
    return sum(k * k * i * o + each * o for k, i, o in convs) + sum(i * o + o for i, o in dense)


@pytest.mark.parametrize("name", googlenet.VARIANTS)
def test_count(name):
    window5 = 3 if name in ("googlenet", "googlenet_tv_aux") else 5
    expected = by_hand(window5, norm="2014" not in name, aux="aux" in name)
    assert PUBLISHED[name].params == expected


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


@pytest.mark.parametrize("name", ["googlenet_2014", "googlenet"])
def test_table_1s_output_sizes(name):
    logits, shapes, _ = captured(name, 224)
    assert shapes["conv1"] == (2, 112, 112, 64)
    assert shapes["pool1"] == shapes["conv2_reduce"] == (2, 56, 56, 64)
    assert shapes["conv2"] == (2, 56, 56, 192)
    assert shapes["pool2"] == (2, 28, 28, 192)
    assert shapes["pool3"] == (2, 14, 14, 480)
    assert shapes["pool4"] == (2, 7, 7, 832)
    for stage, (side, depth, *_) in TABLE1.items():
        assert shapes[stage] == (2, side, side, depth)
    assert shapes["dropout"] == (2, 1024)
    assert logits.shape == (2, 1000)


def test_table_1s_parameters_and_operations():
    rows = cost_of("googlenet_2014").layers

    def counted(stage):  # Ki of weights, millions of operations
        modules = [row for row in rows if row.path.startswith(f"{stage}/")]
        weights = sum(row.params - row.output_shape[-1] for row in modules)
        return weights / 1024, sum(row.macs for row in modules) / 1e6

    # 7 x 7 x 3 x 64 weights at 112 x 112 places; the paper has "2.7K" and "34M".
    assert counted("conv1") == (9408 / 1024, pytest.approx(118, rel=0.01))
    reduce, conv2 = counted("conv2_reduce"), counted("conv2")
    assert reduce[0] + conv2[0] == pytest.approx(112, rel=0.01)
    assert reduce[1] + conv2[1] == pytest.approx(360, rel=0.01)
    for stage, (*_, params, ops) in TABLE1.items():
        weights, macs = counted(stage)
        assert weights == pytest.approx(RIGHT_PARAMS.get(stage, params), rel=0.01), stage
        assert macs == pytest.approx(RIGHT_OPS.get(stage, ops), rel=0.015), stage


def test_the_modules_operations():
    """Stanford CS231n's worked example for 28x28x256.

    Its slide has 358M for the second module, but the slide's six products add up to 271M.
    """
    unit = partial(
        layers.ConvUnit,
        conv=partial(layers.Conv, use_bias=False),
        norm=layers.make_norm("none", train=False),
    )
    naive = cost(googlenet.NaiveInception(128, 192, 96, unit), (1, 28, 28, 256))
    assert naive.macs == 28 * 28 * 256 * (128 + 9 * 192 + 25 * 96)
    assert naive.macs == pytest.approx(854e6, rel=1e-3)
    reduced = cost(googlenet.Inception(128, 64, 192, 64, 96, 64, unit), (1, 28, 28, 256))
    assert reduced.macs == 28 * 28 * (256 * (128 + 64 * 3) + 64 * (9 * 192 + 25 * 96))
    assert reduced.macs == pytest.approx(271.4e6, rel=1e-3)
    image = jnp.zeros((1, 28, 28, 256))
    for module, depth in [
        (googlenet.NaiveInception(128, 192, 96, unit), 672),
        (googlenet.Inception(128, 64, 192, 64, 96, 64, unit), 480),
    ]:
        out, _ = jax.eval_shape(lambda m=module: m.init_with_output(jax.random.key(0), image))
        assert out.shape == (1, 28, 28, depth)


def test_the_naive_module_passes_the_maximum_on():
    unit = partial(layers.ConvUnit, conv=layers.Conv)
    x = jax.random.normal(jax.random.key(0), (1, 6, 6, 2))
    out, _ = googlenet.NaiveInception(1, 1, 1, unit).init_with_output(jax.random.key(1), x)
    np.testing.assert_array_equal(out[..., 3:], layers.max_pool(x, 3, 1, padding=1))


@pytest.mark.parametrize("size", [64, 224])
def test_heads_in_training_only(size):
    _, shapes, heads = captured("googlenet_2014_aux", size, train=True)
    assert {path: leaf.shape for path, leaf in heads.items()} == {
        "aux1/logits/0": (2, 1000),
        "aux2/logits/0": (2, 1000),
    }
    assert shapes["aux1/conv"] == shapes["aux2/conv"] == (2, 4, 4, 128)
    assert shapes["aux1/fc"] == (2, 1024)
    _, shapes, heads = captured("googlenet_2014_aux", size)
    assert not heads
    assert "aux1/conv" not in shapes
    assert not captured("googlenet_2014", size, train=True)[2]


def test_the_papers_heads_take_5x5_means():
    seen = []

    def unit(width, window, name):
        return lambda x: seen.append(x) or x

    x = jax.random.normal(jax.random.key(0), (1, 14, 14, 2))
    for adaptive in (False, True):
        aux = googlenet.Aux(3, unit, nn.Dense, nn.Dense, adaptive, 0.7)
        aux.init(jax.random.key(0), x, False)
    paper, torchvision = seen
    np.testing.assert_allclose(paper[:, 1, 3], x[:, 3:8, 9:14].mean((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(torchvision[:, 1, 3], x[:, 3:7, 10:14].mean((1, 2)), rtol=1e-5)


@pytest.mark.parametrize(("name", "rate"), [("googlenet_2014_aux", 0.4), ("googlenet_tv_aux", 0.2)])
def test_dropout_rates(name, rate):
    rates = {}

    def note(call, args, kwargs, context):
        if isinstance(context.module, nn.Dropout):
            rates["/".join(context.module.path)] = context.module.rate
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        captured(name, 32, train=True)
    assert rates == {"aux1/dropout": 0.7, "aux2/dropout": 0.7, "dropout": rate}


def test_training_is_random_and_evaluation_is_not():
    model = create_model("googlenet_2014_aux", table=TINY, num_classes=3)
    images = jax.random.normal(jax.random.key(0), (2, 31, 31, 3))
    variables = init_variables(model, jax.random.key(0), images.shape)

    @jax.jit
    def run(key):
        train = partial(model.apply, variables, images, train=True, mutable=["aux_logits"])
        return model.apply(variables, images), train(rngs={"dropout": key})

    evaluated, (trained, state) = run(jax.random.key(1))
    evaluated2, (trained2, state2) = run(jax.random.key(2))
    np.testing.assert_array_equal(evaluated, evaluated2)
    assert np.abs(trained - trained2).max() > 1e-4
    for head in ("aux1", "aux2"):
        logits, logits2 = (s["aux_logits"][head]["logits"][0] for s in (state, state2))
        assert logits.shape == (2, 3)
        assert np.abs(logits - logits2).max() > 1e-4


def test_papers_initial_values():
    """Caffe's: uniform up to sqrt(3 / fan_in), biases of 0.2, and of 0 in the classifiers."""
    model = create_model("googlenet_2014_aux", table=TINY, num_classes=3, init="paper")
    variables = init_variables(model, jax.random.key(0))["params"]
    for path, leaf in pytree.flatten(variables).items():
        if path.endswith("kernel"):
            limit = np.sqrt(3 / np.prod(leaf.shape[:-1]))
            assert np.abs(leaf).max() <= limit * (1 + 1e-5)
            if leaf.size > 1000:
                assert np.abs(leaf).max() > 0.98 * limit
                assert np.std(leaf) == pytest.approx(limit / np.sqrt(3), rel=0.05)
        else:
            expected = 0.0 if "head" in path else 0.2
            np.testing.assert_allclose(leaf, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "window"), [("googlenet", 3), ("googlenet_bn_5x5", 5), ("googlenet_2014", 5)]
)
def test_the_5x5_branch(name, window):
    shapes = variable_shapes(name)
    assert shapes["params"]["mixed3a"]["conv5x5"]["conv"]["kernel"].shape[:2] == (window, window)


def test_group_normalization_does_not_fit():
    with pytest.raises(UserError, match='norm="group": expected a multiple of 16 channels'):
        captured("googlenet", 64, norm="group")
