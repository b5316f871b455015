"""MobileNet v2. torchvision and Keras number the blocks across stages; timm by stage and block."""

from __future__ import annotations

from flax_cnns.models.mobilenet_v2 import MobileNetV2
from flax_cnns.weights.efficientnet import TIMM
from flax_cnns.weights.name_maps import Rules, keras_depthwise


def _blocks(model: MobileNetV2) -> list[str]:
    """Our paths of all blocks, in order."""
    rows = enumerate(model.table, 1)
    return [f"stage{i}/block{j + 1}" for i, row in rows for j in range(row.depth)]


def torchvision_rules(model: MobileNetV2) -> Rules:
    blocks = _blocks(model)
    rules: Rules = [("classifier.1", "head")]
    for number, place in [(0, "stem"), (len(blocks) + 1, "top")]:
        rules.append((rf"features\.{number}\.0", f"{place}/conv"))
        rules.append((rf"features\.{number}\.1", f"{place}/norm"))
    for number, place in enumerate(blocks, 1):
        parts = ["expand", "depthwise"][number == 1 :]  # the first block does not expand
        for i, part in enumerate(parts):
            rules.append((rf"features\.{number}\.conv\.{i}\.0", f"{place}/{part}"))
            rules.append((rf"features\.{number}\.conv\.{i}\.1", f"{place}/{part}_norm"))
        last = len(parts)
        rules.append((rf"features\.{number}\.conv\.{last}", f"{place}/project"))
        rules.append((rf"features\.{number}\.conv\.{last + 1}", f"{place}/project_norm"))
    return rules


def keras_rules(model: MobileNetV2) -> Rules:
    rules: Rules = [
        ("Conv1", "stem/conv"),
        ("bn_Conv1", "stem/norm"),
        ("Conv_1", "top/conv"),
        ("Conv_1_bn", "top/norm"),
        ("predictions", "head"),
    ]
    for number, place in enumerate(_blocks(model)):
        theirs = f"block_{number}" if number else "expanded_conv"
        rules.append((f"{theirs}_depthwise", f"{place}/depthwise", keras_depthwise))
        rules.append((f"{theirs}_(expand|project)", rf"{place}/\1"))
        rules.append((f"{theirs}_(expand|depthwise|project)_BN", rf"{place}/\1_norm"))
    return rules


TABLES = {"torchvision": torchvision_rules, "timm": TIMM, "keras": keras_rules}
