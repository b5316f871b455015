"""ResNets. torchvision's `layer2.0.conv1` is our `stage2/block1/conv1`.

timm has the same names, except in its deep stem and in ResNet-D's projections, where an average
pooling comes first.
"""

from __future__ import annotations

import re

import numpy as np

from flax_cnns import layers
from flax_cnns.models.resnet import ResNet
from flax_cnns.weights.name_maps import Rules


def torch_rules(model: ResNet) -> Rules:
    """Rules for torchvision and timm."""
    rules: Rules = [
        (r"layer(\d+)\.(\d+)\.conv(\d)", lambda m: f"{block_path(m)}/conv{m[3]}"),
        (r"layer(\d+)\.(\d+)\.bn(\d)", lambda m: f"{block_path(m)}/norm{m[3]}"),
        (r"layer(\d+)\.(\d+)\.se\.fc1", lambda m: f"{block_path(m)}/se/reduce", torch_dense),
        (r"layer(\d+)\.(\d+)\.se\.fc2", lambda m: f"{block_path(m)}/se/expand", torch_dense),
        ("fc", "head"),
    ]
    first = 1 if model.shortcut == "D" else 0  # in "D" the pooling is number 0
    for i, ours in enumerate(("projection", "projection_norm"), first):
        rule = rf"layer(\d+)\.(\d+)\.downsample\.{i}"
        rules.append((rule, lambda m, ours=ours: f"{block_path(m)}/{ours}"))
    if not has_deep_stem(model):
        return [*rules, ("conv1", "stem/conv"), ("bn1", "stem/norm")]
    deep = [("0", "conv1"), ("1", "norm1"), ("3", "conv2"), ("4", "norm2"), ("6", "conv3")]
    rules += [(rf"conv1\.{theirs}", f"stem/{ours}") for theirs, ours in deep]
    return [*rules, ("bn1", "stem/norm3")]


def has_deep_stem(model: ResNet) -> bool:
    """Whether the stem is `layers.DeepStem`, also as a partial."""
    return getattr(model.stem, "func", model.stem) is layers.DeepStem


def torch_dense(kernel: np.ndarray) -> np.ndarray:
    """PyTorch's 1x1 convolution in place of a dense layer: [out in 1 1] -> [in out]."""
    return kernel[:, :, 0, 0].T


def block_path(match: re.Match) -> str:
    """Our path of the block whose stage and block numbers are groups 1 and 2, blocks from 0."""
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
TABLES = {"torchvision": torch_rules, "timm": torch_rules, "keras": KERAS}
