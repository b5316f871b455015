"""Image files and arrays -> uint8 squares of the size that the network sees, by PIL on the host."""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import struct
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from flax_cnns.errors import UserError

# Incremented whenever a file gives other pixels than before. 2 obeys EXIF and every transparency.
READER = 2

# What PIL raises for a file that it cannot decode.
DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


LFS = b"version https://git-lfs"  # how a pointer begins, whose file was not fetched


class DamagedImage(UserError):
    """An image that cannot be decoded; `where` names it."""

    def __init__(self, where: str, why: Exception):
        super().__init__(
            f"cannot decode {where}: {why}; mend or delete it, or set data.skip_damaged=True"
        )
        self.where, self.why = where, why

    def __reduce__(self):  # Errors of worker processes travel pickled.
        return DamagedImage, (self.where, self.why)


class WrongLabel(UserError):
    """A label that is none of the data set's classes; `where` names the example."""

    def __init__(self, where: str, label: int, num_classes: int):
        said = "it has no label (-1)" if label == -1 else f"its label is {label}"
        super().__init__(f"{where}: {said}; expected 0 to {num_classes - 1}")
        self.where, self.label, self.num_classes = where, label, num_classes

    def __reduce__(self):
        return WrongLabel, (self.where, self.label, self.num_classes)


class Source(Protocol):
    """Images that are decoded when they are read. Its `repr` is stable: Grain saves it."""

    labels: np.ndarray | None  # i32 [N]; None where it would take reading every example

    def __len__(self) -> int: ...

    def open(self, i: int) -> tuple[Image.Image, int]:
        """Image (of any size and mode, perhaps not decoded yet) and label."""

    def where(self, i: int) -> str:
        """What to call example `i` in an error message."""

    def fetch(self, rows: np.ndarray) -> Source:
        """The same source with these rows at hand, where reading many at once is quicker."""


@dataclasses.dataclass(frozen=True)
class ArraySource:
    images: np.ndarray  # u8 [N H W C]
    labels: np.ndarray
    name: str

    def __len__(self) -> int:
        return len(self.images)

    def open(self, i: int) -> tuple[Image.Image, int]:
        image = self.images[i]
        return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image), self.labels[i]

    def where(self, i: int) -> str:
        return f"{self.name}, image {i}"

    def fetch(self, rows: np.ndarray) -> Source:
        return self

    def __repr__(self) -> str:
        return f"ArraySource({self.name}, {len(self)})"


@dataclasses.dataclass(frozen=True)
class FileSource:
    paths: Sequence[str]
    labels: np.ndarray
    name: str
    root: str = ""  # of the data set: all paths begin with it
    # Paths of opened files that hold more than one picture; each process has its own.
    several: set[str] = dataclasses.field(default_factory=set)

    @property
    def names(self) -> list[str]:
        """The paths below the root, which do not change when the data set moves."""
        return [path[len(self.root) + 1 :] for path in self.paths]

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, i: int) -> tuple[Image.Image, int]:
        path = self.paths[i]
        try:
            image = Image.open(path)
        except UnidentifiedImageError:
            with open(path, "rb") as file:
                if file.read(len(LFS)) != LFS:
                    raise
            raise UnidentifiedImageError(
                "it is a pointer of Git LFS, not an image; run git lfs pull"
            ) from None
        if getattr(image, "is_animated", False) and image.format != "MPO":
            self.several.add(path)  # only the first is used
        return image, self.labels[i]

    def where(self, i: int) -> str:
        return self.paths[i]

    def fetch(self, rows: np.ndarray) -> Source:
        return self

    def __repr__(self) -> str:
        return f"FileSource({self.name}, {len(self)})"


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    records: Any  # tfds.data_source whose images are not decoded
    image_key: str
    label_key: str
    name: str
    num_classes: int
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.records)

    def open(self, i: int) -> tuple[Image.Image, int]:
        record = self.records[int(i)]
        image, label = record[self.image_key], int(record[self.label_key])
        if not 0 <= label < self.num_classes:
            raise WrongLabel(self.where(i), label, self.num_classes)
        if isinstance(image, bytes):
            return Image.open(io.BytesIO(image)), label
        image = np.asarray(image)
        return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image), label

    def where(self, i: int) -> str:
        return f"{self.name}, example {i}"

    def fetch(self, rows: np.ndarray) -> Source:
        rows = [int(row) for row in rows]  # many at a time is quicker than one by one
        records = dict(zip(rows, self.records.__getitems__(rows)))
        return dataclasses.replace(self, records=records)

    def __repr__(self) -> str:
        return f"TfdsSource({self.name}, {self.label_key}, {len(self)})"


