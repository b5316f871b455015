"""Inception-v4: timm numbers its parts. Inception-ResNet-v2: timm names them, Keras counts layers.

Of a convolution with its norm we have the two paths that `"stem/entry/{}1"` makes of "conv" and
"norm"; timm calls them `conv` and `bn` of one module.
"""

from __future__ import annotations

import re

from flax_cnns.models.inception_v4 import InceptionResNetV2, InceptionV4


def _layer(theirs: str, ours: str) -> list[tuple]:
    return [(rf"{theirs}\.conv", ours.format("conv")), (rf"{theirs}\.bn", ours.format("norm"))]


def _part(theirs: str, ours: str) -> list[tuple]:
    """`branch1.0` -> `branch2/{}1`, as `branch1`, a branch of one layer; `branch3` pools."""

    def path(match: re.Match) -> str:
        branch, place, kind = match.groups()
        kind = "conv" if kind == "conv" else "norm"
        if branch == "3":  # its place 0 is the mean
            return f"{ours}/pool/{kind}1"
        return f"{ours}/branch{int(branch) + 1}/{kind}{int(place or 0) + 1}"

    return [(rf"{theirs}\.branch(\d)(?:\.(\d))?\.(conv|bn)", path)]


def _timm(model: InceptionV4 | InceptionResNetV2) -> list[tuple]:
    return (_timm_v4 if isinstance(model, InceptionV4) else _timm_resnet)(model)


def _timm_v4(model: InceptionV4) -> list[tuple]:
    a, b, c = (
        [f"inception_{stage}/block{i + 1}" for i in range(depth)]
        for stage, depth in zip("abc", model.depths)
    )
    rules = [("last_linear", "head")]
    for i in range(3):
        rules += _layer(rf"features\.{i}", f"stem/entry/{{}}{i + 1}")
    rules += _layer(r"features\.3\.conv", "stem/mixed_3a/{}1")
    for branch, length in enumerate((2, 4)):
        for i in range(length):
            ours = f"stem/mixed_4a_branch{branch + 1}/{{}}{i + 1}"
            rules += _layer(rf"features\.4\.branch{branch}\.{i}", ours)
    rules += _layer(r"features\.5\.conv", "stem/mixed_5a/{}1")
    for i, ours in enumerate([*a, "reduction_a", *b, "reduction_b", *c], 6):
        rules += _part(rf"features\.{i}", ours)
        if ours in c:
            for branch, before in ((1, 1), (2, 3)):  # convolutions before the fork
                theirs, fork = rf"features\.{i}\.branch{branch}_", f"{ours}/branch{branch + 1}"
                for j in range(before):
                    rules += _layer(f"{theirs}{j}", f"{fork}/{{}}{j + 1}")
                rules += _layer(f"{theirs}{before}a", f"{fork}_row/{{}}1")
                rules += _layer(f"{theirs}{before}b", f"{fork}_column/{{}}1")
    return rules


def _timm_resnet(model: InceptionResNetV2) -> list[tuple]:
    rules = [("classif", "head"), ("block8.conv2d", "last_c/linear")]
    for theirs, ours in (
        ("1a", "stem/entry/{}1"),
        ("2a", "stem/entry/{}2"),
        ("2b", "stem/entry/{}3"),
        ("3b", "stem/middle/{}1"),
        ("4a", "stem/middle/{}2"),
        ("7b", "conv_7b/{}1"),
    ):
        rules += _layer(f"conv2d_{theirs}", ours)
    rules += _part("mixed_5b", "mixed_5b") + _part("block8", "last_c")
    rules += _part("mixed_6a", "reduction_a") + _part("mixed_7a", "reduction_b")
    for stage, repeat, depth in zip("abc", ("repeat", "repeat_1", "repeat_2"), model.depths):
        for i in range(depth):
            ours = f"inception_resnet_{stage}/block{i + 1}"
            rules += _part(rf"{repeat}\.{i}", ours)
            rules += [(rf"{repeat}\.{i}\.conv2d", f"{ours}/linear")]
    return rules


def _keras(model: InceptionResNetV2) -> list[tuple]:
    """Unnamed layers, in the order in which they are created; the rest by name."""
    c = model.depths[2]

    def part(ours: str, *lengths: int) -> list[str]:
        branches = enumerate(lengths, 1)
        return [f"{ours}/branch{b}/{{}}{i + 1}" for b, length in branches for i in range(length)]

    def stage(ours: str, depth: int, *lengths: int) -> list[str]:
        return [layer for i in range(depth) for layer in part(f"{ours}/block{i + 1}", *lengths)]

    order = [
        *(f"stem/entry/{{}}{i}" for i in (1, 2, 3)),
        *(f"stem/middle/{{}}{i}" for i in (1, 2)),
        *part("mixed_5b", 1, 2, 3),
        "mixed_5b/pool/{}1",
        *stage("inception_resnet_a", model.depths[0], 1, 2, 3),
        *part("reduction_a", 1, 3),
        *stage("inception_resnet_b", model.depths[1], 1, 3),
        *part("reduction_b", 2, 2, 3),
        *stage("inception_resnet_c", c, 1, 3),
        *part("last_c", 1, 3),
    ]
    return [
        (r"conv2d_(\d+)", lambda m: order[int(m[1])].format("conv")),
        (r"batch_normalization_(\d+)", lambda m: order[int(m[1])].format("norm")),
        (r"block35_(\d+)_conv", r"inception_resnet_a/block\1/linear"),
        (r"block17_(\d+)_conv", r"inception_resnet_b/block\1/linear"),
        (rf"block8_{c + 1}_conv", "last_c/linear"),
        (r"block8_(\d+)_conv", r"inception_resnet_c/block\1/linear"),
        ("conv_7b", "conv_7b/conv1"),
        ("conv_7b_bn", "conv_7b/norm1"),
        ("predictions", "head"),
    ]


TABLES = {"timm": _timm, "keras": _keras}
