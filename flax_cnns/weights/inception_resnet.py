"""Inception-ResNet-v2. timm names the parts; Keras counts the layers that it does not name."""

from __future__ import annotations

from flax_cnns.models.inception_resnet import InceptionResNetV2
from flax_cnns.weights.inception_v4 import branch_rules, layer_rules
from flax_cnns.weights.name_maps import Rules


def _timm_rules(model: InceptionResNetV2) -> Rules:
    rules: Rules = [("classif", "head"), ("block8.conv2d", "last_c/linear")]
    for theirs, ours in (
        ("1a", "stem/entry/{}1"),
        ("2a", "stem/entry/{}2"),
        ("2b", "stem/entry/{}3"),
        ("3b", "stem/middle/{}1"),
        ("4a", "stem/middle/{}2"),
        ("7b", "conv_7b/{}1"),
    ):
        rules += layer_rules(f"conv2d_{theirs}", ours)
    rules += branch_rules("mixed_5b", "mixed_5b") + branch_rules("block8", "last_c")
    rules += branch_rules("mixed_6a", "reduction_a") + branch_rules("mixed_7a", "reduction_b")
    for stage, repeat, depth in zip("abc", ("repeat", "repeat_1", "repeat_2"), model.depths):
        for i in range(depth):
            ours = f"inception_resnet_{stage}/block{i + 1}"
            rules += branch_rules(rf"{repeat}\.{i}", ours)
            rules += [(rf"{repeat}\.{i}\.conv2d", f"{ours}/linear")]
    return rules


def _keras_rules(model: InceptionResNetV2) -> Rules:
    """Rules for unnamed layers, by their order of creation, and for named ones."""
    c = model.depths[2]

    def branches(ours: str, *lengths: int) -> list[str]:
        return [
            f"{ours}/branch{b}/{{}}{i}" for b, n in enumerate(lengths, 1) for i in range(1, n + 1)
        ]

    def stage(ours: str, depth: int, *lengths: int) -> list[str]:
        return [layer for i in range(depth) for layer in branches(f"{ours}/block{i + 1}", *lengths)]

    order = [
        *(f"stem/entry/{{}}{i}" for i in (1, 2, 3)),
        *(f"stem/middle/{{}}{i}" for i in (1, 2)),
        *branches("mixed_5b", 1, 2, 3),
        "mixed_5b/pool/{}1",
        *stage("inception_resnet_a", model.depths[0], 1, 2, 3),
        *branches("reduction_a", 1, 3),
        *stage("inception_resnet_b", model.depths[1], 1, 3),
        *branches("reduction_b", 2, 2, 3),
        *stage("inception_resnet_c", c, 1, 3),
        *branches("last_c", 1, 3),
    ]
    numbered = {f"conv2d_{i}": ours.format("conv") for i, ours in enumerate(order)}
    numbered |= {f"batch_normalization_{i}": ours.format("norm") for i, ours in enumerate(order)}
    return [
        (r"(conv2d|batch_normalization)_\d+", lambda m: numbered.get(m[0], m[0])),
        (r"block35_(\d+)_conv", r"inception_resnet_a/block\1/linear"),
        (r"block17_(\d+)_conv", r"inception_resnet_b/block\1/linear"),
        (rf"block8_{c + 1}_conv", "last_c/linear"),
        (r"block8_(\d+)_conv", r"inception_resnet_c/block\1/linear"),
        ("conv_7b", "conv_7b/conv1"),
        ("conv_7b_bn", "conv_7b/norm1"),
        ("predictions", "head"),
    ]


TABLES = {"timm": _timm_rules, "keras": _keras_rules}
