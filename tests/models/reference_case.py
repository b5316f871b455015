"""Weights, statistics and images by a rule on names and shapes, and our names as torchvision's.

No checkpoint need travel: whoever has the rule has the weights, on either side of a comparison.
"""

from __future__ import annotations

import re
import zlib
from pathlib import Path

import numpy as np

from flax_cnns import pytree

FOLDER = Path(__file__).parent / "reference"


def numbers(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """f32 of `shape` by its path: scales and variances from 0.5 to 1.5, He's kernels, the rest
    around zero."""
    # RandomState: NumPy froze its stream for good, where default_rng's may change.
    random = np.random.RandomState(zlib.crc32(path.encode()))
    if path.endswith(("/scale", "/var")):
        return random.uniform(0.5, 1.5, shape).astype(np.float32)
    std = np.sqrt(2 / np.prod(shape[:-1])) if path.endswith("/kernel") else 0.1
    return (std * random.standard_normal(shape)).astype(np.float32)


def fill(shapes: pytree.PyTree) -> dict:
    """Variables by `numbers`, shaped like the tree that `jax.eval_shape` gave."""
    flat = pytree.flatten(shapes)
    return pytree.unflatten({path: numbers(path, leaf.shape) for path, leaf in flat.items()})


def images(n: int, size: int) -> np.ndarray:
    """f32 [n size size 3]."""
    return np.random.RandomState(zlib.crc32(b"images")).randn(n, size, size, 3).astype(np.float32)


def torch_name(path: str) -> str:
    """`params/stage1/block2/conv1/kernel` -> `layer1.1.conv1.weight`."""
    _, *parts, leaf = path.split("/")
    leaf = {
        "kernel": "weight",
        "scale": "weight",
        "mean": "running_mean",
        "var": "running_var",
    }.get(leaf, leaf)
    module = ".".join(parts)
    module = re.sub(r"stage(\d+)\.block(\d+)", lambda m: f"layer{m[1]}.{int(m[2]) - 1}", module)
    module = module.replace("stem.conv", "conv1").replace("stem.norm", "bn1")
    module = module.replace("projection_norm", "downsample.1").replace("projection", "downsample.0")
    module = re.sub(r"\bnorm(\d)", r"bn\1", module).replace("head", "fc")
    return f"{module}.{leaf}"


def torch_layout(array: np.ndarray) -> np.ndarray:
    """Kernels [H W in out] -> [out in H W] and [in out] -> [out in]; the rest as it is."""
    return np.ascontiguousarray(array.transpose({4: (3, 2, 0, 1), 2: (1, 0)}.get(array.ndim, (0,))))
