"""Vision Transformers. torchvision and timm join queries, keys and values in our order.

torchvision's networks have the names `mlp.0` and `mlp.3`, its published files `mlp.linear_1` and
`mlp.linear_2`. Both forms are accepted.
"""

from __future__ import annotations

import re


def _block(match: re.Match) -> str:  # both libraries count from 0
    return f"encoder/block{int(match[1]) + 1}"


_LAYER = r"encoder\.layers\.encoder_layer_(\d+)\."
TORCHVISION = [
    ("class_token", "class_token"),
    (r"encoder\.pos_embedding", "position_embedding"),
    ("conv_proj", "patches"),
    (_LAYER + r"ln_(\d)", lambda m: f"{_block(m)}/norm{m[2]}"),
    (_LAYER + r"self_attention\.in_proj_weight", lambda m: f"{_block(m)}/attention/qkv/kernel"),
    (_LAYER + r"self_attention\.in_proj_bias", lambda m: f"{_block(m)}/attention/qkv/bias"),
    (_LAYER + r"self_attention\.out_proj", lambda m: f"{_block(m)}/attention/out"),
    (_LAYER + r"mlp\.(?:0|linear_1)", lambda m: f"{_block(m)}/expand"),
    (_LAYER + r"mlp\.(?:3|linear_2)", lambda m: f"{_block(m)}/project"),
    (r"encoder\.ln", "norm"),
    (r"heads\.head", "head"),
]
TIMM = [
    ("cls_token", "class_token"),
    ("pos_embed", "position_embedding"),
    (r"patch_embed\.proj", "patches"),
    (r"blocks\.(\d+)\.norm(\d)", lambda m: f"{_block(m)}/norm{m[2]}"),
    (r"blocks\.(\d+)\.attn\.qkv", lambda m: f"{_block(m)}/attention/qkv"),
    (r"blocks\.(\d+)\.attn\.proj", lambda m: f"{_block(m)}/attention/out"),
    (r"blocks\.(\d+)\.mlp\.fc1", lambda m: f"{_block(m)}/expand"),
    (r"blocks\.(\d+)\.mlp\.fc2", lambda m: f"{_block(m)}/project"),
    ("norm", "norm"),
    ("head", "head"),
]
TABLES = {"torchvision": TORCHVISION, "timm": TIMM}
