"""PyramidNets: widths and counts by hand, shortcuts in closed form, ShakeDrop, stochastic depth."""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns import layers
from flax_cnns import tree as pytree
from flax_cnns.errors import UserError
from flax_cnns.models.pyramidnet import Bottleneck, shortcut
from flax_cnns.models.registry import create_model, init_variables
from tests.models.published import PUBLISHED
from tests.models.shapes import capture_shapes

TINY = dict(depth=8, alpha=9, input_size=(8, 8, 3))  # one block per stage, with 19, 22, 25 channels
IMAGES = np.random.RandomState(0).randn(4, 8, 8, 3).astype(np.float32)


def make(name="pyramidnet_110_a48", **fields):
    return create_model(name, **(TINY | fields))


@pytest.fixture(scope="module")
def variables():
    return init_variables(make(), jax.random.key(0))


def by_hand(units, alpha, bottleneck=False, classes=10, extra=0):
    """Returns (parameters, last width) of section 2.2, in integer arithmetic.

    `extra` is added to the numerator before the division that rounds down.
    """
    before, total = 16, 3 * 3 * 3 * 16 + 2 * 16
    for k in range(1, units + 1):
        width = 16 + (alpha * k + extra) // units
        if bottleneck:
            total += before * width + 9 * width**2 + 4 * width**2
            total += 2 * (
                before + width + width + 4 * width
            )  # a norm before each convolution and after the last
            before = 4 * width
        else:
            total += 9 * before * width + 9 * width**2 + 2 * (before + width + width)
            before = width
    return total + 2 * before + before * classes + classes, before


COUNTS = {  # count and feature dimension in table 4
    "pyramidnet_110_a48": (1.7e6, 64),
    "pyramidnet_110_a84": (3.8e6, 100),
    "pyramidnet_110_a270": (28.3e6, 286),
    "pyramidnet_110_a270_shakedrop": (28.3e6, 286),
    "pyramidnet_272_a200": (26.0e6, 864),
    "pyramidnet_272_a200_rounded": (26.0e6, 864),
    "pyramidnet_272_a200_shakedrop": (26.0e6, 864),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name):
    exact, (printed, features) = PUBLISHED[name].params, COUNTS[name]
    alpha = int(name.split("_")[2][1:])
    units, bottleneck = (90, True) if "272" in name else (54, False)
    extra = units // 2 if "rounded" in name else 0
    assert by_hand(units, alpha, bottleneck, extra=extra) == (exact, features)
    assert exact == pytest.approx(printed, rel=0.025)  # table 4 truncates 3.855 to 3.8


def test_what_others_count_with_rounded_widths():
    """The counts are those of google-research/sam, sam_jax/models/load_model_test.py, with 100
    classes, and of pytorchcv's pyramidnet110_a48, with 10."""
    assert by_hand(90, 200, True, 100, extra=45)[0] == 26_288_692
    assert by_hand(54, 48, extra=27)[0] == 1_772_706
    nearest = create_model("pyramidnet_110_a48", rounding="nearest").compute_widths()
    assert [width for stage in nearest for width in stage] == [
        16 + (48 * k + 27) // 54 for k in range(1, 55)
    ]


@pytest.mark.parametrize("alpha", [48, 84, 270, 0, 7.5])
def test_widths_grow_without_errors_of_rounding(alpha):
    """If equation 2 were a sum of floats, alpha 48 would lose a channel in four blocks."""
    stages = create_model("pyramidnet_110_a48", alpha=alpha).compute_widths()
    assert [len(stage) for stage in stages] == [18, 18, 18]
    assert [width for stage in stages for width in stage] == [
        16 + int(2 * alpha) * k // 108 for k in range(1, 55)
    ]


