"""Which mistakes a page shows, and the page of the shared run."""

from __future__ import annotations

import re

import flax.linen as nn
import jax
import numpy as np
import pytest

from flax_cnns.errors import UserError
from flax_cnns.evaluation.predictions import Predictions
from flax_cnns.runs import error_page
from flax_cnns.runs.classifier import make_classifier_from_run, predict_split
from flax_cnns.runs.evaluate import evaluate_run

LOGITS = np.log(
    [[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.2, 0.2, 0.6], [0.05, 0.9, 0.05], [0.35, 0.55, 0.1]]
)
LABELS = np.array([1, 1, 0, 0, 0])


def test_the_worst_mistake_is_the_most_confident_one():
    found = Predictions(LOGITS.astype(np.float32), LABELS)
    assert error_page.find_worst(found, 10).tolist() == [3, 0, 2, 4]
    assert error_page.find_worst(found, 2).tolist() == [3, 0]
    assert error_page.find_confused(found, 2) == [(0, 1, 2, 3), (0, 2, 1, 3)]
    right = Predictions(LOGITS.astype(np.float32), LOGITS.argmax(-1))
    assert error_page.find_worst(right, 5).tolist() == []
    assert error_page.find_confused(right, 5) == []


@pytest.mark.parametrize(
    ("task", "count", "said"),
    [
        ("multilabel", 5, "multilabel data have no single wrong class"),
        ("classes", 0, "expected 1 to 500 images, got 0"),
        ("classes", 501, "expected 1 to 500 images, got 501"),
    ],
)
def test_what_has_no_page(task, count, said):
    with pytest.raises(UserError, match=f"--errors: {said}"):
        error_page.check_error_page(task, count)


def test_floats_and_other_channels_are_shown():
    ramp = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4, 1)
    assert error_page._show_pixels(ramp, True).ravel()[[0, -1]].tolist() == [0, 255]
    assert error_page._show_pixels(ramp / 2, True).max() == 128
    assert error_page._show_pixels(40 * ramp - 7, False).ravel()[[0, -1]].tolist() == [0, 255]
    two = np.stack([np.full((4, 4), 10), np.full((4, 4), 20)], -1).astype(np.uint8)
    assert (error_page._show_pixels(two, True) == 15).all()
    assert error_page._show_pixels(two, True).shape == (4, 4, 1)


def test_the_page_of_a_run(finished, capsys, monkeypatch):
    folder = finished[0]
    evaluate_run(folder, errors=7)
    text = (folder / "errors_test_12.html").read_text()
    assert re.search(r"errors_test_12\.html \(7 of \d+ mistakes, \d+ kB\)", capsys.readouterr().out)
    classifier = make_classifier_from_run(folder)
    predictions = predict_split(classifier)
    worst = error_page.find_worst(predictions, 7)
    shown = re.findall(r'data-true="(\d)" data-predicted="(\d)"><h3>.*?image (\d+)<', text)
    classes, predicted = predictions.classes, predictions.logits.argmax(-1)
    assert shown == [(str(classes[i]), str(predicted[i]), str(i)) for i in worst]
    assert f"{100 * predictions.probabilities[worst[0]].max():.1f} %" in text
    assert f"accuracy {finished[1]['test/accuracy']:.2%} [" in text
    assert "Saliency: Grad-CAM at s4." in text
    assert "Predictions:" not in text
    maps = "none", np.zeros((2, 32, 32), np.float32)
    monkeypatch.setattr(error_page, "explain_classes", lambda *_: maps)
    page = folder / "other.html"
    options = dict(count=2, protocol="crops10")
    assert error_page.write_errors(classifier, predictions, "test", page, **options).startswith(
        "other.html (2 of"
    )
    assert "Predictions: crops10; the images below are the plain ones." in page.read_text()
    right = predictions._replace(labels=predicted.astype(np.int32))
    assert "other.html (0 of 0" in error_page.write_errors(classifier, right, "test", page)
    assert "There are no mistakes." in page.read_text()
    assert "Saliency:" not in page.read_text()


class Dense(nn.Module):
    @nn.compact
    def __call__(self, images, *, train):
        return nn.Dense(3)(images.reshape(len(images), -1))


def test_without_maps_the_saliency_is_the_gradient(finished):
    """The gradient of a class of a linear network is its column of the kernel."""
    model, images = Dense(), np.zeros((40, 4, 4, 1), np.uint8)
    variables = model.init(jax.random.key(0), images.astype(np.float32), train=False)
    classifier = make_classifier_from_run(finished[0])._replace(
        model=model, variables=variables, normalize=lambda images: images / 255
    )
    classes = np.arange(40) % 3
    name, maps = error_page.explain_classes(classifier, images, classes)
    assert name.startswith("gradient")
    kernel = np.abs(np.asarray(variables["params"]["Dense_0"]["kernel"]))
    wanted = (kernel / kernel.max(0)).T.reshape(3, 4, 4)
    np.testing.assert_allclose(maps, wanted[classes], rtol=1e-5)
