"""VGG as torchvision numbers it and as Keras names it."""

from __future__ import annotations

from flax_cnns.models.vgg import VGG
from flax_cnns.weights.name_maps import flattened


def torchvision(model: VGG) -> list[tuple]:
    """One list holds convolutions, norms, ReLUs and poolings, numbered from 0."""
    rules, number = [], 0
    norms = int(model.norm == "batch")
    for i, windows in enumerate(model.windows, 1):
        for j in range(1, len(windows) + 1):
            rules.append((rf"features\.{number}", f"stage{i}/conv{j}"))
            rules += [(rf"features\.{number + 1}", f"stage{i}/norm{j}")] * norms
            number += 2 + norms  # the ReLU
        number += 1  # the pooling
    return [
        *rules,
        (r"classifier\.0", "fc6", flattened(model.widths[-1])),
        (r"classifier\.3", "fc7"),
        (r"classifier\.6", "head"),
    ]


TABLES = {
    "torchvision": torchvision,
    "keras": [
        (r"block(\d)_conv(\d)", r"stage\1/conv\2"),
        (r"fc1", "fc6"),
        (r"fc2", "fc7"),
        (r"predictions", "head"),
    ],
}
