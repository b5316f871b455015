"""SqueezeNet as torchvision numbers it."""

from __future__ import annotations

from flax_cnns.models.squeezenet import FIRES, SqueezeNet


def torchvision(model: SqueezeNet) -> list[tuple]:
    """One list holds conv1, ReLU, pooling, fire2 as number 3, the others and their poolings."""
    rules = [(r"features\.0", "conv1/conv"), (r"classifier\.1", "head")]
    for i in range(2, 2 + len(FIRES)):
        number = i + 1 + sum(pool < i for pool in model.pool_after)
        rules.append((rf"features\.{number}\.(squeeze|expand\dx\d)", rf"fire{i}/\1/conv"))
    return rules


TABLES = {"torchvision": torchvision}
