"""DenseNets. torchvision's `features.denseblock2.denselayer3.conv1` is our `block2/layer3/conv1`.

torchvision's networks have the names `norm1` and `conv2`, its published files `norm.1` and
`conv.2`. Both forms are accepted.
"""

from __future__ import annotations

import re

from flax_cnns import layers
from flax_cnns.models.densenet import DenseNet
from flax_cnns.weights import name_maps


def _torch_rules(model: DenseNet) -> name_maps.Rules:
    def stem(m: re.Match) -> str:
        # The convolutions of a deep stem are numbered, from 0 in torchvision and from 1 here.
        return f"stem/{m[1]}{int(m[2]) + 1}" if model.stem is layers.DeepStem else f"stem/{m[1]}"

    return [
        (r"features\.norm5", "norm"),
        (r"features\.(conv|norm)(\d)", stem),
        (r"features\.denseblock(\d)\.denselayer(\d+)\.(conv|norm)\.?(\d)", r"block\1/layer\2/\3\4"),
        (r"features\.transition(\d)\.(conv|norm)", r"transition\1/\2"),
        (r"classifier", "head"),
    ]


KERAS = [  # conv1 and pool1 are the stem; block 1 is conv2, transition 1 is pool2
    (r"conv1_conv", "stem/conv"),
    (r"conv1_bn", "stem/norm"),
    (r"conv(\d)_block(\d+)_0_bn", lambda m: f"{_layer(m)}/norm1"),
    (r"conv(\d)_block(\d+)_1_conv", lambda m: f"{_layer(m)}/conv1"),
    (r"conv(\d)_block(\d+)_1_bn", lambda m: f"{_layer(m)}/norm2"),
    (r"conv(\d)_block(\d+)_2_conv", lambda m: f"{_layer(m)}/conv2"),
    (r"pool(\d)_bn", lambda m: f"transition{int(m[1]) - 1}/norm"),
    (r"pool(\d)_conv", lambda m: f"transition{int(m[1]) - 1}/conv"),
    (r"bn", "norm"),
    (r"predictions", "head"),
]
TABLES = {"torchvision": _torch_rules, "timm": _torch_rules, "keras": KERAS}


def _layer(match: re.Match) -> str:
    return f"block{int(match[1]) - 1}/layer{match[2]}"
