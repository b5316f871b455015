"""Predicting photos: a run without its data, published weights, the command."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from flax_cnns.checkpoint import manager
from flax_cnns.data import decode
from flax_cnns.data.load import load_dataset
from flax_cnns.data.readers.folder import FileSource
from flax_cnns.data.types import Dataset
from flax_cnns.errors import UserError
from flax_cnns.interop.convert import convert as convert_to_folder
from flax_cnns.runs import load, predict
from flax_cnns.runs.workdir import read_config
from flax_cnns.weights import convert, preprocessing
from tests.models import cases, foreign
from tests.test_scripts import finish


@pytest.fixture(scope="module")
def photos(finished, tmp_path_factory):
    """Files of the first test images of the run's data set, and their labels."""
    test = load_dataset(read_config(finished[0]).data).splits["test"]
    folder = tmp_path_factory.mktemp("photos")
    for i, image in enumerate(test.images[:8]):
        Image.fromarray(image[..., 0]).save(folder / f"{i}.png")
    return sorted(folder.iterdir()), test


def test_a_run_predicts_what_it_evaluates_and_needs_no_data(finished, photos, monkeypatch):
    from flax_cnns.runs import build
    from flax_cnns.runs.variables import load_variables

    files, test = photos
    components = build.build_components(read_config(finished[0]))
    variables, _ = load_variables(components, finished[0])
    mean, std = np.float32(components.dataset.mean), np.float32(components.dataset.std)
    images = (test.images[:8] / np.float32(255) - mean) / std
    logits = np.asarray(components.model.apply(variables, images))
    monkeypatch.setattr(load, "load_dataset", lambda _: pytest.fail("the data set was loaded"))
    predictions = predict.predict(
        predict.make_predictor_from_folder(finished[0]), files, max_classes=10
    )
    for row, guesses in zip(logits, predictions):
        shares = np.exp(row) / np.exp(row).sum()
        assert [name for name, _ in guesses] == [str(k) for k in np.argsort(-shares)]
        np.testing.assert_allclose([p for _, p in guesses], sorted(shares)[::-1], atol=1e-5)


def test_a_run_without_dataset_json_predicts_too(finished, photos, tmp_path):
    shutil.copytree(finished[0], tmp_path / "old")
    (tmp_path / "old/dataset.json").unlink()
    new = predict.predict(predict.make_predictor_from_run(finished[0]), photos[0][:1])
    assert predict.predict(predict.make_predictor_from_run(tmp_path / "old"), photos[0][:1]) == new


def test_a_large_photo_is_cropped_at_its_center(finished, photos):
    """A run sees the central square, like its own images."""
    digit = Image.open(photos[0][0])
    wide = Image.new("L", (96, 32))
    wide.paste(digit, (32, 0))
    run = predict.make_predictor_from_run(finished[0])
    assert run.box(96, 32) == (32, 0, 64, 32)
    np.testing.assert_array_equal(run.read(wide), run.read(digit))


def test_a_run_sees_a_photo_upright_as_its_own_images(finished, photos, tmp_path):
    digit, exif = Image.open(photos[0][0]), Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    path = tmp_path / "side.png"
    digit.rotate(90).save(path, exif=exif)
    run = predict.make_predictor_from_run(finished[0])
    source = FileSource((str(path),), np.zeros(1, np.int32), "one")
    own, _ = decode.read_example(source, 0, 32, 1)
    np.testing.assert_array_equal(run.read(path)[0], own)
    np.testing.assert_array_equal(run.read(path), run.read(digit))


def test_somebodys_weights_have_numbers_for_classes_converted_or_not(tmp_path):
    case = foreign.CASES["squeezenet"]
    tensors, _ = cases.load(cases.FOLDER / "squeezenet.npz", case.source)
    np.savez(tmp_path / "mine.npz", **tensors)
    given = ("squeezenet1_1", "torchvision")
    convert_to_folder(*given, tmp_path / "converted", tmp_path / "mine.npz")
    photo = np.random.default_rng(0).integers(0, 256, (240, 300, 3), np.uint8)
    for predictor in (
        predict.make_predictor_from_weights(*given, tmp_path / "mine.npz"),
        predict.make_predictor_from_folder(tmp_path / "converted"),
    ):
        assert predictor.title == "squeezenet1_1, torchvision's weights"
        assert predictor.class_names == tuple("0123456789")
        np.testing.assert_array_equal(predictor.read(photo), preprocessing(*given)(photo))
        np.testing.assert_equal(
            predictor.probabilities.args[0], convert("squeezenet1_1", tensors, "torchvision")
        )
    (guesses,) = predict.predict(predictor, [photo], max_classes=20)
    assert len(guesses) == 10
    assert sum(share for _, share in guesses) == pytest.approx(1, abs=1e-5)


