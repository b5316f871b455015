"""Wide ResNets: counts by hand and as published, dropout inside the block, valid depths."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
import pytest

from flax_cnns import tree as pytree
from flax_cnns.errors import UserError
from flax_cnns.models.registry import create_model, init_variables
from tests.models.published import PUBLISHED
from tests.models.shapes import capture_shapes

CIFAR = {  # (d, k): what tables 4 and 5 print, in millions
    (16, 4): 2.8,
    (16, 8): 11.0,
    (16, 10): 17.1,
    (22, 8): 17.2,
    (22, 10): 26.8,
    (28, 10): 36.5,
    (28, 12): 52.5,
    (40, 1): 0.6,
    (40, 2): 2.2,
    (40, 4): 8.9,
    (40, 8): 35.7,
}
TINY = dict(depth=22, width_mult=1, input_size=(8, 8, 3), num_classes=3)
IMAGES = np.random.RandomState(0).randn(4, 8, 8, 3).astype(np.float32)


def by_hand(depth, k, classes=10):
    """Counts parameters: two per channel of a norm, and a 1x1 shortcut where the width changes."""
    n, channels = (depth - 4) // 6, 16
    count = 3 * 3 * 3 * 16 + 2 * 64 * k + (64 * k + 1) * classes
    for width in (16 * k, 32 * k, 64 * k):
        count += channels * width * (channels != width)
        count += 2 * channels + 9 * channels * width + (2 * width + 9 * width * width)
        count += (n - 1) * 2 * (2 * width + 9 * width * width)
        channels = width
    return count


@pytest.mark.parametrize(("depth", "k"), CIFAR)
def test_count_by_hand(depth, k):
    exact = by_hand(depth, k)
    assert PUBLISHED[f"wrn_{depth}_{k}"].params == exact
    assert round(exact / 1e6, 1) == pytest.approx(
        CIFAR[depth, k], abs=0.11
    )  # the paper prints 2.75 M as 2.8


def test_a_hundred_classes():
    assert PUBLISHED["wrn_28_10_c100"].params == by_hand(28, 10, 100)


@pytest.mark.parametrize("size", [32, 29])
def test_output_shape_of_each_stage(size):
    logits, shapes = capture_shapes("wrn_16_4", size)
    half, quarter = -(-size // 2), -(-size // 4)
    assert shapes["stem"] == (2, size, size, 16)
    assert shapes["stage1"] == (2, size, size, 64)
    assert shapes["stage2"] == (2, half, half, 128)
    assert shapes["stage3"] == shapes["norm"] == (2, quarter, quarter, 256)
    assert shapes["stage2/block1/conv1"] == (2, half, half, 128)
    assert shapes["stage1/block1/projection"] == (2, size, size, 64)
    assert logits.shape == (2, 10)
    _, thin = capture_shapes("wrn_40_1", size)
    assert "stage1/block1/projection" not in thin  # 16 to 16
    _, wide = capture_shapes("wide_resnet50_2", 64)
    assert wide["stage1/block1/conv2"] == (2, 16, 16, 128)
    assert wide["stage4"] == (2, 2, 2, 2048)


@pytest.mark.parametrize(("depth", "near"), [(30, "28 or 34"), (5, "10"), (4, "10")])
def test_depths_that_there_are_not(depth, near):
    with pytest.raises(UserError, match=rf"6n \+ 4.* got {depth}; the nearest is {near}"):
        init_variables(create_model("wrn_28_10", depth=depth), jax.random.key(0))


# Compiling takes most of the time.
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def train(model, variables, *capture, **rngs):
    return model.apply(
        variables,
        IMAGES,
        train=True,
        mutable=["batch_stats", "intermediates"] if capture else ["batch_stats"],
        capture_intermediates=(lambda m, _: m.name in capture) if capture else False,
        rngs={stream: jax.random.key(seed) for stream, seed in rngs.items()},
    )


def test_dropout_is_between_the_convolutions_after_norm_and_relu():
    model = create_model("wrn_28_10", **TINY | dict(depth=10), dropout=0.3)
    variables = init_variables(model, jax.random.key(0))
    run = quick(lambda seed: train(model, variables, "norm2", "dropout", dropout=seed))
    _, state = run(1)
    _, other = run(2)
    for stage in ("stage1", "stage2", "stage3"):
        block = state["intermediates"][stage]["block1"]
        before = np.maximum(block["norm2"]["__call__"][0], 0)
        after = np.asarray(block["dropout"]["__call__"][0])
        kept = after != 0
        np.testing.assert_allclose(after[kept], before[kept] / 0.7, rtol=1e-5)
        assert kept[before > 0].mean() == pytest.approx(0.7, abs=0.06)
        assert (after != other["intermediates"][stage]["block1"]["dropout"]["__call__"][0]).any()


def test_dropout_is_off_in_evaluation_and_needs_its_stream_in_training():
    model = create_model("wrn_28_10", **TINY, dropout=0.3)
    variables = jax.eval_shape(partial(init_variables, model), jax.random.key(0))
    plain = model.clone(dropout=0.0)
    assert jax.eval_shape(partial(init_variables, plain), jax.random.key(0)) == variables
    jaxpr = str(jax.make_jaxpr(partial(model.apply))(variables, IMAGES))
    assert jaxpr == str(jax.make_jaxpr(partial(plain.apply))(variables, IMAGES))
    with pytest.raises(UserError, match=r'rngs=\{"dropout": key\}'):
        jax.eval_shape(lambda v: train(model, v), variables)


@pytest.mark.slow
def test_scanned_blocks_compute_the_same():
    """In training, with dropout."""
    model = create_model("wrn_28_10", **TINY, dropout=0.3)
    scanned = model.clone(scan=True, remat=True)
    variables = init_variables(model, jax.random.key(0))

    step = quick(lambda v: train(model, v, dropout=1))
    scanned_step = quick(lambda v: train(scanned, v, dropout=1))
    wanted = step(variables)
    got = pytree.flatten(pytree.unstack_blocks(scanned_step(pytree.stack_blocks(variables))))
    for path, leaf in pytree.flatten(wanted).items():
        np.testing.assert_allclose(got[path], leaf, rtol=1e-4, atol=1e-5, err_msg=path)
