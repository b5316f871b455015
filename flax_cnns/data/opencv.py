"""Decoding of JPEGs by OpenCV (`data.decoder="opencv"`), in less time than by Pillow.

OpenCV decodes complete JPEGs of one gray or three color channels. Pillow reads all other files:
CMYK, other formats, and JPEGs without an end marker, because OpenCV fills what a truncated file
lacks with gray and reports no error.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy as np
from PIL import Image

from flax_cnns.errors import UserError

END = b"\xff\xd9"  # the marker at the end of a JPEG
TAIL = 64  # bytes after which zeros may follow the marker
REDUCTIONS = (8, 4, 2)
BLUR = 1.4  # an axis that shrinks by this factor or more is blurred first


def import_opencv() -> ModuleType:
    """Imports OpenCV. Raises `UserError` if it is not installed."""
    try:
        import cv2
    except ImportError:
        raise UserError(
            "data.decoder='opencv' needs OpenCV: pip install \"flax_cnns[opencv]\" (or"
            " opencv-python-headless), or set data.decoder='pillow'"
        ) from None
    if cv2.getNumThreads() > 1:
        cv2.setNumThreads(1)  # the loader has threads of its own, one for each image
    return cv2


def is_supported(image: Image.Image) -> bool:
    """Whether OpenCV decodes this image, which Pillow has opened but not decoded."""
    return image.format == "JPEG" and image.mode in ("L", "RGB")


def read_boxes(
    image: Image.Image,
    boxes: Sequence[tuple[float, float, float, float]],
    size: int,
    channels: int,
) -> list[np.ndarray] | None:
    """Reads boxes as u8 [size size channels]: (left, top, right, bottom) in stored pixels.

    Edges are rounded to whole pixels. The decoder reduces what shrinks twofold or more, and an axis
    that still shrinks by `BLUR` or more is blurred before it is resized linearly. Returns None if
    Pillow must read the image.
    """
    data = _read_bytes(image)
    if data is None:
        return None
    cv2 = import_opencv()
    width, height = image.size
    wide, high = (min(box[i + 2] - box[i] for box in boxes) for i in (0, 1))
    scale = next((r for r in REDUCTIONS if wide >= size * r and high >= size * r), 1)
    color = "COLOR" if channels == 3 else "GRAYSCALE"
    kind = f"IMREAD_REDUCED_{color}_{scale}" if scale > 1 else f"IMREAD_{color}"
    flags = getattr(cv2, kind) | cv2.IMREAD_IGNORE_ORIENTATION
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if pixels is None or pixels.shape[:2] != (-(-height // scale), -(-width // scale)):
        return None
    crops = []
    for box in boxes:
        left, top, right, bottom = (round(edge / scale) for edge in box)
        left, top = min(left, pixels.shape[1] - 1), min(top, pixels.shape[0] - 1)
        part = pixels[max(top, 0) : max(bottom, top + 1), max(left, 0) : max(right, left + 1)]
        part = _resize(cv2, part, size)
        if channels == 3:
            part = cv2.cvtColor(part, cv2.COLOR_BGR2RGB)
        crops.append(part.reshape(size, size, channels))
    return crops


def _read_bytes(image: Image.Image) -> bytes | None:
    """Returns the bytes of a complete JPEG that is not decoded yet; None for other images."""
    if not is_supported(image):
        return None
    file = getattr(image, "fp", None)
    if file is None:  # already decoded
        return None
    at = file.tell()
    file.seek(0)
    data = file.read()
    file.seek(at)
    return data if data[-TAIL:].rstrip(b"\0").endswith(END) else None


def _resize(cv2: ModuleType, part: np.ndarray, size: int) -> np.ndarray:
    """Resizes linearly. An axis that shrinks much is blurred first, by (1, 2, 1) / 4, as Pillow's
    bilinear filter would; OpenCV's INTER_AREA takes three times as long."""
    height, width = (3 if side >= BLUR * size else 1 for side in part.shape[:2])
    if (height, width) != (1, 1):
        part = cv2.GaussianBlur(part, (width, height), 0)
    return cv2.resize(part, (size, size), interpolation=cv2.INTER_LINEAR)
