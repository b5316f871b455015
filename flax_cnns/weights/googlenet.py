"""GoogLeNet. torchvision's branches 1 to 4 are the columns of the paper's table 1.

torchvision's published weights take images scaled to (x - 0.5) / 0.5 in every channel, with x from
0 to 1. torchvision's own transforms normalize otherwise, and `transform_input` corrects that.
"""

from __future__ import annotations

from flax_cnns.models.googlenet import GoogLeNet
from flax_cnns.weights import name_maps

BRANCHES = {
    "branch1": "conv1x1",
    "branch2.0": "reduce3x3",
    "branch2.1": "conv3x3",
    "branch3.0": "reduce5x5",
    "branch3.1": "conv5x5",
    "branch4.1": "pool_proj",
}
LEAVES = {"conv": "conv", "bn": "norm"}
STEM = {"conv1": "conv1", "conv2": "conv2_reduce", "conv3": "conv2"}


def torchvision_rules(model: GoogLeNet) -> name_maps.Rules:
    heads = [
        (r"(aux\d)\.conv\.(conv|bn)", lambda m: f"{m[1]}/conv/{LEAVES[m[2]]}"),
        (r"(aux\d)\.fc1", r"\1/fc", name_maps.dense_after_flatten(128)),
        (r"(aux\d)\.fc2", r"\1/head"),
    ]
    return [
        (r"(conv\d)\.(conv|bn)", lambda m: f"{STEM[m[1]]}/{LEAVES[m[2]]}"),
        (
            r"inception(\d\w)\.(branch\d(?:\.\d)?)\.(conv|bn)",
            lambda m: f"mixed{m[1]}/{BRANCHES[m[2]]}/{LEAVES[m[3]]}",
        ),
        *(heads if model.aux else [(r"aux\d\..*", name_maps.UNUSED)]),
        (r"fc", "head"),
    ]


TABLES = {"torchvision": torchvision_rules}