def test_output_shape_of_each_stage():
    logits, shapes = capture_shapes("pyramidnet_272_a200", 32, depth=29)
    for name, expected in {  # 9 units: 16 + 200 k / 9
        "stem": (2, 32, 32, 16),
        "stage1/block1/norm1": (2, 32, 32, 16),
        "stage1/block1/conv1": (2, 32, 32, 38),
        "stage1": (2, 32, 32, 4 * 82),
        "stage2/block1/conv1": (2, 32, 32, 104),
        "stage2/block1/conv2": (2, 16, 16, 104),
        "stage2": (2, 16, 16, 4 * 149),
        "stage3": (2, 8, 8, 4 * 216),
        "norm": (2, 8, 8, 864),
    }.items():
        assert shapes[name] == expected
    assert (logits.shape, logits.dtype) == ((2, 10), jnp.float32)
    _, shapes = capture_shapes("pyramidnet_110_a48", 29, depth=8)
    assert [shapes[f"stage{i}"] for i in (1, 2, 3)] == [
        (2, 29, 29, 32),
        (2, 15, 15, 48),
        (2, 8, 8, 64),
    ]


def test_paths(variables):
    flat = pytree.flatten(variables)
    assert flat["params/stem/conv/kernel"].shape == (3, 3, 3, 16)
    assert flat["params/stage1/block1/conv1/kernel"].shape == (3, 3, 16, 19)
    assert flat["params/stage2/block1/conv2/kernel"].shape == (3, 3, 22, 22)
    assert flat["params/stage3/block1/norm1/scale"].shape == (22,)
    assert flat["params/stage3/block1/norm3/scale"].shape == (25,)
    assert flat["batch_stats/norm/mean"].shape == (25,)
    assert flat["params/head/kernel"].shape == (25, 10)


def test_the_shortcut_is_a_mean_of_four_and_zeros():
    x = IMAGES[:, :7, :8]
    actual = np.asarray(shortcut(jnp.asarray(x), 5, 2))
    assert actual.shape == (4, 4, 4, 5)
    np.testing.assert_allclose(actual[:, 1, 2, :3], x[:, 2:4, 4:6].mean((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(actual[:, 3, 2, :3], x[:, 6:7, 4:6].mean((1, 2)), rtol=1e-5)
    np.testing.assert_array_equal(actual[..., 3:], 0)
    np.testing.assert_array_equal(shortcut(jnp.asarray(x), 3, 1), x)


def test_with_branches_at_zero_only_shortcuts_are_left():
    """A closed form: a norm ends each branch, and no ReLU follows the sum."""
    model = make(zero_init=True, num_classes=None)
    stem = lambda module, _: module.name == "stem"  # noqa: E731
    run = partial(model.apply, capture_intermediates=stem, mutable="intermediates")
    features, state = jax.jit(run)(init_variables(model, jax.random.key(0)), IMAGES)
    x = np.asarray(state["intermediates"]["stem"]["__call__"][0])
    assert (x < 0).any()  # no ReLU in the stem
    x = x.reshape(4, 2, 4, 2, 4, 16).mean((2, 4)) / np.sqrt(1 + 1e-5)
    np.testing.assert_allclose(features[:, :16], np.maximum(x, 0).mean((1, 2)), atol=1e-5)
    np.testing.assert_array_equal(features[:, 16:], 0)


@cache
def training(**fields):
    """Compiles (variables, key) -> logits, statistics and gradients of a network."""
    model = make(**fields)

    def run(variables, key):
        rngs = {"shared": key, "dropout": jax.random.fold_in(key, 1)}

        def loss(params):
            given = {**variables, "params": params}
            out, new = model.apply(given, IMAGES, train=True, mutable=["batch_stats"], rngs=rngs)
            return jnp.sum(out**2), (out, new["batch_stats"])

        (_, (out, stats)), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        return {"out": out, "batch_stats": stats, "grads": grads}

    return jax.jit(run)


def trained(variables, key=1, **fields):
    return jax.device_get(training(**fields)(variables, jax.random.key(key)))


def test_shake_drop_follows_the_last_norm(variables):
    """In evaluation, scaling the output of each last norm by p_l is scaling its gamma and beta by
    p_l. Training with gates that are always p_l does the same."""
    scaled = dict(pytree.flatten(variables))
    for i in (1, 2, 3):
        p = 1 - i / 3 * 0.5
        for leaf in ("scale", "bias"):
            path = f"params/stage{i}/block1/norm3/{leaf}"
            scaled[path] = p * scaled[path]
    expected = jax.jit(make().apply)(pytree.unflatten(scaled), IMAGES)
    actual = jax.jit(make(shake_drop=0.5).apply)(variables, IMAGES)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(actual - jax.jit(make().apply)(variables, IMAGES)).max() > 1e-3


@pytest.mark.slow
def test_shake_drop_in_training(variables):
    """The result depends on the key. The statistics of every layer change, since every branch is
    computed. With a factor of 1 ShakeDrop changes nothing."""
    fields = dict(shake_drop=0.9)
    first, again, other = (trained(variables, key, **fields) for key in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert np.abs(first["out"] - other["out"]).max() > 1e-3
    before = pytree.flatten(variables["batch_stats"])
    assert all((v != before[k]).any() for k, v in pytree.flatten(first["batch_stats"]).items())
    one = trained(variables, shake_drop=0.9, shake_drop_alpha=(1, 1), shake_drop_beta=(1, 1))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), one, trained(variables))


@pytest.mark.slow
def test_remat_draws_the_same(variables):
    actual, expected = (trained(variables, shake_drop=0.9, **f) for f in (dict(remat=True), {}))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3), actual, expected)


