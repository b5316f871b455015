"""ResNets: torchvision's `layer2.0.conv1` is our `stage2/block1/conv1`; timm's names are the same,
but for its deep stem and the average pooling in ResNet-D's projections."""

from __future__ import annotations

import re

import numpy as np

from flax_cnns import layers
from flax_cnns.models.resnet import ResNet


def torch(model: ResNet) -> list[tuple]:
    """torchvision's and timm's."""
    rules = [
        (r"layer(\d+)\.(\d+)\.conv(\d)", lambda m: f"{block(m)}/conv{m[3]}"),
        (r"layer(\d+)\.(\d+)\.bn(\d)", lambda m: f"{block(m)}/norm{m[3]}"),
        (r"layer(\d+)\.(\d+)\.se\.fc1", lambda m: f"{block(m)}/se/reduce", dense),
        (r"layer(\d+)\.(\d+)\.se\.fc2", lambda m: f"{block(m)}/se/expand", dense),
        ("fc", "head"),
    ]
    first = 1 if model.shortcut == "D" else 0  # behind the pooling
    for i, ours in enumerate(("projection", "projection_norm"), first):
        rule = rf"layer(\d+)\.(\d+)\.downsample\.{i}"
        rules.append((rule, lambda m, ours=ours: f"{block(m)}/{ours}"))
    if not has_deep_stem(model):
        return [*rules, ("conv1", "stem/conv"), ("bn1", "stem/norm")]
    deep = [("0", "conv1"), ("1", "norm1"), ("3", "conv2"), ("4", "norm2"), ("6", "conv3")]
    rules += [(rf"conv1\.{theirs}", f"stem/{ours}") for theirs, ours in deep]
    return [*rules, ("bn1", "stem/norm3")]


def has_deep_stem(model: ResNet) -> bool:
    return getattr(model.stem, "func", model.stem) is layers.DeepStem


def dense(kernel: np.ndarray) -> np.ndarray:
    """Of a 1x1 convolution that stands for a dense layer: [out in 1 1] -> [in out]."""
    return kernel[:, :, 0, 0].T


def block(match: re.Match) -> str:
    """Of a regex with the numbers of stage and block, theirs from 0."""
    return f"stage{match[1]}/block{int(match[2]) + 1}"


def _keras_block(match: re.Match) -> str:  # conv2 is stage 1
    return f"stage{int(match[1]) - 1}/block{match[2]}"


KERAS = [
    ("conv1_conv", "stem/conv"),
    ("conv1_bn", "stem/norm"),
    (r"conv(\d)_block(\d+)_0_conv", lambda m: f"{_keras_block(m)}/projection"),
    (r"conv(\d)_block(\d+)_0_bn", lambda m: f"{_keras_block(m)}/projection_norm"),
    (r"conv(\d)_block(\d+)_(\d)_conv", lambda m: f"{_keras_block(m)}/conv{m[3]}"),
    (r"conv(\d)_block(\d+)_(\d)_bn", lambda m: f"{_keras_block(m)}/norm{m[3]}"),
    ("predictions", "head"),
]
TABLES = {"torchvision": torch, "timm": torch, "keras": KERAS}
