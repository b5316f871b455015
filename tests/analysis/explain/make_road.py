"""Writes reference/road.npz: images whose removed pixels pytorch-grad-cam imputes, without noise.

pip install --no-deps grad-cam==1.5.7 ttach && pip install opencv-python-headless
python -m tests.analysis.explain.make_road
"""

from __future__ import annotations

import sys

import numpy as np
from scipy import ndimage

from tests.analysis.explain.make_reference import FOLDER
from tests.models import foreign

PATH = FOLDER / "road.npz"


def make_cases() -> tuple[np.ndarray, np.ndarray]:
    """Returns images f32 [4 20 17 3] and which pixels are kept [4 20 17]: scattered or connected,
    few or nearly all removed, at the border too."""
    generator = np.random.default_rng(0)
    images = generator.normal(size=(4, 20, 17, 3)).astype(np.float32)
    noise = generator.random((4, 20, 17))
    noise[2:] = ndimage.gaussian_filter(noise[2:], (0, 3, 3))
    shares = np.array([0.1, 0.9, 0.5, 0.95])
    return images, np.array([a >= np.quantile(a, share) for a, share in zip(noise, shares)])


def impute_by_pytorch_grad_cam() -> np.ndarray:
    foreign.torchvision()  # pytorch-grad-cam imports it, and it needs help
    import torch
    from pytorch_grad_cam.metrics.road import NoisyLinearImputer

    impute = NoisyLinearImputer(noise=0.0)
    found = [
        impute(torch.tensor(image.transpose(2, 0, 1)), torch.tensor(keep, dtype=torch.float32))
        for image, keep in zip(*make_cases())
    ]
    return np.stack([each.numpy().transpose(1, 2, 0) for each in found])


if __name__ == "__main__":
    np.savez_compressed(PATH, images=impute_by_pytorch_grad_cam())
    sys.exit(print(f"{PATH.name}: {PATH.stat().st_size:,} bytes"))
