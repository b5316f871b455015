"""Decoding and cropping of images on the host, by PIL, to uint8 squares of the network's size.

OpenCV may decode JPEGs in its place (opencv.py).
"""

from __future__ import annotations

import contextlib
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from flax_cnns.data import opencv
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.files import check_regular_file

# Incremented whenever the same file decodes to other pixels than before. Version 2 applies EXIF
# orientation and every kind of transparency.
READER_VERSION = 2

# The errors of PIL for files that it cannot decode.
DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the image


def center_box(width: int, height: int, share: float = 1.0) -> Box:
    """Returns the central square with `share` of the shorter side.

    For a square image and a share of 0.875, this is the box of the papers' Resize(256) and
    CenterCrop(224). For other images, Resize rounds the longer side down and CenterCrop rounds the
    corner to a whole pixel, so an edge of their box may differ by up to one pixel (of 224).
    """
    side = min(width, height) * share
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def random_box(
    rng: np.random.Generator, width: int, height: int, share: tuple[float, float]
) -> Box:
    """Returns a box with a random share of the area and a random aspect ratio, as in
    `augment.random_resized_crop`. Returns the central square if none of ten drawn boxes fits."""
    for _ in range(10):
        area = rng.uniform(*share) * width * height
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            return left, top, left + w, top + h
    return center_box(width, height)


# The operation that turns a stored image upright, by its EXIF orientation (1 is upright).
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_box(
    image: Image.Image,
    box_of: Callable[[int, int], Box],
    size: int,
    channels: int,
    decoder: str = "pillow",
) -> np.ndarray:
    """Reads a box of the image, upright and resized (bilinear, antialiased): u8 [size size
    channels].

    `box_of(width, height)` returns the box, in pixels of the upright image. `decoder` is a value of
    `data.decoder`: "opencv" decodes JPEGs faster (opencv.py).
    """
    return read_boxes(image, [box_of], size, channels, decoder=decoder)[0]


def read_boxes(
    image: Image.Image,
    boxes_of: Sequence[Callable[[int, int], Box]],
    size: int,
    channels: int,
    *,
    resample: Image.Resampling = Image.Resampling.BILINEAR,
    decoder: str = "pillow",
) -> list[np.ndarray]:
    """Reads several boxes as `read_box` does, and decodes the image once.

    The filter `resample` is antialiased; OpenCV's own takes its place.
    """
    turn = _orientation(image)
    width, height = image.size
    upright = (height, width) if turn > 4 else (width, height)
    boxes = [_stored_box(box_of(*upright), turn, width, height) for box_of in boxes_of]
    if decoder == "opencv" and (crops := opencv.read_boxes(image, boxes, size, channels)):
        return [_turn(crop, turn) for crop in crops]
    if image.format == "JPEG":
        # The decoder may reduce a large JPEG to 1/2, 1/4 or 1/8, but not below the wanted size.
        wide, high = min(b[2] - b[0] for b in boxes), min(b[3] - b[1] for b in boxes)
        image.draft(None, (math.ceil(width * size / wide), math.ceil(height * size / high)))
        sx, sy = image.width / width, image.height / height
        boxes = [(box[0] * sx, box[1] * sy, box[2] * sx, box[3] * sy) for box in boxes]
    image = convert_channels(image, channels)
    crops = []
    for left, top, right, bottom in boxes:
        box = (max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height))
        crop = image.resize((size, size), resample, box=box)
        if turn in _TURNS:  # cheaper now that the image is small
            crop = crop.transpose(_TURNS[turn])
        crops.append(np.asarray(crop).reshape(size, size, channels))
    return crops


def _turn(crop: np.ndarray, turn: int) -> np.ndarray:
    """Turns a square u8 [N N C] upright."""
    if turn not in _TURNS:
        return crop
    planes = [Image.fromarray(plane).transpose(_TURNS[turn]) for plane in np.moveaxis(crop, 2, 0)]
    return np.stack([np.asarray(plane) for plane in planes], axis=2)


