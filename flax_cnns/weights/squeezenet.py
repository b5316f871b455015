"""SqueezeNet. torchvision numbers the layers."""

from __future__ import annotations

from flax_cnns.models.squeezenet import FIRES, SqueezeNet
from flax_cnns.weights.name_maps import Rules


def torchvision_rules(model: SqueezeNet) -> Rules:
    """torchvision's one list holds conv1, ReLU, pooling, fire2 (number 3), the other fire modules
    and the poolings between them.
    """
    rules: Rules = [(r"features\.0", "conv1/conv"), (r"classifier\.1", "head")]
    for i in range(2, 2 + len(FIRES)):
        number = i + 1 + sum(pool < i for pool in model.pool_after)
        rules.append((rf"features\.{number}\.(squeeze|expand\dx\d)", rf"fire{i}/\1/conv"))
    return rules


TABLES = {"torchvision": torchvision_rules}
