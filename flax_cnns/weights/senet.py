"""SENets. timm's own have the layer names of its ResNets; its legacy networks have others."""

from __future__ import annotations

from flax_cnns.models.resnet import ResNet
from flax_cnns.weights.name_maps import Rules
from flax_cnns.weights.resnet import block_path, has_deep_stem, torch_dense, torch_rules


def timm_rules(model: ResNet) -> Rules:
    """Rules for both kinds, which share no name."""
    number = r"\1" if has_deep_stem(model) else ""
    return [
        (r"layer0\.conv(\d)", f"stem/conv{number}"),
        (r"layer0\.bn(\d)", f"stem/norm{number}"),
        (r"layer(\d+)\.(\d+)\.se_module\.fc1", lambda m: f"{block_path(m)}/se/reduce", torch_dense),
        (r"layer(\d+)\.(\d+)\.se_module\.fc2", lambda m: f"{block_path(m)}/se/expand", torch_dense),
        ("last_linear", "head"),
        *torch_rules(model),
    ]


TABLES = {"timm": timm_rules}
