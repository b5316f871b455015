"""Records what imagecorruptions makes of a photograph, for test_corruptions.py.

    pip install --no-deps imagecorruptions-imaug==1.1.5; pip install numba opencv-python-headless
    python -m tests.evaluation.make_corruptions

Writes tests/evaluation/corruptions.npz, and prints the statistics of the package's photographs of
frost. Random corruptions get the numbers of `draw`, which the test draws again.
"""

from __future__ import annotations

import importlib.resources
import io
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

FILE = Path(__file__).parent / "corruptions.npz"
SHAPE = (40, 72, 3)  # larger than CIFAR-C's
FIXED = (
    "defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression",
    "gaussian_blur", "saturate",
)  # fmt: skip
NOISES = ("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise")
LEVELS = (40, 128, 220)  # of the gray images for noise
ANGLE = -100.0  # degrees
ELASTIC = 250 * 0.085 * 0.005  # imagecorruptions' severity 3, as a share of the height


def draw(shape: tuple[int, ...], normal: bool = False) -> np.ndarray:
    random = np.random.default_rng(7)
    return random.normal(size=shape) if normal else random.uniform(size=shape)


def describe(values: np.ndarray) -> np.ndarray:
    """Mean, standard deviation and skewness of values 0 to 255."""
    values = np.asarray(values, np.float64)
    centered = values - values.mean()
    return np.array([values.mean(), centered.std(), (centered**3).mean() / centered.std() ** 3])


def main() -> None:
    import skimage.data
    from imagecorruptions import corruptions as theirs

    photo = Image.fromarray(skimage.data.astronaut())
    photo = photo.crop((120, 20, 300, 120)).resize(SHAPE[1::-1], Image.Resampling.BICUBIC)
    small = photo.resize((32, 32), Image.Resampling.BICUBIC)
    found: dict[str, Any] = {"photo": np.asarray(photo), "small": np.asarray(small)}
    for name in FIXED:
        outputs = [np.asarray(getattr(theirs, name)(photo, level)) for level in (2, 5)]
        found[name] = np.uint8(outputs)

    numbers = iter([])

    def uniform(low: float, high: float, size: Any = None) -> Any:
        if size is None:
            return ANGLE
        count = int(np.prod(size))
        return low + (high - low) * np.array([next(numbers) for _ in range(count)]).reshape(size)

    def normal(size: Any, loc: float, scale: float) -> np.ndarray:
        return loc + scale * draw(size, normal=True)

    with mock.patch.multiple(np.random, uniform=uniform, normal=normal):
        found["motion_blur"] = np.uint8(theirs.motion_blur(photo, 3))
        found["snow"] = np.uint8(theirs.snow(photo, 3))
        numbers = iter(draw((32 * 32,)))
        found["plasma"] = theirs.plasma_fractal(32, 1.7)
        numbers = iter(draw((2 * 40 * 40,)))  # square: its vertical moves are in heights too
        square = photo.crop((0, 0, 40, 40))
        found["elastic_transform"] = np.uint8(theirs.elastic_transform(square, 3))

    for name in NOISES:
        np.random.seed(0)
        rows = []
        for level in LEVELS:
            flat = np.full((300, 300, 3), level, np.uint8)
            rows.append([describe(np.uint8(getattr(theirs, name)(flat, s))) for s in (1, 5)])
        found[name] = np.array(rows, np.float32)

    found |= record_small(small, theirs)
    np.savez_compressed(FILE, **found)
    print(f"{FILE}: {FILE.stat().st_size} bytes")
    print_frost()


def record_small(small: Image.Image, theirs: Any) -> dict[str, np.ndarray]:
    """CIFAR-C's constants at severities 2 and 5, with the package's own parts."""
    import cv2

    image = np.asarray(small) / 255
    found: dict[str, list[np.ndarray]] = {}
    for radius, smoothing in ((0.4, 0.5), (1.5, 0.1)):
        blurred = cv2.filter2D(image, -1, theirs.disk(radius, smoothing))
        found.setdefault("small_defocus_blur", []).append(255 * np.clip(blurred, 0, 1))
    for factors in (np.arange(1, 1.11, 0.01), np.arange(1, 1.26, 0.01)):
        total = image + sum(theirs.clipped_zoom(image, f)[:32, :32] for f in factors)
        found.setdefault("small_zoom_blur", []).append(255 * total / (len(factors) + 1))
    for share in (0.9, 0.65):
        tiny = small.resize((int(32 * share),) * 2, Image.Resampling.BOX)
        found.setdefault("small_pixelate", []).append(
            np.asarray(tiny.resize((32, 32), Image.Resampling.BOX))
        )
    for quality in (65, 40):
        data = io.BytesIO()
        small.save(data, "JPEG", quality=quality)
        found.setdefault("small_jpeg_compression", []).append(np.asarray(Image.open(data)))
    return {name: np.uint8(images) for name, images in found.items()}


def print_frost() -> None:
    folder = importlib.resources.files("imagecorruptions") / "frost"
    statistics = []
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        if not file.name.endswith((".png", ".jpg")):
            continue
        with file.open("rb") as opened:
            pixels = np.asarray(Image.open(opened).convert("RGB")) / 255
        statistics.append([*pixels.mean((0, 1)), pixels.mean(-1).std()])
    print("frost: mean of red, green, blue and standard deviation", np.mean(statistics, 0).round(2))


if __name__ == "__main__":
    main()
