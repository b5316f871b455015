"""SENets: timm's own are named as its ResNets; those that it calls legacy have other names."""

from __future__ import annotations

from flax_cnns.models.resnet import ResNet
from flax_cnns.weights.resnet import block, dense, has_deep_stem, torch


def timm(model: ResNet) -> list[tuple]:
    """Both kinds: no name of the one is a name of the other."""
    number = r"\1" if has_deep_stem(model) else ""
    return [
        (r"layer0\.conv(\d)", f"stem/conv{number}"),
        (r"layer0\.bn(\d)", f"stem/norm{number}"),
        (r"layer(\d+)\.(\d+)\.se_module\.fc1", lambda m: f"{block(m)}/se/reduce", dense),
        (r"layer(\d+)\.(\d+)\.se_module\.fc2", lambda m: f"{block(m)}/se/expand", dense),
        ("last_linear", "head"),
        *torch(model),
    ]


TABLES = {"timm": timm}
