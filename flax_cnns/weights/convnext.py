"""ConvNeXt. torchvision, timm and Keras compute the same, with three sets of names.

Our 1x1 convolutions are dense layers in theirs, except in timm's smallest networks. Keras's
networks begin by scaling images from 0 to 255; ours expect normalized images, as Keras's do with
`include_preprocessing=False`.
"""

from __future__ import annotations

import re

import numpy as np


def torch_pointwise(kernel: np.ndarray) -> np.ndarray:
    """PyTorch's dense layer [out in] or convolution [out in 1 1] -> [1 1 in out]."""
    return kernel.reshape(kernel.shape[:2]).T[None, None]


def keras_pointwise(kernel: np.ndarray) -> np.ndarray:
    """Keras's dense layer [in out] -> [1 1 in out]."""
    return kernel[None, None]


def _block(match: re.Match) -> str:  # timm and Keras count from 0
    return f"stage{int(match[1]) + 1}/block{int(match[2]) + 1}"


def _features(match: re.Match) -> str:  # in torchvision, a downsampling follows each stage
    return f"stage{(int(match[1]) + 1) // 2}/block{int(match[2]) + 1}"


def _downsample(match: re.Match) -> str:
    return f"downsample{int(match[1]) // 2}"


TORCHVISION = [
    (r"features\.0\.0", "stem/conv"),
    (r"features\.0\.1", "stem/norm"),
    (r"features\.([246])\.0", lambda m: f"{_downsample(m)}/norm"),
    (r"features\.([246])\.1", lambda m: f"{_downsample(m)}/conv"),
    (r"features\.(\d)\.(\d+)\.block\.0", lambda m: f"{_features(m)}/depthwise"),
    (r"features\.(\d)\.(\d+)\.block\.2", lambda m: f"{_features(m)}/norm"),
    (r"features\.(\d)\.(\d+)\.block\.3", lambda m: f"{_features(m)}/expand", torch_pointwise),
    (r"features\.(\d)\.(\d+)\.block\.5", lambda m: f"{_features(m)}/project", torch_pointwise),
    (r"features\.(\d)\.(\d+)\.layer_scale", lambda m: f"{_features(m)}/layer_scale", np.ravel),
    (r"classifier\.0", "norm"),
    (r"classifier\.2", "head"),
]
TIMM = [
    (r"stem\.0", "stem/conv"),
    (r"stem\.1", "stem/norm"),
    (r"stages\.(\d)\.downsample\.0", r"downsample\1/norm"),
    (r"stages\.(\d)\.downsample\.1", r"downsample\1/conv"),
    (r"stages\.(\d)\.blocks\.(\d+)\.conv_dw", lambda m: f"{_block(m)}/depthwise"),
    (r"stages\.(\d)\.blocks\.(\d+)\.norm", lambda m: f"{_block(m)}/norm"),
    (r"stages\.(\d)\.blocks\.(\d+)\.mlp\.fc1", lambda m: f"{_block(m)}/expand", torch_pointwise),
    (r"stages\.(\d)\.blocks\.(\d+)\.mlp\.fc2", lambda m: f"{_block(m)}/project", torch_pointwise),
    (r"stages\.(\d)\.blocks\.(\d+)\.gamma", lambda m: f"{_block(m)}/layer_scale"),
    (r"head\.norm", "norm"),
    (r"head\.fc", "head"),
]
_AT = r".*_stage_(\d)_block_(\d+)_"
KERAS = [
    (r".*_stem_conv", "stem/conv"),
    (r".*_stem_layernorm", "stem/norm"),
    (r".*_downsampling_layernorm_(\d)", lambda m: f"downsample{int(m[1]) + 1}/norm"),
    (r".*_downsampling_conv_(\d)", lambda m: f"downsample{int(m[1]) + 1}/conv"),
    (_AT + "depthwise_conv", lambda m: f"{_block(m)}/depthwise"),
    (_AT + "layernorm", lambda m: f"{_block(m)}/norm"),
    (_AT + "pointwise_conv_1", lambda m: f"{_block(m)}/expand", keras_pointwise),
    (_AT + "pointwise_conv_2", lambda m: f"{_block(m)}/project", keras_pointwise),
    (_AT + r"layer_scale/variable(?:_\d+)?", lambda m: f"{_block(m)}/layer_scale"),
    (r".*_head_layernorm", "norm"),
    (r".*_head_dense", "head"),
]
TABLES = {"torchvision": TORCHVISION, "timm": TIMM, "keras": KERAS}
