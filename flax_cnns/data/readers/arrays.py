"""Arrays in memory as an image source."""

from __future__ import annotations

import dataclasses

import numpy as np
from PIL import Image

from flax_cnns.data.types import ArrayRows, ImageSource


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Images and labels in memory."""

    images: np.ndarray | ArrayRows  # u8 [N H W C]
    labels: np.ndarray
    name: str

    def __len__(self) -> int:
        return len(self.images)

    def open(self, i: int) -> tuple[Image.Image, int]:
        image = self.images[i]
        return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image), self.labels[i]

    def location(self, i: int) -> str:
        return f"{self.name}, image {i}"

    def fetch(self, rows: np.ndarray) -> ImageSource:
        return self

    def __repr__(self) -> str:
        return f"ArraySource({self.name}, {len(self)})"
