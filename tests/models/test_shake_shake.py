"""Shake-Shake networks: counts by hand, shapes, the two flows of a shortcut in closed form."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns import tree as pytree
from flax_cnns.errors import UserError
from flax_cnns.models.registry import create_model, init_variables, list_models
from tests.models.counting import count_params
from tests.models.published import PUBLISHED
from tests.models.shapes import capture_shapes, cost_of

TINY = dict(depths=(1, 3), width=4, input_size=(8, 8, 3))
IMAGES = np.random.RandomState(0).randn(4, 8, 8, 3).astype(np.float32)


@pytest.fixture(scope="module")
def variables():
    return init_variables(create_model("shakeshake_26_2x32d", **TINY), jax.random.key(0))


def convolutions(width):
    """Yields (kernel size, input channels, output channels, map size) of each convolution."""
    yield 3, 3, 16, 32
    channels = 16
    for stage in range(3):
        out, side = width * 2**stage, 32 // 2**stage
        for first in [channels] + 3 * [out]:
            for _ in range(2):  # branches
                yield 3, first, out, side
                yield 3, out, out, side
        yield 1, channels, out // 2, side  # the two flows
        yield 1, channels, out // 2, side
        channels = out


def by_hand(width, classes=10):
    """Returns (parameters, multiply-adds) of convolutions, the norms after them, and the head."""
    norms = 2 * 16 + sum(2 * (4 * 4 + 1) * width * 2**stage for stage in range(3))
    weights = sum(k * k * i * o for k, i, o, _ in convolutions(width))
    macs = sum(k * k * i * o * side**2 for k, i, o, side in convolutions(width))
    return weights + norms + 4 * width * classes + classes, macs + 4 * width * classes


def test_counts():
    """The counts in the paper's text are 2.9, 11.7 and 26.2 M; these and 2x112d's are exact."""
    published = {32: 2_923_162, 64: 11_653_978, 96: 26_192_922, 112: 35_640_442}
    for width, count in published.items():
        assert by_hand(width)[0] == count
        assert PUBLISHED[f"shakeshake_26_2x{width}d"].params == count
    assert len(list_models("shakeshake*")) == len(published)
    # google-research/sam, sam_jax/models/load_model_test.py: 2x96d for 100 classes.
    model = create_model("shakeshake_26_2x96d", num_classes=100)
    assert count_params(model) == by_hand(96, 100)[0] == 26_227_572


@pytest.mark.parametrize("width", [32, 96])
def test_macs(width):
    actual = cost_of(f"shakeshake_26_2x{width}d").macs
    assert actual == by_hand(width)[1]


@pytest.mark.parametrize("size", [32, 29])
def test_output_shape_of_each_stage(size):
    logits, shapes = capture_shapes("shakeshake_26_2x96d", size)
    half, quarter = -(-size // 2), -(-size // 4)
    for name, expected in {
        "stem": (2, size, size, 16),
        "stage1": (2, size, size, 96),
        "stage1/block4": (2, size, size, 96),
        "stage2/block1/projection1": (2, half, half, 96),
        "stage2/block1/projection2": (2, half, half, 96),
        "stage2": (2, half, half, 192),
        "stage3/block2/branch1/conv1": (2, quarter, quarter, 384),
        "stage3": (2, quarter, quarter, 384),
    }.items():
        assert shapes[name] == expected
    assert sum(name.rpartition("/")[2].startswith("conv") for name in shapes) == 1 + 2 * 24
    assert (logits.shape, logits.dtype) == ((2, 10), jnp.float32)


def test_paths(variables):
    flat = pytree.flatten(variables)
    assert flat["params/stem/conv/kernel"].shape == (3, 3, 3, 16)
    assert flat["params/stage1/block1/branch2/conv1/kernel"].shape == (3, 3, 16, 4)
    assert flat["params/stage2/block1/projection1/kernel"].shape == (1, 1, 4, 4)
    assert flat["params/stage2/block1/projection_norm/scale"].shape == (8,)
    assert flat["batch_stats/stage2/block2/branch1/norm2/mean"].shape == (8,)
    assert flat["params/head/kernel"].shape == (8, 10)
    assert not any("stage2/block2/projection" in path for path in flat)  # the identity


def test_initial_values_are_those_of_the_released_code():
    """N(0, 2 / fan_out) for kernels; norms as the identity; the head's bias zero."""
    model = create_model("shakeshake_26_2x32d", depths=(1, 1, 1))
    flat = pytree.flatten(init_variables(model, jax.random.key(0))["params"])
    for path in ("stage3/block1/branch1/conv1", "stage3/block1/projection2"):
        kernel = flat[f"{path}/kernel"]
        fan_out = kernel.shape[0] * kernel.shape[1] * kernel.shape[3]
        assert kernel.std() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
    assert (flat["head/bias"] == 0).all()


