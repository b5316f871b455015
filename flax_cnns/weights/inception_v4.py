"""Inception-v4. timm numbers the parts: `features.0` is the first convolution of the stem.

A convolution and its norm are one module with `conv` and `bn` in timm. Ours have two paths, which
the templates below give: `"stem/entry/{}1"` with "conv" or "norm" for `{}`.
"""

from __future__ import annotations

import re

from flax_cnns.models.inception_v4 import InceptionV4
from flax_cnns.weights.name_maps import Rules


def layer_rules(theirs: str, ours: str) -> Rules:
    """Rules for a convolution and its norm; `theirs` is a regex, `ours` a template."""
    return [(rf"{theirs}\.conv", ours.format("conv")), (rf"{theirs}\.bn", ours.format("norm"))]


def branch_rules(theirs: str, ours: str) -> Rules:
    """Rules for the branches of a module.

    timm's `branch1.0` is our `branch2/{}1`; so is `branch1`, a branch of one layer. timm's
    `branch3` is the pooling branch.
    """

    def path(match: re.Match) -> str:
        branch, place, kind = match.groups()
        kind = "conv" if kind == "conv" else "norm"
        if branch == "3":  # part 0 of this branch is the average pooling
            return f"{ours}/pool/{kind}1"
        return f"{ours}/branch{int(branch) + 1}/{kind}{int(place or 0) + 1}"

    return [(rf"{theirs}\.branch(\d)(?:\.(\d))?\.(conv|bn)", path)]


def _timm_rules(model: InceptionV4) -> Rules:
    a, b, c = (
        [f"inception_{stage}/block{i + 1}" for i in range(depth)]
        for stage, depth in zip("abc", model.depths)
    )
    rules: Rules = [("last_linear", "head")]
    for i in range(3):
        rules += layer_rules(rf"features\.{i}", f"stem/entry/{{}}{i + 1}")
    rules += layer_rules(r"features\.3\.conv", "stem/mixed_3a/{}1")
    for branch, length in enumerate((2, 4)):
        for i in range(length):
            ours = f"stem/mixed_4a_branch{branch + 1}/{{}}{i + 1}"
            rules += layer_rules(rf"features\.4\.branch{branch}\.{i}", ours)
    rules += layer_rules(r"features\.5\.conv", "stem/mixed_5a/{}1")
    for i, ours in enumerate([*a, "reduction_a", *b, "reduction_b", *c], 6):
        rules += branch_rules(rf"features\.{i}", ours)
        if ours in c:
            for branch, before in ((1, 1), (2, 3)):  # how many convolutions precede the fork
                theirs, fork = rf"features\.{i}\.branch{branch}_", f"{ours}/branch{branch + 1}"
                for j in range(before):
                    rules += layer_rules(f"{theirs}{j}", f"{fork}/{{}}{j + 1}")
                rules += layer_rules(f"{theirs}{before}a", f"{fork}_row/{{}}1")
                rules += layer_rules(f"{theirs}{before}b", f"{fork}_column/{{}}1")
    return rules


TABLES = {"timm": _timm_rules}