def load_upright(image: Image.Image, channels: int) -> Image.Image:
    """Returns the whole image at full size, turned upright by its EXIF orientation, as L or RGB."""
    turn = _orientation(image)
    image = convert_channels(image, channels)
    return image.transpose(_TURNS[turn]) if turn in _TURNS else image


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, 1 to 8; 1 if absent or unreadable. Decodes the image, except
    JPEG."""
    if image.format is None and not image.info:
        return 1  # made from an array
    if image.format != "JPEG":
        _load(image)  # PNG may have EXIF after its pixels
    if image.format == "TIFF":
        return 1  # PIL turns it while decoding
    try:
        turn = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # PIL raises a dozen kinds; the pixels do not need the broken EXIF
        return 1
    return turn if isinstance(turn, int) and turn in _TURNS else 1


def _load(image: Image.Image) -> None:
    """Decodes the image. PIL scales grays of 2 and 4 bits and colors of 16 bits to 8 bits, but not
    the transparent value, so this function scales it."""
    tile = getattr(image, "tile", None)
    packed = tile[0][3] if tile else None  # PNG's pixel format
    image.load()
    clear = image.info.get("transparency")
    if clear is None:
        return
    if packed == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    elif (packed == "L;2" and clear < 4) or (packed == "L;4" and clear < 16):
        image.info["transparency"] = clear * (85 if packed == "L;2" else 17)


def _stored_box(box: Box, turn: int, width: int, height: int) -> Box:
    """Converts a box of the upright image to pixels of the stored image, which is `width` x
    `height`."""
    left, top, right, bottom = box
    if turn in (5, 6, 7, 8):
        left, top, right, bottom = top, left, bottom, right
    if turn in (2, 3, 7, 8):
        left, right = width - right, width - left
    if turn in (3, 4, 6, 7):
        top, bottom = height - bottom, height - top
    return left, top, right, bottom


def convert_channels(image: Image.Image, channels: int) -> Image.Image:
    """Converts to gray (ITU-R 601 luma) or RGB, with 8 bits. Transparent pixels become white."""
    mode = "L" if channels == 1 else "RGB"
    _load(image)
    clear, palette = image.info.get("transparency"), image.palette
    alpha = palette is not None and palette.mode.endswith("A")
    alpha |= image.mode in ("LA", "PA", "RGBA", "RGBa")
    if image.mode[0] in "IF":
        image = _eight_bits(image, clear)
    elif alpha or clear is not None:
        if image.mode == "1" and clear:  # PIL 10 gives 1, later versions 255
            image.info["transparency"] = 255
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)


def _eight_bits(image: Image.Image, clear: int | None) -> Image.Image:
    """Converts to 8 bits. Integers up to 65535 keep their upper 8 bits. Floats are 0 to 1, or 0 to
    255 if any is above 1. Raises ValueError for other ranges, because their white is unknown."""
    numbers = np.asarray(image)
    low, high = numbers.min(), numbers.max()
    limit = 255 if image.mode == "F" else 65535
    if not (low >= 0 and high <= limit):  # also true for NaN
        expected = "0 to 1 or 0 to 255" if image.mode == "F" else "0 to 65535"
        raise ValueError(
            f"its pixels are numbers from {low:g} to {high:g}, expected {expected}; save the image "
            "with 8 or 16 bits"
        )
    if image.mode == "F":
        scaled = np.round(numbers * 255) if high <= 1 else numbers
    else:
        scaled = numbers >> 8
    return Image.fromarray(np.where(numbers == clear, 255, scaled).astype(np.uint8))


# ---- photos from the user

Photo = str | os.PathLike | Image.Image | np.ndarray


@contextlib.contextmanager
def open_photo(photo: Photo) -> Iterator[Image.Image]:
    """Opens a photo: a path, a PIL image, or an array u8 [H W], [H W 1] or [H W 3].

    The image may not be decoded yet, and is not upright yet: `read_box` and `load_upright` do both.
    Raises `UserError` if there is no such file, and if decoding fails inside the `with` block.
    """
    if isinstance(photo, np.ndarray):
        yield _from_array(photo)
    elif isinstance(photo, Image.Image):
        with _named(f"photo {getattr(photo, 'filename', '') or photo}"):
            # A copy, because `read_box` reduces a JPEG, and the caller's image must keep its size.
            yield photo.copy() if photo.format == "JPEG" else photo
    else:
        path = Path(photo)
        if not path.exists():
            folder = path.parent
            names = [other.name for other in folder.iterdir()] if folder.is_dir() else []
            near = did_you_mean(path.name, names)
            raise UserError(f"there is no photo {os.fspath(photo)!r}{near}")
        check_regular_file(path)
        with _named(f"photo {path}"), Image.open(path) as image:
            yield image


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Turns an error of decoding in this context into a `UserError` that names `name`."""
    try:
        yield
    except UserError:
        raise
    except DECODING_ERRORS as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read the {name}: {reason}") from error


def check_photos(photos: Iterable[Photo]) -> None:
    """Raises `UserError` for the first photo that cannot be opened. It is quick: call it before
    slow work."""
    for photo in photos:
        with open_photo(photo):
            pass


def _from_array(photo: np.ndarray) -> Image.Image:
    gray = photo.ndim == 2 or (photo.ndim == 3 and photo.shape[2] == 1)
    if photo.dtype != np.uint8 or not (gray or (photo.ndim == 3 and photo.shape[2] == 3)):
        raise UserError(
            "a photo as an array is uint8 [H W 3] or [H W], 0 to 255; "
            f"got {photo.dtype} {list(photo.shape)}"
        )
    return Image.fromarray(photo.reshape(photo.shape[:2]) if gray else photo)
