"""Feature visualization and DeepDream: the formulas in NumPy, and what they promise."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns.analysis.visualize.deep_dream import deep_dream
from flax_cnns.analysis.visualize.objectives import Objective, diversity
from flax_cnns.analysis.visualize.optimize import visualize
from flax_cnns.analysis.visualize.parameters import draw_parameters, make_images
from flax_cnns.errors import UserError


class Tiny(nn.Module):
    input_size: tuple = (16, 12, 3)

    @nn.compact
    def __call__(self, images, *, train=False):
        x = nn.relu(nn.Conv(6, (3, 3), name="conv")(images))
        return nn.Dense(4, name="head")(x.mean((1, 2)))


def normalize(images):
    return (images - 0.5) / 0.25


@pytest.fixture(scope="module")
def tiny():
    return Tiny(), Tiny().init(jax.random.key(0), jnp.ones((1, 16, 12, 3)))


def test_fourier_images_are_lucids_formula():
    size, key = (6, 9), jax.random.key(1)
    parameters = 30 * draw_parameters(key, 2, size, 3)
    spectrum = np.asarray(parameters[..., 0]) + 1j * np.asarray(parameters[..., 1])
    for row in range(6):
        for column in range(5):
            f = np.hypot((row if row < 3 else row - 6) / 6, column / 9)
            spectrum[:, row, column] *= np.sqrt(6 * 9) / max(f, 1 / 9)
    raw = np.fft.irfft2(spectrum, size, axes=(1, 2)) / 4
    root = np.array([[0.26, 0.09, 0.02], [0.27, 0.0, -0.05], [0.27, -0.09, 0.03]])
    largest = max(np.sqrt((root[:, i] ** 2).sum()) for i in range(3))
    wanted = 1 / (1 + np.exp(-np.einsum("nhwc,dc->nhwd", raw, root / largest)))
    found = make_images(parameters, size)
    assert found.shape == (2, 6, 9, 3)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert found.std() > 0.05  # not gray
    gray = make_images(draw_parameters(key, 1, size, 1, "pixels"), size, "pixels")
    assert gray.shape == (1, 6, 9, 1)
    assert abs(gray - 0.5).max() < 0.02


@pytest.mark.parametrize(
    ("objective", "wanted"),
    [
        (Objective("conv", 2), lambda a: a[..., 2].mean((1, 2))),
        (Objective("conv", 2, "neuron"), lambda a: a[:, 2, 3, 2]),
        (
            Objective("conv", kind="direction", vector=(0, 1, 2, 0, 0, 0)),
            lambda a: (a[..., 1] + 2 * a[..., 2]).mean((1, 2)),
        ),
    ],
)
def test_objectives_by_hand(objective, wanted):
    maps = np.random.default_rng(0).normal(size=(3, 4, 6, 6)).astype(np.float32)
    found = objective.measure(jnp.asarray(maps))
    np.testing.assert_allclose(found, wanted(maps), rtol=1e-5, atol=1e-6)


def test_a_logit_rises_in_spite_of_transformations(tiny):
    model, variables = tiny
    given = dict(key=jax.random.key(2), normalize=normalize)
    start = visualize(*tiny, Objective("", 3), **given, steps=1)
    found = visualize(*tiny, Objective("", 3), **given, steps=20)
    assert found.images.shape == (1, 16, 12, 3)
    assert 0 <= found.images.min() <= found.images.max() <= 1
    logits = model.apply(variables, normalize(found.images))
    np.testing.assert_allclose(found.scores, logits[:, 3], rtol=1e-4, atol=1e-5)
    assert found.scores[0] > start.scores[0]
    again = visualize(*tiny, Objective("", 3), **given, steps=20)
    np.testing.assert_array_equal(again.images, found.images)


def test_diversity_is_one_for_equal_images():
    same = jnp.ones((2, 3, 3, 4))
    assert diversity(same) == pytest.approx(1.0)
    assert diversity(same[:1]) == 0


@pytest.mark.slow
def test_diversity_makes_images_differ(tiny):
    given = dict(key=jax.random.key(2), normalize=normalize, count=3, steps=20, robust=False)
    alike = []
    for weight in (0.0, 30.0):
        found = visualize(*tiny, Objective("conv", 2), **given, diverse=weight)
        _, state = Tiny().apply(
            tiny[1], normalize(found.images), capture_intermediates=True, mutable=["intermediates"]
        )
        alike.append(float(diversity(state["intermediates"]["conv"]["__call__"][0])))
    assert alike[1] < alike[0]


def test_units_share_one_program(tiny):
    traces = []

    def counted(images):
        traces.append(images.shape)
        return normalize(images)

    given = dict(key=jax.random.key(2), normalize=counted, steps=2, robust=False)
    scores = [visualize(*tiny, Objective("conv", unit), **given).scores[0] for unit in (1, 2)]
    assert scores[0] != scores[1]
    assert len(traces) == 2  # a step; the last images
    image = jnp.ones((16, 12, 3)) / 2
    given = dict(key=jax.random.key(2), normalize=counted, octaves=1, steps=2)
    dreams = [deep_dream(*tiny, image, "conv", unit=unit, **given) for unit in (1, 2)]
    assert not np.allclose(*dreams)
    assert len(traces) == 3


def test_deep_dream_raises_its_layer(tiny):
    kernel = tiny[1]["params"]["conv"]
    image = jax.random.uniform(jax.random.key(5), (40, 33, 3))
    given = dict(key=jax.random.key(1), normalize=normalize, octaves=2, steps=3, tile=16)
    found = deep_dream(*tiny, image, "conv", **given)
    assert found.shape == image.shape
    before, after = (
        (nn.Conv(6, (3, 3)).apply({"params": kernel}, normalize(each)) ** 2).mean()
        for each in (image, found)
    )
    assert after > before * 1.05
    np.testing.assert_array_equal(deep_dream(*tiny, image, "conv", **given), found)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda *a, **k: visualize(*a, Objective("con"), **k), "no module 'con'; did you mean 'co"),
        (lambda *a, **k: visualize(*a, Objective("conv", 6), **k), "unit 6 .*6 channels, 0 to 5"),
        (
            lambda *a, **k: visualize(*a, Objective("conv", kind="direction", vector=(1,)), **k),
            "6 channels, the direction has 1",
        ),
        (
            lambda *a, **k: visualize(*a, Objective("", kind="neuron"), **k),
            "the network's output has no maps, so a neuron is a channel",
        ),
        (
            lambda *a, **k: visualize(*a, Objective("conv", kind="chanel"), **k),
            "unknown objective 'chanel'; did you mean 'channel'",
        ),
        (
            lambda *a, **k: visualize(*a, Objective("conv"), **k, kind="pixel"),
            "unknown parameters 'pixel'; did you mean 'pixels'",
        ),
        (lambda *a, **k: visualize(*a, Objective("conv"), **k, steps=0), "at least 1 .*, got 0, 1"),
        (lambda *a, **k: deep_dream(*a, jnp.ones((9, 9, 3)), "cnv", **k), "no module 'cnv'"),
        (
            lambda *a, **k: deep_dream(*a, jnp.ones((9, 9, 3)), "conv", unit=6, **k),
            "unit 6 is out of range",
        ),
        (
            lambda *a, **k: deep_dream(*a, jnp.ones((9, 9, 3)), "conv", octaves=12, **k),
            "9x9 pixels is 0x0 in the first of 12 octaves",
        ),
    ],
)
def test_what_cannot_be_shown_is_one_line(tiny, call, message):
    with pytest.raises(UserError, match=message):
        call(*tiny, key=jax.random.key(0), normalize=normalize)
