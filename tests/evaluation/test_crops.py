"""Boxes of crops by hand, and that networks see the crops' own pixels."""

from __future__ import annotations

import json
import shutil
from collections import Counter

import jax
import numpy as np
import pytest
from PIL import Image

from flax_cnns import create_model, init_variables
from flax_cnns.data.images import read_box
from flax_cnns.errors import UserError
from flax_cnns.evaluation.crops import CropGroup, View, list_views, make_protocol
from flax_cnns.evaluation.dense import make_dense_apply
from flax_cnns.runs import classifier as classifiers
from flax_cnns.runs.crops import CropOptions, predict_crops
from flax_cnns.runs.evaluate import evaluate_run


def boxes(crops, width, height, **options):
    return [view.box(width, height) for view in list_views(crops, **options)]


def test_alexnets_ten_crops_of_a_landscape():
    """512 x 256: the central square is 128..384; 224 of its 256 pixels, so 32 pixels are left."""
    found = boxes("10", 512, 256)
    wanted = [
        (128, 0, 352, 224),
        (160, 0, 384, 224),
        (128, 32, 352, 256),
        (160, 32, 384, 256),
        (144, 16, 368, 240),
    ]
    assert found == wanted * 2
    assert [view.mirrored for view in list_views("10")] == [False] * 5 + [True] * 5
    assert boxes("5", 512, 256) == wanted
    # A portrait of twice that size: the same with x and y exchanged, times two.
    assert boxes("5", 512, 1024)[1] == (64, 256, 512, 704)


def test_the_center_with_a_share_of_the_shorter_side():
    assert boxes("1", 512, 256) == [(144, 16, 368, 240)]
    assert boxes("1", 100, 300, share=0.9) == [pytest.approx((5, 105, 95, 195))]
    assert [view.mirrored for view in list_views("1", flip=True)] == [False, True]


def test_googlenets_144_crops_of_a_landscape():
    """704 x 352 at a shorter side of 352: one pixel of the image is one of the resized image."""
    found = boxes("144", 704, 352)
    assert len(found) == 144
    assert Counter(view.mirrored for view in list_views("144")) == {False: 72, True: 72}
    at_352 = found[54:72]  # the last of four scales: three squares of six crops
    left = [(0, 0, 224, 224), (128, 0, 352, 224), (0, 128, 224, 352), (128, 128, 352, 352)]
    left += [(64, 64, 288, 288), (0, 0, 352, 352)]
    for square, crop in enumerate(at_352):
        x = 176 * (square // 6)
        wanted = np.add(left[square % 6], (x, 0, x, 0))
        np.testing.assert_allclose(crop, wanted, atol=1e-9)
    # At 256 the crop is 224/256 = 308/352 of the shorter side.
    np.testing.assert_allclose(found[0], (0, 0, 308, 308), atol=1e-9)
    # Of a portrait, the squares lie at the top, in the middle and at the bottom.
    np.testing.assert_allclose(boxes("144", 352, 704)[66], (0, 352, 224, 576), atol=1e-9)


def test_crops_are_the_pixels_of_the_image(tmp_path):
    pixels = np.arange(8 * 16 * 3, dtype=np.uint8).reshape(8, 16, 3)
    group = CropGroup(1.0, (View(0.5, 0, 0), View(0.5, 1, 1, mirrored=True), View(1.0, along=0)))
    found = group.read(Image.fromarray(pixels), 4, 3)
    assert found.shape == (3, 4, 4, 3)
    np.testing.assert_array_equal(found[0], pixels[:4, 4:8])
    np.testing.assert_array_equal(found[1], pixels[4:, 8:12][:, ::-1])
    np.testing.assert_array_equal(group.cut(pixels[None], 4)[0], found)
    floats = group.cut(np.float32(pixels[None]) / 255, 4)[0]
    np.testing.assert_allclose(floats, found / 255, atol=1 / 255)
    # A JPEG on its side is turned, and is decoded once for all crops.
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.effect_noise((640, 480), 60).save(tmp_path / "a.jpg", exif=exif, quality=95)
    views = list_views("10")
    with Image.open(tmp_path / "a.jpg") as image:
        crops = CropGroup(1.0, views).read(image, 32, 1)
    for view, crop in zip(views[:5], crops):
        with Image.open(tmp_path / "a.jpg") as image:
            np.testing.assert_array_equal(crop, read_box(image, view.box, 32, 1))


def test_protocols():
    assert make_protocol("10").count == 10
    assert make_protocol("1").groups == (CropGroup(1.0, (View(1.0),)),)
    several = make_protocol("10", scales=(1, 1.25), share=0.9)
    assert (several.count, several.name) == (20, "crops10_share0.9_scales1,1.25")
    assert make_protocol("10").enlarges(28, 28)
    assert not make_protocol("1").enlarges(28, 28)
    assert make_protocol("1", scales=(1.5,)).enlarges(28, 28)
    assert not make_protocol("144").enlarges(352, 224)
    for options, message in (
        (dict(crops="12"), "expected 1, 5, 10, 144, got '12'"),
        (dict(share=1.2), "--crop-share"),
        (dict(crops="144", share=0.9), "shares of their own"),
        (dict(scales=()), "--scales"),
        (dict(crops="5", dense=True), "--dense"),
    ):
        with pytest.raises(UserError, match=message):
            make_protocol(**options)


def test_dense_evaluation_is_the_mean_of_the_head_over_windows_of_the_maps():
    sizes = dict(windows=((3,), (3,), (3,), (3,), (3,)), widths=(2, 2, 2, 2, 3), hidden=(5, 4))
    model = create_model("vgg11", pool=2, num_classes=3, input_size=(64, 64, 1), **sizes)
    variables = init_variables(model, jax.random.key(0))
    dense = jax.jit(make_dense_apply(model, variables))
    images = np.random.default_rng(0).normal(size=(2, 96, 128, 1)).astype(np.float32)

    @jax.jit
    def forward(variables, images):
        logits, state = model.apply(variables, images, capture_intermediates=True, mutable=True)
        return logits, state["intermediates"]["stage5"]["__call__"][0]

    square = images[:, :64, :64]
    wanted, _ = forward(variables, square)
    np.testing.assert_allclose(dense(variables, square), wanted, rtol=1e-4, atol=1e-6)
    _, maps = map(np.asarray, forward(variables, images))
    assert maps.shape == (2, 3, 4, 3)
    layers = [variables["params"][name] for name in ("fc6", "fc7", "head")]
    logits = []
    for i in range(2):
        for j in range(3):
            x = maps[:, i : i + 2, j : j + 2].reshape(2, -1)
            for number, layer in enumerate(layers):
                x = x @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])
                x = np.maximum(x, 0) if number < 2 else x
            logits.append(x)
    found = dense(variables, images)
    np.testing.assert_allclose(found, np.mean(logits, 0), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="use a larger image"):
        jax.eval_shape(dense, variables, images[:, :32, :32])
    resnet = create_model("cifar_resnet20")
    with pytest.raises(UserError, match="has no dense layer fc6"):
        make_dense_apply(resnet, {"params": {"stem": {}}})