def test_converted_weights_see_images_of_the_size_that_they_take(tmp_path):
    case = foreign.CASES["squeezenet"]
    tensors, _ = cases.load(cases.FOLDER / "squeezenet.npz", case.source)
    np.savez(tmp_path / "mine.npz", **tensors)
    given = ("squeezenet1_1", "torchvision", tmp_path / "small", tmp_path / "mine.npz")
    assert convert_to_folder(*given, image_size=56)["input_size"] == (56, 56, 3)
    predictor = predict.make_predictor_from_folder(tmp_path / "small")
    photo = np.random.default_rng(0).integers(0, 256, (240, 300, 3), np.uint8)
    seen = preprocessing(*given[:2])._replace(size=56, resize=64)  # instead of 224 and 256
    np.testing.assert_array_equal(predictor.read(photo), seen(photo))
    convert_to_folder(*given[:2], tmp_path / "gray", given[3], channels=1, adapt_stem=True)
    with pytest.raises(UserError, match=r"these weights take images \[224, 224, 1\], but photos"):
        predict.make_predictor_from_folder(tmp_path / "gray")


def test_converted_weights_have_one_checkpoint_and_say_what_they_are(tmp_path):
    manager.write_tree(tmp_path / "other", {"w": np.ones(3)}, {"model": "lenet5", "by": "us"})
    with pytest.raises(UserError, match=r"no checkpoints; remove --checkpoint=best"):
        predict.make_predictor_from_folder(tmp_path / "other", "best")
    written = {"source": "us", "preprocessing": {"size": 32}}
    for about, message in (
        ({}, r"'source' is missing"),
        (written, r"missing 1 required positional argument: 'resize'"),
        (written | {"preprocessing": {"size": 32, "sise": 3}}, r"unexpected .* 'sise'"),
        (written | {"preprocessing": "RGB"}, r"'str' object has no attribute 'items'"),
        ({"source": "us", "preprocessing": {"size": 32, "resize": 32}, "input_size": 32}, "int"),
    ):
        content = json.dumps({"model": "lenet5"} | about)
        (tmp_path / "other/about.json").write_text(content)
        with pytest.raises(UserError, match="about.json is not as .*" + message) as raised:
            predict.make_predictor_from_folder(tmp_path / "other")
        assert "\n" not in str(raised.value)


def test_a_picture_says_how_many_photos_are_in_it(monkeypatch, tmp_path):
    monkeypatch.setattr(predict.predictions, "MAX_PHOTOS", 2)
    seer = predict.Predictor("a seer", None, lambda width, height: (0, 0, 4, 4), None, "ab")
    photos = [np.zeros((4, 4, 3), np.uint8)] * 3
    for many, drawn in ((3, 2), (2, 2), (1, 1)):
        guesses = [[("a", 0.9)]] * many
        assert predict.draw_photos(seer, photos[:many], guesses, tmp_path / "seen.png") == drawn


def test_weights_without_a_classifier_predict_no_classes(tmp_path):
    """Like timm's vit_large_patch32_224, which can be converted as a start for training."""
    case = foreign.CASES["squeezenet"]
    tensors, _ = cases.load(cases.FOLDER / "squeezenet.npz", case.source)
    body = {name: array for name, array in tensors.items() if not name.startswith("classifier")}
    np.savez(tmp_path / "body.npz", **body)
    given = ("squeezenet1_1", "torchvision")
    about = convert_to_folder(*given, tmp_path / "converted", tmp_path / "body.npz")
    assert about["preprocessing"]["num_classes"] == 0
    assert about["leaves"] == len(body)
    message = "squeezenet1_1 from torchvision: these weights have no classifier"
    with pytest.raises(UserError, match=message):
        predict.make_predictor_from_weights(*given, tmp_path / "body.npz")
    with pytest.raises(UserError, match=message):
        predict.make_predictor_from_folder(tmp_path / "converted")
    body["classifier.1.bias"] = tensors["classifier.1.bias"]
    with pytest.raises(UserError, match="no tensor was given for params/head/kernel"):
        convert("squeezenet1_1", body, "torchvision")