@dataclasses.dataclass(frozen=True)
class Subset:
    """Some rows of another source."""

    source: Source
    rows: np.ndarray
    name: str

    @property
    def labels(self) -> np.ndarray | None:
        return None if self.source.labels is None else self.source.labels[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def open(self, i: int) -> tuple[Image.Image, int]:
        return self.source.open(self.rows[i])

    def where(self, i: int) -> str:
        return self.source.where(self.rows[i])

    def fetch(self, rows: np.ndarray) -> Source:
        return dataclasses.replace(self, source=self.source.fetch(self.rows[rows]))

    def __repr__(self) -> str:
        return f"Subset({self.source!r}, {self.name}, {len(self)})"


@dataclasses.dataclass(frozen=True)
class Relabelled:
    """Another source under labels of our own."""

    source: Source
    labels: np.ndarray  # i32 [N]
    name: str

    def __len__(self) -> int:
        return len(self.source)

    def open(self, i: int) -> tuple[Image.Image, int]:
        return self.source.open(i)[0], self.labels[i]

    def where(self, i: int) -> str:
        return self.source.where(i)

    def fetch(self, rows: np.ndarray) -> Source:
        return dataclasses.replace(self, source=self.source.fetch(rows))

    def __repr__(self) -> str:
        return f"Relabelled({self.source!r}, {self.name}, {len(self)})"


def several(source: Source) -> set[str]:
    """`FileSource.several` of a source, also below Subset and Relabelled; else empty."""
    while isinstance(source, Subset | Relabelled):
        source = source.source
    return source.several if isinstance(source, FileSource) else set()


def read_labels(source: Source) -> np.ndarray:
    """i32 [N]; reads every example, without decoding it, where the source does not know them.

    Raises DamagedImage.
    """
    if source.labels is not None:
        return source.labels
    labels = np.empty(len(source), np.int32)
    for rows in np.array_split(np.arange(len(source)), len(source) // 1024 + 1):
        part = source.fetch(rows)
        for i in rows:
            try:
                image, labels[i] = part.open(i)
                image.close()
            except WrongLabel:
                raise
            except DAMAGE as why:
                raise DamagedImage(source.where(i), why) from why
    return labels


Box = tuple[float, float, float, float]  # left, top, right, bottom in the image's own pixels


def centre_box(width: int, height: int, share: float = 1.0) -> Box:
    """The central square; `share` of the shorter side: 0.875 is the 224 of 256 of the papers.

    Resize(256) and CenterCrop(224) take the same part of a square image. Of others they round the
    longer side down, and the corner to a whole pixel: an edge is up to one of 224 pixels away.
    """
    side = min(width, height) * share
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def random_box(
    rng: np.random.Generator, width: int, height: int, share: tuple[float, float]
) -> Box:
    """As `augment.random_resized_crop`: ten tries at a random share and ratio, else the centre."""
    for _ in range(10):
        area = rng.uniform(*share) * width * height
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            return left, top, left + w, top + h
    return centre_box(width, height)


# What turns the stored image upright, by EXIF's orientation (1 is upright).
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
    image: Image.Image, box_of: Callable[[int, int], Box], size: int, channels: int
) -> np.ndarray:
    """A part of the image, upright and resized (bilinear, antialiased): u8 [size size channels].

    `box_of(width, height)` gives the part, in pixels of the upright image.
    """
    turn = _orientation(image)
    width, height = image.size
    box = box_of(height, width) if turn > 4 else box_of(width, height)
    box = _stored_box(box, turn, width, height)
    if image.format == "JPEG":
        # A large JPEG for a small square: let the decoder halve it once or thrice, never below the
        # wanted size.
        wide, high = box[2] - box[0], box[3] - box[1]
        image.draft(None, (math.ceil(width * size / wide), math.ceil(height * size / high)))
        sx, sy = image.width / width, image.height / height
        box = (box[0] * sx, box[1] * sy, box[2] * sx, box[3] * sy)
    image = to_channels(image, channels)
    box = (max(box[0], 0), max(box[1], 0), min(box[2], image.width), min(box[3], image.height))
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    if turn in _TURNS:  # now that it is small
        image = image.transpose(_TURNS[turn])
    return np.asarray(image).reshape(size, size, channels)


def upright(image: Image.Image, channels: int) -> Image.Image:
    """The whole image, turned as its EXIF says, at its full size, L or RGB."""
    turn = _orientation(image)
    image = to_channels(image, channels)
    return image.transpose(_TURNS[turn]) if turn in _TURNS else image


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1 where it is absent or unreadable. Decodes all but JPEG."""
    if image.format is None and not image.info:
        return 1  # an array
    if image.format != "JPEG":
        _load(image)  # PNG may have EXIF behind its pixels
    if image.format == "TIFF":
        return 1  # PIL has turned it while decoding
    try:
        turn = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # PIL raises a dozen kinds; broken EXIF does not matter for pixels
        return 1
    return turn if isinstance(turn, int) and turn in _TURNS else 1


def _load(image: Image.Image) -> None:
    """Decodes. PIL scales grays of 2 and 4 bits and colors of 16 bits to 8 bits, but not the
    transparent value: that is scaled here."""
    packed = image.tile[0][3] if getattr(image, "tile", None) else None  # how PNG stores pixels
    image.load()
    clear = image.info.get("transparency")
    if clear is None:
        return
    if packed == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    elif (packed == "L;2" and clear < 4) or (packed == "L;4" and clear < 16):
        image.info["transparency"] = clear * (85 if packed == "L;2" else 17)


def _stored_box(box: Box, turn: int, width: int, height: int) -> Box:
    """A box of the upright image in pixels of the stored one, which is `width` x `height`."""
    left, top, right, bottom = box
    if turn in (5, 6, 7, 8):
        left, top, right, bottom = top, left, bottom, right
    if turn in (2, 3, 7, 8):
        left, right = width - right, width - left
    if turn in (3, 4, 6, 7):
        top, bottom = height - bottom, height - top
    return left, top, right, bottom


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """To grey (ITU-R 601 luma) or RGB; what is transparent becomes white, 16 bits become 8."""
    mode = "L" if channels == 1 else "RGB"
    _load(image)
    clear, palette = image.info.get("transparency"), image.palette
    alpha = palette is not None and palette.mode.endswith("A")
    alpha |= image.mode in ("LA", "PA", "RGBA", "RGBa")
    if image.mode[0] in "IF":
        image = _eight_bits(image, clear)
    elif alpha or clear is not None:
        if image.mode == "1" and clear:  # PIL 10 has 1 where later ones have 255
            image.info["transparency"] = 255
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)


def _eight_bits(image: Image.Image, clear: int | None) -> Image.Image:
    """The image with 8 bits. Integers up to 65535 keep their upper 8 bits. Floats are 0 to 1, or 0
    to 255 if one is above 1. Raises ValueError for other numbers, whose white is unknown."""
    numbers = np.asarray(image)
    low, high = numbers.min(), numbers.max()
    most = 255 if image.mode == "F" else 65535
    if not (low >= 0 and high <= most):  # NaN is neither
        expected = "0 to 1 or 0 to 255" if image.mode == "F" else "0 to 65535"
        raise ValueError(
            f"its pixels are numbers from {low:g} to {high:g}, expected {expected}; save it with 8 "
            "or 16 bits"
        )
    if image.mode == "F":
        small = np.round(numbers * 255) if high <= 1 else numbers
    else:
        small = numbers >> 8
    return Image.fromarray(np.where(numbers == clear, 255, small).astype(np.uint8))


def read(
    source: Source,
    i: int,
    size: int,
    channels: int,
    *,
    share: float = 1.0,
    crop: tuple[float, float] = (),
    rng: np.random.Generator | None = None,
) -> tuple[np.ndarray, int]:
    """Example `i` as u8 [size size channels], and its label: the central square, or a random crop.

    Raises DamagedImage.
    """
    try:
        image, label = source.open(i)
        with image:
            box_of = functools.partial(centre_box, share=share)
            if crop:
                box_of = functools.partial(random_box, rng, share=crop)
            return read_box(image, box_of, size, channels), label
    except WrongLabel:
        raise
    except DAMAGE as why:
        raise DamagedImage(source.where(i), why) from why


def read_all(
    source: Source, size: int, channels: int, *, share: float, threads: int, skip_damaged: bool
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """All examples: images u8 [N size size channels], labels i32 [N], what was skipped.

    Raises DamagedImage, or skips if `skip_damaged`.
    """
    if isinstance(source, ArraySource) and source.images.shape[1:] == (size, size, channels):
        return source.images, source.labels, []
    images = np.empty((len(source), size, size, channels), np.uint8)
    labels = np.full(len(source), -1, np.int32)
    damaged = {}

    def fill(part: Source, i: int) -> None:
        try:
            images[i], labels[i] = read(part, i, size, channels, share=share)
        except DamagedImage as error:
            if not skip_damaged:
                raise
            damaged[i] = error.where

    with ThreadPoolExecutor(max(1, threads)) as pool:
        for rows in np.array_split(np.arange(len(source)), len(source) // 1024 + 1):
            part = source.fetch(rows)
            # With small images, passing work to threads takes longer than the work.
            for _ in (pool.map if threads > 1 else map)(functools.partial(fill, part), rows):
                pass
    if damaged:
        whole = np.setdiff1d(np.arange(len(source)), list(damaged))
        images, labels = images[whole], labels[whole]
    return images, labels, [damaged[i] for i in sorted(damaged)]
