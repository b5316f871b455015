"""`data.decoder="opencv"`: pictures as by Pillow, which reads all that OpenCV cannot."""

from __future__ import annotations

import functools
import io
import sys

import numpy as np
import pytest
from PIL import Image

from configs import common
from flax_cnns.data import decode, load, opencv, pipeline
from flax_cnns.data import fingerprint as fingerprints
from flax_cnns.data import images as img
from flax_cnns.data.readers.folder import FileSource
from flax_cnns.errors import UserError
from tests.data.test_images import STORED, exif, saved, scene

needs_opencv = pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("cv2") is None, reason="OpenCV is not installed"
)


def part(width, height):
    return 0.1 * width, 0.2 * height, 0.7 * width, 0.9 * height


def read(image, size=64, channels=3, box_of=part, decoder="opencv"):
    return img.read_box(image, box_of, size, channels, decoder)


def jpeg(image=None, **options) -> Image.Image:
    options = dict(quality=95, subsampling=0) | options
    return saved(image or scene(), "JPEG", **options)


@pytest.fixture
def calls(monkeypatch):
    """How many of the images OpenCV decoded."""
    seen = []
    own = opencv.read_boxes

    def read_boxes(*args):
        crops = own(*args)
        seen.append(crops is not None)
        return crops

    monkeypatch.setattr(opencv, "read_boxes", read_boxes)
    return seen


@needs_opencv
@pytest.mark.parametrize("turn", STORED)
def test_jpegs_are_upright_and_look_as_by_pillow(turn, calls):
    stored = scene() if STORED[turn] is None else scene().transpose(STORED[turn])
    seen = read(jpeg(stored, exif=exif(turn)))
    assert calls == [True]
    wanted = img.read_box(scene(), part, 64, 3).astype(int)
    assert abs(seen - wanted).mean() < 2  # edges are rounded to whole pixels
    assert abs(seen - wanted).max() < 12


@needs_opencv
def test_sizes_grow_shrink_and_turn_gray(calls):
    for size in (16, 24, 64, 200, 500):  # from an eighth of the box to twice its size
        wanted = img.read_box(scene(), part, size, 3).astype(int)
        assert abs(read(jpeg(), size) - wanted).mean() < 3
    flat = functools.partial(lambda w, h: (0, 0, w, h / 10))  # one axis shrinks, one grows
    wanted = img.read_box(scene(), flat, 64, 3).astype(int)
    assert abs(read(jpeg(), box_of=flat) - wanted).mean() < 3
    wanted = img.read_box(scene(), part, 64, 1).astype(int)
    assert abs(read(jpeg(), channels=1) - wanted).mean() < 2
    gray = jpeg(scene().convert("L"))
    seen = read(gray)
    assert (np.ptp(seen, axis=2) == 0).all()
    assert abs(seen[..., :1] - wanted).mean() < 2
    assert all(calls)


@needs_opencv
def test_it_is_antialiased():
    """Alternating black and white columns become gray, not stripes."""
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    for size in (30, 100, 160):
        seen = read(jpeg(Image.fromarray(stripes)), size, box_of=img.center_box)
        assert abs(seen.astype(int) - 127).max() < 40


@needs_opencv
def test_pillow_reads_all_else_to_the_bit(calls):
    others = {
        "CMYK": lambda: saved(scene().convert("CMYK"), "JPEG"),
        "PNG": lambda: saved(scene(), "PNG"),
        "an array": scene,
        "16 bits": lambda: saved(Image.fromarray(np.full((9, 9), 40000, np.uint16)), "PNG"),
    }
    for name, make in others.items():
        np.testing.assert_array_equal(read(make()), read(make(), decoder="pillow"), name)
    assert not any(calls)


@needs_opencv
@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_a_truncated_jpeg_is_an_error_as_by_pillow(tmp_path, kept):
    file = io.BytesIO()
    scene().save(file, "JPEG", exif=exif(6))
    data = file.getvalue()
    (tmp_path / "a.jpg").write_bytes(data[: int(len(data) * kept)])
    source = FileSource([str(tmp_path / "a.jpg")], np.zeros(1, np.int32), "x")
    with pytest.raises(UserError, match=r"cannot decode .*a\.jpg: .*truncated"):
        decode.read_example(source, 0, 64, 3, decoder="opencv")


@needs_opencv
def test_bytes_after_the_end_are_left_to_pillow(calls):
    file = io.BytesIO()
    scene().save(file, "JPEG")
    whole = file.getvalue()
    for tail, by_opencv in ((b"\0" * 5, True), (b"x" * 5, False)):
        seen = read(Image.open(io.BytesIO(whole + tail)))
        assert abs(seen - read(scene()).astype(int)).mean() < 4
        assert calls[-2] is by_opencv


def make_folder(root, kind="jpg", count=6):
    for name in ("arch", "vault"):
        (root / "train" / name).mkdir(parents=True)
        for i in range(count):
            scene(80 + i, 60).save(root / "train" / name / f"{i}.{kind}")
    config = common.get_config().data
    config.update(
        name="folder", dir=str(root), image_size=16, batch_size=4, validation=2, decoder="opencv"
    )
    return config


@needs_opencv
def test_a_run_s_data_are_decoded_so_in_memory_and_streamed(tmp_path, calls):
    config = make_folder(tmp_path)
    data = load.load_dataset(config)
    count = len(calls)
    assert count >= 12
    assert all(calls)
    assert data.fingerprint["decoder"] == "opencv"
    assert load.read_fingerprint(config) == data.fingerprint
    config.in_memory = "no"
    streamed = next(pipeline.train_batches(load.load_dataset(config), config, seed=0))
    kept = next(pipeline.train_batches(data, config, seed=0))
    np.testing.assert_array_equal(streamed["image"], kept["image"])
    assert len(calls) > count
    assert all(calls)
    config.decoder = "pillow"
    differences = fingerprints.find_differences(load.read_fingerprint(config), data.fingerprint)
    assert differences == ["JPEGs were decoded by pillow, now by opencv"]


@needs_opencv
def test_data_without_jpegs_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"decodes gray and RGB JPEGs, .* are PNG RGB; leave it"):
        load.load_dataset(make_folder(tmp_path, "png"))


def test_without_opencv_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match=r'pip install "flax_cnns\[opencv\]"'):
        load.load_dataset(make_folder(tmp_path))
