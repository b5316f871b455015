"""torchvision's EfficientNet at a fourth of the width and half the depth; Keras's names."""

from __future__ import annotations

from typing import Any

from tests.models.foreign.builders import Case, torchvision

# By the names of kernels in each library and here. Sums of blocks with shortcuts would grow, and
# values that pass blocks without shortcuts would fade.
GAIN = (
    (
        r"features\.\d\.[1-9]\d*\.block\.[23]\.0\.weight"
        r"|blocks\.\d\.[1-9]\d*\.conv_pwl\.weight|blocks\.0\.[1-9]\d*\.conv_pw\.weight"
        r"|block\d[b-z]_project_conv/kernel|block([2-9]|\d\d)/project/kernel",
        0.03,
    ),
    (
        r"features\.\d\.0\.block\.[23]\.0\.weight"
        r"|blocks\.\d\.0\.conv_pwl\.weight|blocks\.0\.0\.conv_pw\.weight"
        r"|block\da_project_conv/kernel|block1/project/kernel",
        2.5,
    ),
    ("", 2.0),
)
KERAS = {f"keras_efficientnetb{n}": f"EfficientNetB{n}" for n in range(8)}
KERAS_SHAPES = ("keras_efficientnetb0",)


def without_preprocessing(model: Any) -> Any:
    """Returns Keras's network from its first convolution on."""
    import keras

    return keras.Model(model.get_layer("stem_conv_pad").input, model.output)


def _efficientnet() -> Any:
    """A fourth of the width, half the depth; no branch is dropped."""
    theirs = torchvision().models.efficientnet
    rows, _ = theirs._efficientnet_conf("efficientnet_b0", width_mult=0.25, depth_mult=0.5)
    return theirs.EfficientNet(rows, dropout=0.2, stochastic_depth_prob=0.0, num_classes=10)


CASE = Case(
    "efficientnet_b0",
    "torchvision",
    64,
    dict(width_mult=0.25, depth_mult=0.5, drop_path=0.0),
    _efficientnet,
    train=True,
)