def test_the_second_flow_sees_the_pixels_between_those_of_the_first():
    """The shift is one pixel right and down: for row i the flows see rows 2i and 2i - 1.

    With zero branches and projections that return channel 0, the output shows both flows.
    """
    model = create_model("shakeshake_26_2x32d", **TINY, zero_init=True)
    params = init_variables(model, jax.random.key(0))
    flat = pytree.flatten(params)
    for i in (1, 2):
        path = f"params/stage2/block1/projection{i}/kernel"
        flat[path] = jnp.zeros_like(flat[path]).at[:, :, 0, 0].set(1)
    names = ("stage1", "stage2/block1")
    wanted = lambda module, _: "/".join(module.path) in names  # noqa: E731
    run = partial(model.apply, capture_intermediates=wanted, mutable="intermediates")
    _, state = jax.jit(run)(pytree.unflatten(flat), IMAGES)
    x = np.asarray(state["intermediates"]["stage1"]["__call__"][0])[..., 0]
    out = np.asarray(state["intermediates"]["stage2"]["block1"]["__call__"][0])
    x = np.maximum(x, 0) / np.sqrt(1 + 1e-5)  # the norm's running variance is 1
    np.testing.assert_allclose(out[..., 0], x[:, ::2, ::2], rtol=1e-5, atol=1e-6)
    second = out[..., 4]
    np.testing.assert_allclose(second[:, 1:, 1:], x[:, 1:-1:2, 1:-1:2], rtol=1e-5, atol=1e-6)
    assert (second[:, 0] == 0).all()
    assert (second[:, :, 0] == 0).all()


def logits_of(variables, rngs=None, train=True, **fields):
    model = create_model("shakeshake_26_2x32d", **TINY, **fields)

    def run(variables):
        out, state = model.apply(
            variables, IMAGES, train=train, mutable=["batch_stats"], rngs=rngs or {}
        )
        return out, state["batch_stats"]

    return jax.device_get(jax.jit(run)(variables))


def test_modes(variables):
    """Training draws from its random streams, and equal keys give equal results. With "even" the
    forward pass mixes the branches as in evaluation, for every backward mode."""
    rngs = {"dropout": jax.random.key(1), "shared": jax.random.key(2)}
    shaken, stats = logits_of(variables, rngs)
    np.testing.assert_array_equal(shaken, logits_of(variables, rngs)[0])
    even, _ = logits_of(variables, forward="even", backward="even")
    assert np.abs(shaken - even).max() > 1e-3
    actual, _ = logits_of(variables, rngs, forward="even", level="batch")
    np.testing.assert_allclose(actual, even, rtol=1e-5, atol=1e-5)
    before = pytree.flatten(variables["batch_stats"])
    assert all((leaf != before[path]).any() for path, leaf in pytree.flatten(stats).items())


@pytest.mark.parametrize("fields", [dict(scan=True), dict(remat=True)])
def test_scan_and_remat_shake_the_same(variables, fields):
    rngs = {"dropout": jax.random.key(1)}
    given = pytree.stack_blocks(variables) if "scan" in fields else variables
    actual, _ = logits_of(given, rngs, **fields)
    np.testing.assert_allclose(actual, logits_of(variables, rngs)[0], rtol=1e-4, atol=1e-4)


def test_evaluation_is_deterministic_and_has_no_use_for_keys(variables):
    model = create_model("shakeshake_26_2x32d", **TINY)
    out = model.apply(variables, IMAGES)
    np.testing.assert_array_equal(out, model.apply(variables, IMAGES))
    features = create_model("shakeshake_26_2x32d", **TINY, num_classes=None)
    assert features.apply(variables, IMAGES).shape == (4, 8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(forward="shaken"), "did you mean 'shake'"),
        (dict(backward="kept"), "did you mean 'keep'"),
        (dict(level="pixel"), "unknown level 'pixel'; known: batch, image"),
    ],
)
def test_errors(fields, message):
    model = create_model("shakeshake_26_2x32d", **(TINY | fields))
    with pytest.raises(UserError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), IMAGES)


def test_a_missing_stream_is_reported(variables):
    with pytest.raises(UserError, match=r'rngs=\{"dropout": key\}'):
        logits_of(variables)