def test_stochastic_depth_leaves_dropped_blocks_alone(variables):
    before = pytree.flatten(variables["batch_stats"])
    seen = set()
    for key in range(3):
        actual = trained(variables, key, drop_path=0.9)
        grads, stats = pytree.flatten(actual["grads"]), pytree.flatten(actual["batch_stats"])
        for i in (1, 2, 3):
            block = f"stage{i}/block1"
            ran = bool((stats[f"{block}/norm2/mean"] != before[f"{block}/norm2/mean"]).any())
            assert bool((grads[f"{block}/conv1/kernel"] != 0).any()) == ran
            seen.add(ran)
    assert seen == {True, False}


def test_shake_drop_rows_are_the_papers():
    model = create_model("pyramidnet_272_a200_shakedrop")
    assert (model.shake_drop, model.shake_drop_level) == (0.5, "image")
    assert (model.shake_drop_alpha, model.shake_drop_beta) == ((-1, 1), (0, 1))
    rates = layers.drop_rates(0.5, 90)
    np.testing.assert_allclose(rates[[0, -1]], [0.5 / 90, 0.5], rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(depth=100), "depth of 6n \\+ 2 for BasicBlock, got 100; the nearest are 98 and 104"),
        (dict(depth=2), "the nearest are 8 and 14"),
        (dict(depth=109, block=Bottleneck), "9n \\+ 2 for Bottleneck, got 109; .* 101 and 110"),
        (dict(alpha=-1), "of at least 0, got -1"),
        (dict(rounding="up"), "unknown rounding 'up'; known: down, nearest"),
        (dict(shake_drop=1.0), "0 to below 1, got 1.0"),
        (dict(drop_path_mode="batches"), "did you mean 'batch'"),
    ],
)
def test_errors(fields, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(make(**fields).init, jax.random.key(0), IMAGES)


def test_missing_streams_are_reported(variables):
    for stream, rngs in (("shared", {}), ("dropout", {"shared": jax.random.key(0)})):
        run = partial(make(shake_drop=0.5).apply, train=True, mutable=["batch_stats"], rngs=rngs)
        with pytest.raises(UserError, match=rf'rngs=\{{"{stream}": key\}}'):
            jax.eval_shape(run, variables, IMAGES)
