"""Reading photos: upright, on white, in 8 bits, and decoded at the smallest possible size."""

from __future__ import annotations

import functools
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image

from flax_cnns.data import decode
from flax_cnns.data import images as img
from flax_cnns.data.images import open_photo
from flax_cnns.data.readers.arrays import ArraySource
from flax_cnns.data.readers.folder import FileSource
from flax_cnns.data.readers.tfds import TfdsSource
from flax_cnns.errors import UserError
from flax_cnns.weights import Preprocessing

STORED = {  # by EXIF orientation: the operation from the upright image to the stored one
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
FORMATS = {"jpg": dict(quality=95, subsampling=0), "png": {}, "webp": {"lossless": True}} | {
    "tif": {"compression": "tiff_lzw"}
}


def scene(width=400, height=300) -> Image.Image:
    """A smooth image without repetition."""
    small = np.random.default_rng(0).integers(0, 256, (3, 4, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def grainy(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[:height, :width][..., None]
    wave = 110 + 90 * np.sin(x / 23) * np.cos(y / np.array([17, 29, 41]))
    noise = np.random.default_rng(0).integers(0, 50, (height, width, 3))
    return Image.fromarray((wave + noise).astype(np.uint8))


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    return tags


def saved(image: Image.Image, kind: str, **options) -> Image.Image:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Image.open(io.BytesIO(file.getvalue()))


def reader(path) -> FileSource:
    return FileSource((str(path),), np.zeros(1, np.int32), "one")


def part(width: int, height: int) -> img.Box:
    return 0.1 * width, 0.2 * height, 0.6 * width, 0.9 * height


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("orientation", STORED)
def test_a_photograph_is_read_upright_however_the_camera_was_held(tmp_path, suffix, orientation):
    """A crop, the whole image, and the input of published weights, for all EXIF orientations."""
    upright, operation = scene(), STORED[orientation]
    stored = upright if operation is None else upright.transpose(operation)
    path = tmp_path / f"photo.{suffix}"
    stored.save(path, exif=exif(orientation), **FORMATS[suffix])
    wanted = img.read_box(upright, part, 64, 3).astype(int)
    with Image.open(path) as image:
        np.testing.assert_allclose(img.read_box(image, part, 64, 3), wanted, atol=6)
    with Image.open(path) as image:
        assert img.load_upright(image, 3).size == (400, 300)
    row = Preprocessing(64, 80, mean=(0,) * 3, std=(1,) * 3, scale=1.0)
    np.testing.assert_allclose(row(path), row(upright), atol=6)
    records = [{"image": path.read_bytes(), "label": 0}]
    whole = ArraySource(np.asarray(upright)[None], np.zeros(1, np.int32), "array")
    for own in ({"share": 0.8}, {"crop": (0.1, 0.6)}):  # evaluation, training
        array, file, record = (
            decode.read_example(source, 0, 64, 3, rng=np.random.default_rng(7), **own)[0].astype(
                int
            )
            for source in (whole, reader(path), TfdsSource(records, "image", "label", "t", 1))
        )
        np.testing.assert_allclose(file, array, atol=6)
        np.testing.assert_array_equal(record, file)


def test_a_large_jpeg_that_lies_on_its_side_is_still_decoded_small():
    image = saved(scene().transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif(6))
    seen = img.read_box(image, part, 24, 3)
    assert image.size == (38, 50)  # an eighth of what is stored
    np.testing.assert_allclose(seen, img.read_box(scene(), part, 24, 3).astype(int), atol=12)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize(
    "broken",
    [b"Exif\0\0rubbish", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\x09"],
)
def test_broken_exif_is_no_damage(tmp_path, suffix, broken):
    path = tmp_path / f"photo.{suffix}"
    scene().save(path, exif=broken, **FORMATS[suffix])
    seen, _ = decode.read_example(reader(path), 0, 64, 3)
    wanted = img.read_box(scene(), img.center_box, 64, 3).astype(int)
    np.testing.assert_allclose(seen, wanted, atol=6)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_unknown_orientation_turns_nothing(orientation):
    image = saved(scene(), "PNG", exif=exif(orientation))
    np.testing.assert_array_equal(img.load_upright(image, 3), scene())


def png(depth: int, color: int, row: bytes, transparent: bytes, palette: bytes = b"") -> bytes:
    """Returns a PNG of two pixels. PIL writes neither fewer than 8 bits nor 16 bits."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 2, 1, depth, color, 0, 0, 0)
    middle = (chunk(b"PLTE", palette) if palette else b"") + chunk(b"tRNS", transparent)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + middle
    return start + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")


def u16(*values: int) -> bytes:
    return struct.pack(f">{len(values)}H", *values)


TRANSPARENT = {  # (PNG whose first pixel is transparent, value of the second pixel)
    "1 bit, black": (png(1, 0, b"\x40", u16(0)), 255),
    "1 bit, white": (png(1, 0, b"\x80", u16(1)), 0),
    "2 bits": (png(2, 0, b"\x60", u16(1)), 170),
    "4 bits": (png(4, 0, b"\x57", u16(5)), 119),
    "8 bits": (png(8, 0, b"\x09\x14", u16(9)), 20),
    "16 bits": (png(16, 0, u16(0x1234, 0x2000), u16(0x1234)), 32),
    "colors": (png(8, 2, bytes([9, 8, 7, 20, 20, 20]), u16(9, 8, 7)), 20),
    "16 bits of colors": (
        png(16, 2, u16(0x1234, 0x2000, 0x3000, *[0x4000] * 3), u16(0x1234, 0x2000, 0x3000)),
        64,
    ),
    "palette": (png(4, 3, b"\x01", b"\0", bytes([10, 20, 30, 40, 40, 40])), 40),
    "palette, half": (png(4, 3, b"\x01", b"\0\x80", bytes([10, 20, 30, 1, 1, 1])), 128),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
@pytest.mark.parametrize("channels", [1, 3])
def test_transparent_pixels_become_white_in_every_kind_of_png(kind, channels):
    data, second = TRANSPARENT[kind]
    for read in (img.load_upright, img.convert_channels):
        pixels = np.asarray(read(Image.open(io.BytesIO(data)), channels))
        wanted = np.array([255, second])
        np.testing.assert_array_equal(
            pixels.reshape(2, channels), wanted[:, None].repeat(channels, 1)
        )


@pytest.mark.parametrize("channels", [1, 3])
def test_transparent_pixels_become_white_in_every_mode(channels):
    palette = Image.new("P", (2, 2))
    palette.putpalette([10, 20, 30, 0] * 4, "RGBA")
    gif = saved(
        *(Image.new("P", (2, 2)), "GIF"),
        transparency=0,
        save_all=True,
        append_images=[Image.new("P", (2, 2), 7)],
    )
    clear = [Image.new(mode, (2, 2)) for mode in ("LA", "PA", "RGBA", "RGBa")]
    for image in (palette, gif, saved(Image.new("LA", (2, 2)), "PNG"), *clear):
        assert (np.asarray(img.convert_channels(image, channels)) == 255).all(), image.mode


def test_bits_above_eight_are_scaled_and_numbers_without_a_white_are_refused(tmp_path):
    values = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    big = Image.frombytes("I;16B", (5, 1), values.astype(">u2").tobytes())
    for image in (saved(Image.fromarray(values), "PNG"), saved(big, "TIFF"), big):
        for channels in (1, 3):
            pixels = np.asarray(img.convert_channels(image, channels)).reshape(5, channels)
            np.testing.assert_array_equal(pixels[:, 0], [0, 0, 1, 128, 255])
    for numbers, wanted in (([0, 0.5, 1], [0, 128, 255]), ([0, 0.5, 200], [0, 0, 200])):
        image = saved(Image.fromarray(np.array([numbers], np.float32)), "TIFF")
        np.testing.assert_array_equal(np.asarray(img.convert_channels(image, 1))[0], wanted)
    for numbers in (np.float32([[-1, 2]]), np.float32([[0, np.nan]]), np.int32([[0, 65536]])):
        Image.fromarray(numbers).save(tmp_path / "a.tif")
        with pytest.raises(
            UserError, match=r"a\.tif: its pixels are numbers from .* expected 0 to"
        ):
            decode.read_example(reader(tmp_path / "a.tif"), 0, 1, 1)


def test_the_inks_of_a_jpeg_are_colors():
    """Adobe's JPEGs store inks inverted, and so does PIL."""
    for ink, color in (((0, 255, 255, 0), (255, 0, 0)), ((0, 0, 0, 155), (100, 100, 100))):
        image = saved(Image.new("CMYK", (16, 16), ink), "JPEG", quality=95)
        assert image.mode == "CMYK"
        seen = img.read_box(image, img.center_box, 4, 3)
        np.testing.assert_allclose(seen[1, 1], color, atol=3)


def test_only_the_first_of_several_frames_is_read():
    frames = [Image.new("RGB", (8, 8), color) for color in ((200, 0, 0), (0, 0, 200))]
    for kind in ("TIFF", "GIF", "PNG", "WEBP"):
        image = saved(frames[0], kind, save_all=True, append_images=frames[1:])
        assert image.n_frames == 2
        seen = img.read_box(image, img.center_box, 4, 3)
        np.testing.assert_allclose(seen[1, 1], (200, 0, 0), atol=5)


def test_how_a_runs_evaluation_differs_from_resize_and_center_crop():
    """Checks the numbers in docs/runs.md. `Preprocessing` equals torchvision's to 1e-6
    (tests/weights)."""
    theirs = Preprocessing(224, 256, mean=(0,) * 3, std=(1,) * 3, scale=1.0)
    own = functools.partial(img.center_box, share=0.875)

    def differs(image: Image.Image, box_of=own) -> np.ndarray:
        return abs(img.read_box(image, box_of, 224, 3) - theirs(image)[0])

    for side in (224, 300, 512):
        assert differs(grainy(side, side)).max() <= 2
    for size in ((500, 375), (375, 500)):
        assert differs(grainy(*size), theirs.box).max() <= 2  # their box: the same
        off = differs(grainy(*size))
        assert 3 < off.mean() < 5
        assert 15 < off.max() <= 24
    pixel = [
        np.abs(np.subtract(own(w, h), theirs.box(w, h))).max() / (min(w, h) / 256)
        for w in range(224, 1200, 37)
        for h in range(224, 1200, 41)
    ]
    assert 0.5 < max(pixel) <= 1
    jpeg = [saved(grainy(512, 512), "JPEG", quality=90) for _ in range(2)]
    halved = abs(img.read_box(jpeg[0], own, 224, 3) - theirs(img.load_upright(jpeg[1], 3))[0])
    assert 2 < halved.mean() < 4
    assert 15 < halved.max() <= 24


def test_a_pil_image_is_read_as_its_file_and_is_not_changed(tmp_path):
    scene().transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.jpg", exif=exif(6))
    row = Preprocessing(24, 32)
    own = Image.open(tmp_path / "a.jpg")
    np.testing.assert_array_equal(row(own), row(tmp_path / "a.jpg"))
    for _ in range(2):
        with open_photo(own) as image:
            seen = img.read_box(image, part, 24, 3)
    np.testing.assert_allclose(seen, img.read_box(scene(), part, 24, 3).astype(int), atol=12)
    assert own.size == (300, 400)
    with pytest.raises(
        UserError, match=r"cannot read the photo .*mode=F.*: its pixels are numbers"
    ):
        row(Image.fromarray(np.float32([[-1, 2]])))
