"""Xception. timm numbers the blocks from the entry flow on, Keras from the stem on."""

from __future__ import annotations

from flax_cnns.models.xception import Xception
from flax_cnns.weights.name_maps import Rules


def _blocks(model: Xception) -> list[str]:
    """Our paths of the residual blocks, in order."""
    entry = [f"entry{i + 1}" for i in range(len(model.entry))]
    return [*entry, *(f"middle/block{i + 1}" for i in range(model.depth)), "exit"]


def timm_rules(model: Xception) -> Rules:
    """Rules for timm, whose blocks are lists of ReLU, convolution, norm, ...

    Block 1 has no first ReLU.
    """
    rules: Rules = [("conv([12])", r"stem/conv\1"), ("bn([12])", r"stem/norm\1"), ("fc", "head")]
    for i in range(1, len(model.top) + 1):
        theirs = i + 2  # after the two convolutions of the stem
        rules.append((rf"conv{theirs}\.conv1", f"top{i}/conv/depthwise"))
        rules.append((rf"conv{theirs}\.pointwise", f"top{i}/conv/pointwise"))
        rules.append((f"bn{theirs}", f"top{i}/norm"))
    for number, ours in enumerate(_blocks(model), 1):
        first = 0 if number == 1 else 1
        for i in (1, 2, 3):
            at = first + 3 * (i - 1)
            conv = rf"block{number}\.rep\.{at}"
            rules.append((rf"{conv}\.conv1", f"{ours}/conv{i}/depthwise"))
            rules.append((rf"{conv}\.pointwise", f"{ours}/conv{i}/pointwise"))
            rules.append((rf"block{number}\.rep\.{at + 1}", f"{ours}/norm{i}"))
        rules.append((rf"block{number}\.skip", f"{ours}/projection"))
        rules.append((rf"block{number}\.skipbn", f"{ours}/projection_norm"))
    return rules


def keras_rules(model: Xception) -> Rules:
    """Rules for Keras, whose projections have automatic names, numbered in their order."""
    rules: Rules = [
        (r"block1_conv(\d)", r"stem/conv\1"),
        (r"block1_conv(\d)_bn", r"stem/norm\1"),
        ("predictions", "head"),
    ]
    blocks = _blocks(model)
    for number, ours in enumerate(blocks, 2):
        rules.append((rf"block{number}_sepconv(\d)", rf"{ours}/conv\1"))
        rules.append((rf"block{number}_sepconv(\d)_bn", rf"{ours}/norm\1"))
    last = len(blocks) + 2
    rules.append((rf"block{last}_sepconv(\d)", r"top\1/conv"))
    rules.append((rf"block{last}_sepconv(\d)_bn", r"top\1/norm"))
    for i, ours in enumerate(block for block in blocks if not block.startswith("middle")):
        rules.append((f"conv2d_{i}", f"{ours}/projection"))
        rules.append((f"batch_normalization_{i}", f"{ours}/projection_norm"))
    return rules


TABLES = {"timm": timm_rules, "keras": keras_rules}
