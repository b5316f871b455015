"""One photograph that somebody hands over: a file, an array or a PIL image."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flax_cnns.data.images import DAMAGE
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.files import check_regular

Photo = str | os.PathLike | Image.Image | np.ndarray


@contextlib.contextmanager
def opened(photo: Photo) -> Iterator[Image.Image]:
    """The photograph as it is stored, perhaps not decoded yet: `images.read_box` and
    `images.upright` turn it as its EXIF says, also if it is a PIL image.

    Arrays are u8 [H W], [H W 1] or [H W 3]. Raises `UserError` where there is no such file, and for
    what fails to decode in the `with` block.
    """
    if isinstance(photo, np.ndarray):
        yield _of_array(photo)
    elif isinstance(photo, Image.Image):
        with _named(f"photo {getattr(photo, 'filename', '') or photo}"):
            # `read_box` decodes JPEG small: the caller's own keeps its size.
            yield photo.copy() if photo.format == "JPEG" else photo
    else:
        path = Path(photo)
        if not path.exists():
            folder = path.parent
            near = [other.name for other in folder.iterdir()] if folder.is_dir() else []
            near = did_you_mean(path.name, near)
            raise UserError(f"there is no photo {os.fspath(photo)!r}{near}")
        check_regular(path)
        with _named(f"photo {path}"), Image.open(path) as image:
            yield image


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """A context that makes a `UserError`, which names `what`, of a failure to decode."""
    try:
        yield
    except UserError:
        raise
    except DAMAGE as why:
        reason = f"{why.strerror}" if getattr(why, "strerror", None) else str(why)
        raise UserError(f"cannot read the {what}: {reason}") from why


def check(photos: Iterable[Photo]) -> None:
    """Raises `UserError` for the first that is no image, before anything slow is done for it."""
    for photo in photos:
        with opened(photo):
            pass


def _of_array(photo: np.ndarray) -> Any:
    grey = photo.ndim == 2 or (photo.ndim == 3 and photo.shape[2] == 1)
    if photo.dtype != np.uint8 or not (grey or (photo.ndim == 3 and photo.shape[2] == 3)):
        raise UserError(
            "a photo as an array is uint8 [H W 3] or [H W], 0 to 255; "
            f"got {photo.dtype} {list(photo.shape)}"
        )
    return Image.fromarray(photo.reshape(photo.shape[:2]) if grey else photo)
