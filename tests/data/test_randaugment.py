"""RandAugment's operations compared with Pillow's, and how often each is drawn."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from flax_cnns.data import randaugment
from flax_cnns.data.randaugment import OPERATIONS

quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

RNG = np.random.default_rng(0)
# Values from 40, mostly dark, so that stretching and equalizing change many pixels.
RGB = (40 + 200 * RNG.beta(1, 3, (36, 31, 3))).astype(np.uint8)
GRAY = RGB[..., :1]
KEYS = jax.random.split(jax.random.key(0), 1000)

apply_operation = quick_jit(randaugment.apply_operation)


def ours(name, image, strength):
    out = apply_operation(image.astype(np.int32), OPERATIONS.index(name), strength)
    assert out.dtype == jnp.int32
    return np.asarray(out)


def mapped(image, coefficients):
    """Pillow's affine map: output (x, y) comes from (a x + b y + c, d x + e y + f)."""
    return image.transform(image.size, Image.Transform.AFFINE, coefficients)


PILLOW = {
    "identity": lambda image, s: image,
    "auto_contrast": lambda image, s: ImageOps.autocontrast(image),
    "equalize": lambda image, s: ImageOps.equalize(image),
    "posterize": lambda image, s: ImageOps.posterize(image, 8 - round(4 * s)),
    "solarize": lambda image, s: ImageOps.solarize(image, 255 * (1 - s)),
    "color": lambda image, s: ImageEnhance.Color(image).enhance(1 + 0.9 * s),
    "contrast": lambda image, s: ImageEnhance.Contrast(image).enhance(1 + 0.9 * s),
    "brightness": lambda image, s: ImageEnhance.Brightness(image).enhance(1 + 0.9 * s),
    "sharpness": lambda image, s: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * s),
    "shear_x": lambda image, s: mapped(image, (1, 0.3 * s, 0, 0, 1, 0)),
    "shear_y": lambda image, s: mapped(image, (1, 0, 0, 0.3 * s, 1, 0)),
    "translate_x": lambda image, s: mapped(image, (1, 0, 150 / 331 * s * image.width, 0, 1, 0)),
    "translate_y": lambda image, s: mapped(image, (1, 0, 0, 0, 1, 150 / 331 * s * image.height)),
    "rotate": lambda image, s: image.rotate(30 * s),
}
TWO_WAYS = OPERATIONS[OPERATIONS.index("color") :]


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("image", [RGB, GRAY], ids=["rgb", "gray"])
def test_an_operation_is_pillows(name, image):
    for strength in (0.3, 1.0) + ((-0.3, -1.0) if name in TWO_WAYS else ()):
        theirs = PILLOW[name](Image.fromarray(image.squeeze()), strength)
        theirs = np.asarray(theirs).reshape(image.shape).astype(int)
        off = np.abs(ours(name, image, strength) - theirs)
        if name in ("shear_x", "shear_y", "translate_x", "translate_y", "rotate"):
            assert (off > 0).any(-1).mean() < 0.02  # a point halfway between two pixels
        else:
            assert off.max() <= 1  # a float product just below an integer
            assert (off > 0).mean() < 0.02
        if name != "identity" and not (name == "color" and image is GRAY):
            assert (theirs != image).any()


@pytest.mark.parametrize("name", OPERATIONS)
def test_at_strength_0_only_operations_without_a_strength_change_the_image(name):
    same = (ours(name, RGB, 0.0) == RGB).all()
    assert same == (name not in ("auto_contrast", "equalize"))


@pytest.mark.parametrize("name", ["auto_contrast", "equalize"])
def test_an_image_of_one_color_stays(name):
    np.testing.assert_array_equal(ours(name, np.full_like(RGB, 77), 0.5), 77)


def test_each_operation_has_equal_chances_and_both_signs():
    """The result reveals the operation, because each operation changes this image differently."""

    def draw(key):
        return randaugment.randaugment(key, RGB, 1, 30)

    results = np.asarray(quick_jit(jax.vmap(draw))(KEYS)).reshape(len(KEYS), -1)
    outcomes, counts = np.unique(results, axis=0, return_counts=True)
    shares = dict(zip(map(bytes, outcomes.astype(np.uint8)), counts / len(KEYS)))
    for name in OPERATIONS:
        signs = (1.0, -1.0) if name in TWO_WAYS else (1.0,)
        for sign in signs:
            share = shares.pop(bytes(ours(name, RGB, sign).astype(np.uint8)))
            assert abs(share * len(signs) - 1 / 14) < 0.035, name
    assert not shares


def test_two_operations_follow_one_another():
    two = np.asarray(
        quick_jit(jax.vmap(lambda key: randaugment.randaugment(key, RGB, 2, 15)))(KEYS[:300])
    )
    assert (two == RGB).all((1, 2, 3)).mean() < 0.03  # two identities: 1/196; one: 1/14
    outcomes = len(np.unique(two.reshape(300, -1), axis=0))
    assert outcomes > len(OPERATIONS) + len(TWO_WAYS)  # more than a single operation could make
    assert (two == np.round(two)).all()
    assert two.min() >= 0
    assert two.max() <= 255


@pytest.mark.parametrize(("pixels", "moved"), [(1.45, 1), (2.9, 3)])
def test_a_translation_takes_the_nearest_pixel(pixels, moved):
    """As in Pillow; in torchvision 2.9 pixels become 2."""
    row = jnp.broadcast_to(jnp.arange(1, 33)[None, :, None], (2, 32, 1))
    strength = jnp.float32(pixels / (150 / 331 * 32))
    shifted = apply_operation(row, jnp.int32(OPERATIONS.index("translate_x")), strength)
    assert int(shifted[0, 0, 0]) == 1 + moved
