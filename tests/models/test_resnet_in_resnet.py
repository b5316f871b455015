"""ResNet in ResNet: counts by hand, the unit's equation in NumPy, shortcuts, shapes, options."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns import create_model, layers
from flax_cnns import tree as pytree
from flax_cnns.errors import UserError
from flax_cnns.models.registry import init_variables
from flax_cnns.models.resnet_in_resnet import Block, Unit
from tests.models.published import PUBLISHED
from tests.models.shapes import capture_shapes

TINY = dict(depths=(1, 1), widths=(4, 6), input_size=(8, 8, 3))
IMAGES = np.random.RandomState(0).randn(4, 8, 8, 3).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "widths", "expected"),
    [
        ("rir_18_wide", (48, 96, 192), 9_469_940),
        ("resnet_init_18_wide", (48, 96, 192), 9_469_940),
        ("rir_18", (8, 16, 32), 265_060),
    ],
)
def test_count_by_hand(name, widths, expected):
    """Two stems, 4 + 6 + 6 units with four 3x3 and two norms each, the 1x1 head and its norm."""
    a, b, c = widths
    stem = 2 * (9 * 3 * a + 2 * a)
    convs = 4 * 9 * (4 * a * a + a * b + 5 * b * b + b * c + 5 * c * c)
    norms = 2 * 2 * (4 * a + 6 * b + 6 * c)
    head = 2 * c * 10 + 2 * 10
    assert stem + convs + norms + head == expected
    assert PUBLISHED[name].params == expected
    if widths[0] == 48:  # pytorchcv has 1x1 projections without norm where widths change
        assert expected + a * b + b * c == 9_492_980


def test_output_shape_of_each_stage():
    for size in (32, 29):
        half, quarter = -(-size // 2), -(-size // 4)
        out, shapes = capture_shapes("rir_18_wide", size)
        assert out.shape == (2, 10)
        assert shapes["stem_r"] == shapes["stem_t"] == (2, size, size, 48)
        assert shapes["stage1/block2/unit2/t_to_r"] == (2, size, size, 48)
        assert shapes["stage2/block1/unit1/r_to_r"] == (2, half, half, 96)
        assert shapes["stage3/block3/unit2/norm_t"] == (2, quarter, quarter, 192)
        assert shapes["head"] == (2, quarter, quarter, 10)


CONV = partial(layers.Conv, use_bias=False)
NORM = layers.make_norm("none", train=True)


def test_the_unit_is_equation_1():
    """With 3x3 kernels that are 0 except in the center, a convolution is a matrix product."""
    rng = np.random.RandomState(1)
    r, t = (rng.randn(2, 4, 4, 3).astype(np.float32) for _ in range(2))
    W = {name: rng.randn(3, 5) for name in ("r_to_r", "t_to_r", "r_to_t", "t_to_t")}
    kernels = {name: {"kernel": np.zeros((3, 3, 3, 5), np.float32)} for name in W}
    for name, matrix in W.items():
        kernels[name]["kernel"][1, 1] = matrix
    actual = Unit(5, CONV, NORM, stride=2).apply({"params": kernels}, (r, t))
    r, t = r[:, ::2, ::2], t[:, ::2, ::2]
    shortcut = np.pad(r, [(0, 0), (0, 0), (0, 0), (0, 2)])
    expected = r @ W["r_to_r"] + t @ W["t_to_r"] + shortcut, r @ W["r_to_t"] + t @ W["t_to_t"]
    for ours, theirs in zip(actual, expected):
        np.testing.assert_allclose(ours, np.maximum(theirs, 0), atol=1e-5)


def test_the_shortcuts_inside_and_around():
    """With zero kernels a unit keeps r and drops t, and the block adds its input r once more."""
    r, t = np.abs(IMAGES), np.ones_like(IMAGES)
    for nested in (True, False):
        block = Block(4, CONV, NORM, nested, stride=2)
        shapes = jax.eval_shape(block.init, jax.random.key(0), (r, t))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
        residual, transient = block.apply(zeros, (r, t))
        kept = (2 if nested else 1) * r[:, ::2, ::2]
        np.testing.assert_allclose(residual[..., :3], kept, atol=1e-6)
        np.testing.assert_array_equal(residual[..., 3:], 0)
        np.testing.assert_array_equal(transient, 0)


def test_the_head_is_a_normalized_1x1_and_a_mean():
    model = create_model("rir_18", **TINY)
    variables = init_variables(model, jax.random.key(0))
    flat = pytree.flatten(variables)
    flat["batch_stats/head_norm/mean"] = np.arange(10, dtype=np.float32)
    flat["params/head_norm/scale"] = 2 * np.ones(10, np.float32)
    variables = pytree.unflatten(flat)
    features = jax.jit(model.clone(num_classes=None).apply)(variables, IMAGES)
    assert features.shape == (4, 12)
    expected = 2 * (features @ flat["params/head/kernel"][0, 0] - np.arange(10)) / np.sqrt(1 + 1e-5)
    np.testing.assert_allclose(jax.jit(model.apply)(variables, IMAGES), expected, atol=1e-4)


def test_training_moves_every_statistic():
    model = create_model("rir_18", **TINY)
    variables = init_variables(model, jax.random.key(0))
    step = jax.jit(partial(model.apply, train=True, mutable=["batch_stats"]))
    moved = pytree.flatten(step(variables, IMAGES)[1])
    for path, before in pytree.flatten({"batch_stats": variables["batch_stats"]}).items():
        assert (moved[path] != before).any(), path


def test_scanned_networks_take_stacked_variables():
    model = create_model("rir_18", **TINY | dict(depths=(1, 4)), scan=True, remat=True)
    variables = jax.eval_shape(partial(init_variables, model), jax.random.key(0))
    stacked = pytree.stack_blocks(variables)
    assert any("block2-4" in path for path in pytree.flatten(stacked))
    apply = partial(model.apply, train=True, mutable=["batch_stats"])
    logits, state = jax.eval_shape(apply, stacked, IMAGES)
    expected, named = jax.eval_shape(apply, variables, IMAGES)
    assert logits == expected
    assert state == pytree.stack_blocks(named)


def test_bfloat16_and_other_norms():
    out, _ = capture_shapes("rir_18", 8, **TINY, dtype="bfloat16")
    assert out.dtype == jnp.float32
    for norm in ("layer", "none"):
        shapes = jax.eval_shape(
            partial(init_variables, create_model("rir_18", **TINY, norm=norm)), jax.random.key(0)
        )
        assert shapes["batch_stats"] == {}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(norm="group"), "expected a multiple of 16 channels"),
        (dict(widths=(4,)), "a depth and a width for each stage"),
        (dict(widths=(6, 4)), "shortcut A cannot drop channels"),
    ],
)
def test_errors(fields, message):
    model = create_model("rir_18", **TINY | fields)
    with pytest.raises(UserError, match=message):
        jax.eval_shape(partial(init_variables, model), jax.random.key(0))
