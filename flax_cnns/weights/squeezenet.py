"""SqueezeNet. torchvision numbers the layers."""

from __future__ import annotations

from flax_cnns.models.squeezenet import FIRES, SqueezeNet
from flax_cnns.weights.name_maps import Rules


def torchvision_rules(model: SqueezeNet) -> Rules:
    """Rules for torchvision, which numbers all layers and fire modules in one list.

    The list begins with conv1 (0), ReLU, pooling and fire2 (3); poolings are counted too.
    """
    rules: Rules = [(r"features\.0", "conv1/conv"), (r"classifier\.1", "head")]
    for i in range(2, 2 + len(FIRES)):
        number = i + 1 + sum(pool < i for pool in model.pool_after)
        rules.append((rf"features\.{number}\.(squeeze|expand\dx\d)", rf"fire{i}/\1/conv"))
    return rules


TABLES = {"torchvision": torchvision_rules}
