"""Inception-v4, whose parts timm numbers: `features.0` is the stem's first convolution.

Of a convolution with its norm we have the two paths that `"stem/entry/{}1"` makes of "conv" and
"norm"; timm calls them `conv` and `bn` of one module.
"""

from __future__ import annotations

import re

from flax_cnns.models.inception_v4 import InceptionV4


def layer(theirs: str, ours: str) -> list[tuple]:
    return [(rf"{theirs}\.conv", ours.format("conv")), (rf"{theirs}\.bn", ours.format("norm"))]


def part(theirs: str, ours: str) -> list[tuple]:
    """`branch1.0` -> `branch2/{}1`, as `branch1`, a branch of one layer; `branch3` pools."""

    def path(match: re.Match) -> str:
        branch, place, kind = match.groups()
        kind = "conv" if kind == "conv" else "norm"
        if branch == "3":  # its place 0 is the mean
            return f"{ours}/pool/{kind}1"
        return f"{ours}/branch{int(branch) + 1}/{kind}{int(place or 0) + 1}"

    return [(rf"{theirs}\.branch(\d)(?:\.(\d))?\.(conv|bn)", path)]


def _timm(model: InceptionV4) -> list[tuple]:
    a, b, c = (
        [f"inception_{stage}/block{i + 1}" for i in range(depth)]
        for stage, depth in zip("abc", model.depths)
    )
    rules = [("last_linear", "head")]
    for i in range(3):
        rules += layer(rf"features\.{i}", f"stem/entry/{{}}{i + 1}")
    rules += layer(r"features\.3\.conv", "stem/mixed_3a/{}1")
    for branch, length in enumerate((2, 4)):
        for i in range(length):
            ours = f"stem/mixed_4a_branch{branch + 1}/{{}}{i + 1}"
            rules += layer(rf"features\.4\.branch{branch}\.{i}", ours)
    rules += layer(r"features\.5\.conv", "stem/mixed_5a/{}1")
    for i, ours in enumerate([*a, "reduction_a", *b, "reduction_b", *c], 6):
        rules += part(rf"features\.{i}", ours)
        if ours in c:
            for branch, before in ((1, 1), (2, 3)):  # convolutions before the fork
                theirs, fork = rf"features\.{i}\.branch{branch}_", f"{ours}/branch{branch + 1}"
                for j in range(before):
                    rules += layer(f"{theirs}{j}", f"{fork}/{{}}{j + 1}")
                rules += layer(f"{theirs}{before}a", f"{fork}_row/{{}}1")
                rules += layer(f"{theirs}{before}b", f"{fork}_column/{{}}1")
    return rules


TABLES = {"timm": _timm}
