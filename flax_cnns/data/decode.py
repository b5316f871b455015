"""Reading examples of a source: uint8 squares of the network's image size, and labels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from flax_cnns.data.images import DECODING_ERRORS, center_box, random_box, read_box
from flax_cnns.data.readers.arrays import ArraySource
from flax_cnns.data.types import ArrayRows, DamagedImage, ImageSource, WrongLabel


def read_example(
    source: ImageSource,
    i: int,
    size: int,
    channels: int,
    *,
    share: float = 1.0,
    crop: tuple[float, float] | tuple[()] = (),
    rng: np.random.Generator | None = None,
    decoder: str = "pillow",
) -> tuple[np.ndarray, int]:
    """Reads example `i` as u8 [size size channels], and its label.

    The image is the central square, with `share` of the shorter side. If `crop` (the range of its
    share of the area) is given, the image is a random crop drawn from `rng`. Raises DamagedImage if
    the image cannot be decoded.
    """
    box_of = functools.partial(center_box, share=share)
    if crop:
        assert rng is not None
        box_of = functools.partial(random_box, rng, share=crop)
    reader = functools.partial(
        read_box, box_of=box_of, size=size, channels=channels, decoder=decoder
    )
    return read_with(source, i, reader)


def read_with(
    source: ImageSource, i: int, reader: Callable[[Image.Image], np.ndarray]
) -> tuple[np.ndarray, int]:
    """Returns `reader(image)` of example `i`, and its label.

    Raises DamagedImage if the image cannot be decoded.
    """
    try:
        image, label = source.open(i)
        with image:
            return reader(image), label
    except WrongLabel:
        raise
    except DECODING_ERRORS as error:
        raise DamagedImage(source.location(i), error) from error


def read_all(
    source: ImageSource,
    size: int,
    channels: int,
    *,
    share: float,
    threads: int,
    skip_damaged: bool,
    decoder: str = "pillow",
) -> tuple[np.ndarray | ArrayRows, np.ndarray, list[str]]:
    """Reads all examples: images u8 [N size size channels], labels i32 [N], locations of the images
    that were skipped.

    Damaged images are skipped if `skip_damaged`; otherwise they raise DamagedImage.
    """
    if isinstance(source, ArraySource) and source.images.shape[1:] == (size, size, channels):
        return source.images, source.labels, []
    images = np.empty((len(source), size, size, channels), np.uint8)
    labels = np.full(len(source), -1, np.int32)
    damaged: dict[int, str] = {}

    def fill(part: ImageSource, i: int) -> None:
        try:
            images[i], labels[i] = read_example(
                part, i, size, channels, share=share, decoder=decoder
            )
        except DamagedImage as error:
            if not skip_damaged:
                raise
            damaged[i] = error.location

    with ThreadPoolExecutor(max(1, threads)) as pool:
        for rows in np.array_split(np.arange(len(source)), len(source) // 1024 + 1):
            part = source.fetch(rows)
            # Small images take less time to decode than to pass to a thread.
            for _ in (pool.map if threads > 1 else map)(functools.partial(fill, part), rows):
                pass
    if damaged:
        whole = np.setdiff1d(np.arange(len(source)), list(damaged))
        images, labels = images[whole], labels[whole]
    return images, labels, [damaged[i] for i in sorted(damaged)]


def read_labels(source: ImageSource) -> np.ndarray:
    """Returns the labels i32 [N]. If the source does not know them, this opens every example
    without decoding it.

    Raises DamagedImage if an example cannot be opened.
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
            except DECODING_ERRORS as error:
                raise DamagedImage(source.location(i), error) from error
    return labels
