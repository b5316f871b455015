"""Inception v3. Our names are those of torchvision and timm in lower case; Keras counts its layers.

The published weights of torchvision and Keras take images scaled to (x - 0.5) / 0.5 in every
channel, with x from 0 to 1. torchvision's own transforms normalize otherwise, and `transform_input`
corrects that.
"""

from __future__ import annotations

from flax_cnns.models.inception_v3 import InceptionV3
from flax_cnns.weights import name_maps

LEAVES = {"conv": "conv", "bn": "norm"}


def _torch_rules(model: InceptionV3) -> name_maps.Rules:
    heads = [
        (r"AuxLogits\.conv0\.(conv|bn)", lambda m: f"aux1/conv1/{LEAVES[m[1]]}"),
        (r"AuxLogits\.conv1\.(conv|bn)", lambda m: f"aux1/conv2/{LEAVES[m[1]]}"),
        (r"AuxLogits\.fc", "aux1/head"),
    ]
    return [
        (r"Conv2d_(\d\w)_\dx\d\.(conv|bn)", lambda m: f"conv{m[1]}/{LEAVES[m[2]]}"),
        (r"Mixed_(\d\w)\.(\w+)\.(conv|bn)", lambda m: f"mixed{m[1]}/{m[2]}/{LEAVES[m[3]]}"),
        *(heads if model.aux else [(r"AuxLogits\..*", name_maps.UNUSED)]),
        (r"fc", "head"),
    ]


_A = ["1x1", "5x5_1", "5x5_2", "3x3dbl_1", "3x3dbl_2", "3x3dbl_3", "_pool"]
_B = ["3x3", "3x3dbl_1", "3x3dbl_2", "3x3dbl_3"]
_C = ["1x1", "7x7_1", "7x7_2", "7x7_3"] + [f"7x7dbl_{i}" for i in range(1, 6)] + ["_pool"]
_D = ["3x3_1", "3x3_2", "7x7x3_1", "7x7x3_2", "7x7x3_3", "7x7x3_4"]
_E = ["1x1", "3x3_1", "3x3_2a", "3x3_2b", "3x3dbl_1", "3x3dbl_2", "3x3dbl_3a", "3x3dbl_3b", "_pool"]
_BLOCKS = {"5b": _A, "5c": _A, "5d": _A, "6a": _B, "6b": _C, "6c": _C, "6d": _C, "6e": _C}
_BLOCKS |= {"7a": _D, "7b": _E, "7c": _E}

# Our convolutions, in the order in which Keras creates conv2d_0, conv2d_1, ...
KERAS_ORDER = [
    *("conv1a", "conv2a", "conv2b", "conv3b", "conv4a"),
    *(f"mixed{block}/branch{name}" for block, names in _BLOCKS.items() for name in names),
]
KERAS = [
    *((f"conv2d_{i}", f"{name}/conv") for i, name in enumerate(KERAS_ORDER)),
    *((f"batch_normalization_{i}", f"{name}/norm") for i, name in enumerate(KERAS_ORDER)),
    (r"predictions", "head"),
]

TABLES = {"torchvision": _torch_rules, "timm": _torch_rules, "keras": KERAS}
