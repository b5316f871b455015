"""Image files and arrays -> uint8 squares of the size that the network sees, by PIL on the host."""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from flax_cnns.errors import UserError

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


LFS = b"version https://git-lfs"  # how a file begins that stands for one that was not fetched


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
    # Paths of files that were opened and hold more than one picture; a process notes its own.
    several: set[str] = dataclasses.field(default_factory=set)

    @property
    def names(self) -> list[str]:
        """The paths below the root: they stay when the data set moves."""
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
            raise UnidentifiedImageError("a pointer of Git LFS; run git lfs pull") from None
        if getattr(image, "is_animated", False) and image.format != "MPO":
            self.several.add(path)  # the first counts
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
    """What a source of files, or one made of it, noted of files with several pictures."""
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
    """The central square; `share` of the shorter side: 0.875 is the 224 of 256 of the papers."""
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


def read_box(image: Image.Image, box: Box, size: int, channels: int) -> np.ndarray:
    """The part `box` of an image, resized (bilinear, antialiased): u8 [size size channels]."""
    if image.format == "JPEG":
        # A large JPEG for a small square: let the decoder halve it once or thrice, never below the
        # wanted size.
        width, height = image.size
        wide, high = box[2] - box[0], box[3] - box[1]
        image.draft(None, (math.ceil(width * size / wide), math.ceil(height * size / high)))
        sx, sy = image.width / width, image.height / height
        box = (box[0] * sx, box[1] * sy, box[2] * sx, box[3] * sy)
    image = to_channels(image, channels)
    box = (max(box[0], 0), max(box[1], 0), min(box[2], image.width), min(box[3], image.height))
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return np.asarray(image).reshape(size, size, channels)


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """To grey (ITU-R 601 luma) or RGB; what is transparent becomes white, 16 bits become 8."""
    mode = "L" if channels == 1 else "RGB"
    if image.mode == mode:
        return image
    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda value: value / 256)
    elif "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


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
            box = random_box(rng, *image.size, crop) if crop else centre_box(*image.size, share)
            return read_box(image, box, size, channels), label
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