@pytest.mark.slow
def test_the_command_writes_a_table_and_a_picture(finished, photos, tmp_path):
    out = tmp_path / "seen.png"
    files = list(map(str, photos[0][:2]))
    code, output, err = finish("predict", *files, f"--workdir={finished[0]}", f"--out={out}")
    assert code == 0, err
    for text in ("lenet5 on digits", "0.png", "1.png", "probability", "%"):
        assert text in output
    with Image.open(out) as picture:
        assert min(picture.size) > 300


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workdir={run}", "{photos}/9.png"], "there is no photo"),
        (["--workdir={run}", "{run}/config.json"], "cannot read the photo"),
        (["--workdir={run}"], "expected one or more photos (files), got none"),
        (["{photos}/0.png"], "expected --model=NAME --weights=SOURCE, or --workdir=RUN"),
        (["--model=resnet50", "{photos}/0.png"], "expected both"),
        (
            ["--model=resnet50", "--weights=timm", "--checkpoint=best", "{photos}/0.png"],
            "--checkpoint chooses a checkpoint of a run; also give --workdir=RUN",
        ),
        (["--model=resnet50", "--weights=keras", "{photos}/0.png"], "expected torchvision"),
    ],
)
def test_a_mistake_is_one_line(finished, photos, flags, message):
    places = dict(run=finished[0], photos=photos[0][0].parent)
    code, _, err = finish("predict", *(flag.format(**places) for flag in flags))
    assert (code, err.count("\n")) == (2, 1), err
    assert message in err


def test_names_of_photos():
    array = np.zeros((1, 1, 3), np.uint8)
    assert predict.name_photos(["a/cat.jpg", "a/cat.jpg", "dog.jpg", array]) == [
        *("cat.jpg", "cat.jpg", "dog.jpg", "photo 4")
    ]
    assert predict.name_photos(["a/x.jpg", "b/x.jpg"]) == ["a/x.jpg", "b/x.jpg"]


def test_what_the_data_set_is_goes_through_json(config):
    dataset = load_dataset(config.data)
    again = Dataset.from_dict(json.loads(json.dumps(dataset.as_dict())))
    assert again.as_dict() == dataset.as_dict()
    assert again.splits == {}


def test_the_probabilities_of_crops_are_averaged():
    """A network that says how red an image is. The left quarter of the photo is red."""
    photo = np.zeros((32, 64, 3), np.uint8)
    photo[:, :16, 0] = 255

    def measure_red(pixels):
        red = pixels[..., 0].mean((1, 2)) / 255
        return np.stack([red, 1 - red], -1)

    reading = predict.CropReading(32, 3, Image.Resampling.BILINEAR, lambda pixels: pixels)
    seer = predict.Predictor("a seer", None, None, measure_red, ("red", "black"), reading)

    def find_red(crops):
        [guesses] = predict.predict(predict.use_crops(seer, crops), [photo])
        return dict(guesses)["red"]

    # The central square is columns 16 to 48, which are black.
    for crops in ("1", "5", "10"):
        assert find_red(crops) == pytest.approx(0, abs=0.001)
    # GoogLeNet's left square is half red. So is the mean of its 6 crops: those at its left see as
    # much more as those at its right see less. The central and the right square are black.
    assert find_red("144") == pytest.approx(1 / 6, abs=0.002)
    every = predict.use_crops(seer, "144")
    assert (every.title, every.box(64, 32)) == ("a seer, 144 crops", (0, 0, 64, 32))
    assert predict.use_crops(seer, "10").box(64, 32) == (16, 0, 48, 32)
    with pytest.raises(UserError, match="expected 1, 5, 10, 144, got '11'"):
        predict.use_crops(seer, "11")
