"""VGG. torchvision numbers the layers; Keras names them."""

from __future__ import annotations

from flax_cnns.models.vgg import VGG
from flax_cnns.weights.name_maps import Rule, Rules, dense_after_flatten


def torchvision_rules(model: VGG) -> Rules:
    """Rules for torchvision, which numbers convolutions, norms, ReLUs and poolings in one list."""
    rules: list[Rule] = []
    number = 0
    norms = int(model.norm == "batch")
    for i, windows in enumerate(model.windows, 1):
        for j in range(1, len(windows) + 1):
            rules.append((rf"features\.{number}", f"stage{i}/conv{j}"))
            rules += [(rf"features\.{number + 1}", f"stage{i}/norm{j}")] * norms
            number += 2 + norms  # with the ReLU
        number += 1  # the pooling
    return [
        *rules,
        (r"classifier\.0", "fc6", dense_after_flatten(model.widths[-1])),
        (r"classifier\.3", "fc7"),
        (r"classifier\.6", "head"),
    ]


TABLES = {
    "torchvision": torchvision_rules,
    "keras": [
        (r"block(\d)_conv(\d)", r"stage\1/conv\2"),
        (r"fc1", "fc6"),
        (r"fc2", "fc7"),
        (r"predictions", "head"),
    ],
}