def test_a_run_is_evaluated_on_crops(finished, capsys):
    classifier = classifiers.make_classifier_from_run(finished[0])
    plain = classifiers.predict_split(classifier)
    one = predict_crops(classifier, make_protocol("1"))
    np.testing.assert_allclose(one.probabilities, plain.probabilities, atol=1e-5)
    assert "enlarged" not in capsys.readouterr().out
    ten = predict_crops(classifier, make_protocol("10"))
    assert "crops are enlarged to 32x32 bilinearly" in capsys.readouterr().out
    test = classifier.dataset.splits["test"]
    crops = CropGroup(1.0, list_views("10")).cut(test.images[:3], 32)
    logits = [
        classifier.model.apply(classifier.variables, classifier.normalize(crops[:, v]))
        for v in range(10)
    ]
    wanted = np.mean([jax.nn.softmax(each) for each in logits], 0)
    np.testing.assert_allclose(ten.probabilities[:3], wanted, rtol=1e-3, atol=1e-5)


def test_what_the_flags_of_crops_mean(finished):
    classifier = classifiers.make_classifier_from_run(finished[0])
    assert CropOptions().make(classifier) == make_protocol("1")
    assert CropOptions(size=48).make(classifier).groups[0].scale == 1.5
    assert CropOptions("5", flip=True).make(classifier).count == 10
    for options, message in (
        (CropOptions(size=48, scales=(1.0, 2.0)), "give one of them"),
        (CropOptions("10", flip=True), "has mirror images already"),
        (CropOptions(size=-1), "above 0"),
    ):
        with pytest.raises(UserError, match=message):
            options.make(classifier)


def test_the_file_of_an_evaluation_on_crops_has_a_name_of_its_own(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    results = evaluate_run(folder, crops=CropOptions("5"))
    (file,) = folder.glob("evaluation_test_*_crops5.json")
    assert json.loads(file.read_text())["protocol"]["crops"] == 5
    classifier = classifiers.make_classifier_from_run(folder)
    larger = CropOptions(size=40).make(classifier)
    assert (larger.name, larger.as_dict()["size"]) == ("crops1_size40", 40)
    low, high = results["intervals"]["accuracy"]
    assert low < results["accuracy"] < high
    with pytest.raises(UserError, match="has no dense layer fc6"):
        evaluate_run(folder, crops=CropOptions(dense=True))
