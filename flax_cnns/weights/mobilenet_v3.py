"""MobileNet v3. torchvision numbers the parts of a block; timm and Keras name them."""

from __future__ import annotations

from itertools import groupby

from flax_cnns.models.mobilenet_v3 import STEM_WIDTH, MobileNetV3
from flax_cnns.weights.name_maps import Rules, keras_dense, keras_depthwise
from flax_cnns.weights.resnet import torch_dense


def _expands(model: MobileNetV3) -> list[bool]:
    """For each block, whether its inner width differs from the width of its input."""
    entering = [STEM_WIDTH, *(row.width for row in model.table)]
    return [row.inner != width for row, width in zip(model.table, entering)]


def torchvision_rules(model: MobileNetV3) -> Rules:
    rules: Rules = [(r"classifier\.0", "hidden_layer"), (r"classifier\.3", "head")]
    for number, place in [(0, "stem"), (len(model.table) + 1, "top")]:
        rules.append((rf"features\.{number}\.0", f"{place}/conv"))
        rules.append((rf"features\.{number}\.1", f"{place}/norm"))
    for number, (row, expands) in enumerate(zip(model.table, _expands(model)), 1):
        parts = ["expand"] * expands + ["depthwise"] + ["se"] * row.se + ["project"]
        for i, part in enumerate(parts):
            theirs, ours = rf"features\.{number}\.block\.{i}", f"block{number}/{part}"
            if part == "se":
                rules.append((rf"{theirs}\.fc1", f"{ours}/reduce", torch_dense))
                rules.append((rf"{theirs}\.fc2", f"{ours}/expand", torch_dense))
            else:
                rules.append((rf"{theirs}\.0", ours))
                rules.append((rf"{theirs}\.1", f"{ours}_norm"))
    return rules


def timm_rules(model: MobileNetV3) -> Rules:
    """Rules for timm, where consecutive blocks of one width are a stage, and the top is another."""
    stages = [len(list(rows)) for _, rows in groupby(row.width for row in model.table)]
    places = [(i, j) for i, depth in enumerate(stages) for j in range(depth)]
    rules: Rules = [
        ("conv_stem", "stem/conv"),
        ("bn1", "stem/norm"),
        (rf"blocks\.{len(stages)}\.0\.conv", "top/conv"),
        (rf"blocks\.{len(stages)}\.0\.bn1", "top/norm"),
        ("conv_head", "hidden_layer", torch_dense),
        ("classifier", "head"),
    ]
    for number, ((i, j), expands) in enumerate(zip(places, _expands(model)), 1):
        theirs, ours = rf"blocks\.{i}\.{j}", f"block{number}"
        parts = ["expand"] * expands + ["depthwise", "project"]
        convs = ["conv_pw"] * expands + ["conv_dw", "conv_pwl" if expands else "conv_pw"]
        for k, (part, conv) in enumerate(zip(parts, convs), 1):
            rules.append((rf"{theirs}\.{conv}", f"{ours}/{part}"))
            rules.append((rf"{theirs}\.bn{k}", f"{ours}/{part}_norm"))
        rules.append((rf"{theirs}\.se\.conv_(reduce|expand)", rf"{ours}/se/\1", torch_dense))
    return rules


def keras_rules(model: MobileNetV3) -> Rules:
    rules: list[tuple] = [
        ("conv", "stem/conv"),
        ("conv_bn", "stem/norm"),
        ("conv_1", "top/conv"),
        ("conv_1_bn", "top/norm"),
        ("conv_2", "hidden_layer", keras_dense),
        ("logits", "head", keras_dense),
    ]
    for i in range(len(model.table)):
        theirs, ours = f"expanded_conv_{i}" if i else "expanded_conv", f"block{i + 1}"
        rules.append((f"{theirs}_depthwise", f"{ours}/depthwise", keras_depthwise))
        rules.append((f"{theirs}_(expand|project)", rf"{ours}/\1"))
        rules.append((f"{theirs}_(expand|depthwise|project)_bn", rf"{ours}/\1_norm"))
        rules.append((f"{theirs}_squeeze_excite_conv", f"{ours}/se/reduce", keras_dense))
        rules.append((f"{theirs}_squeeze_excite_conv_1", f"{ours}/se/expand", keras_dense))
    # Some names in the files that Keras published begin with a capital letter.
    return [(f"(?i:{theirs})", *ours) for theirs, *ours in rules]


TABLES = {"torchvision": torchvision_rules, "timm": timm_rules, "keras": keras_rules}
