"""Pre-activation ResNets.

timm's `stages.1.blocks.0.conv1` and Keras's `conv3_block1_1_conv` are our `stage2/block1/conv1`.
"""

from __future__ import annotations

import re

import numpy as np


def _dense(kernel: np.ndarray) -> np.ndarray:
    """timm's head, a 1x1 convolution: [out in 1 1] -> [in out]."""
    return kernel[:, :, 0, 0].T


TIMM = [
    (r"stem\.conv", "stem/conv"),
    (
        r"stages\.(\d+)\.blocks\.(\d+)\.(conv|norm)(\d)",
        lambda m: f"{_timm_block(m)}/{m[3]}{m[4]}",
    ),
    (
        r"stages\.(\d+)\.blocks\.(\d+)\.downsample\.conv",
        lambda m: f"{_timm_block(m)}/projection",
    ),
    (r"norm", "norm"),
    (r"head\.fc", "head", _dense),
]
KERAS = [
    (r"conv1_conv", "stem/conv"),
    (r"conv(\d)_block(\d+)_preact_bn", lambda m: f"{_keras_block(m)}/norm1"),
    (r"conv(\d)_block(\d+)_0_conv", lambda m: f"{_keras_block(m)}/projection"),
    (r"conv(\d)_block(\d+)_(\d)_conv", lambda m: f"{_keras_block(m)}/conv{m[3]}"),
    (r"conv(\d)_block(\d+)_(\d)_bn", lambda m: f"{_keras_block(m)}/norm{int(m[3]) + 1}"),
    (r"post_bn", "norm"),
    (r"predictions", "head"),
]
TABLES = {"timm": TIMM, "keras": KERAS}


def _timm_block(match: re.Match) -> str:
    return f"stage{int(match[1]) + 1}/block{int(match[2]) + 1}"


def _keras_block(match: re.Match) -> str:
    return f"stage{int(match[1]) - 1}/block{match[2]}"
