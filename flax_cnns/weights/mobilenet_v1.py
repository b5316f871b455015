"""MobileNet v1. timm numbers stages and blocks; Keras only blocks, across stages."""

from __future__ import annotations

import re

from flax_cnns.models.mobilenet_v1 import MobileNetV1
from flax_cnns.weights.name_maps import Rules, keras_dense, keras_depthwise

_PARTS = {"conv_dw": "depthwise", "conv_pw": "pointwise"}
_NORMS = {"bn1": "depthwise_norm", "bn2": "pointwise_norm"}


def _timm_part(match: re.Match) -> str:
    part = (_PARTS | _NORMS)[match[3]]
    return f"stage{int(match[1]) + 1}/block{int(match[2]) + 1}/{part}"


TIMM = [
    ("conv_stem", "stem/conv"),
    ("bn1", "stem/norm"),
    (r"blocks\.(\d)\.(\d)\.(conv_dw|bn1|conv_pw|bn2)", _timm_part),
    ("classifier", "head"),
]


def keras_rules(model: MobileNetV1) -> Rules:
    rules: Rules = [
        ("conv1", "stem/conv"),
        ("conv1_bn", "stem/norm"),
        ("conv_preds", "head", keras_dense),
    ]
    places = [(i, j) for i, depth in enumerate(model.depths, 1) for j in range(1, depth + 1)]
    for number, (i, j) in enumerate(places, 1):
        block = f"stage{i}/block{j}"
        rules.append((f"conv_dw_{number}", f"{block}/depthwise", keras_depthwise))
        rules.append((f"conv_dw_{number}_bn", f"{block}/depthwise_norm"))
        rules.append((f"conv_pw_{number}", f"{block}/pointwise"))
        rules.append((f"conv_pw_{number}_bn", f"{block}/pointwise_norm"))
    return rules


TABLES = {"timm": TIMM, "keras": keras_rules}
