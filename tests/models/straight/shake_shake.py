"""Shake-Shake on CIFAR in evaluation (Gastaldi 2017), as in its author's code.

The code is `models/shakeshake.lua` and `shakeshakeblock.lua` for Torch. The stem has no ReLU. Each
branch begins with a ReLU, and so does the shortcut of a block that widens, even if the block keeps
the size. This shortcut concatenates two 1x1 convolutions, the second of the map shifted right and
down by one pixel, and normalizes the result.
"""

import numpy as np

from tests.models.straight.cifar_resnet import bias_free, classify, norm
from tests.models.straight.numpy_layers import relu


def branch(p, path, x, stride):
    """ReLU - 3x3 - norm - ReLU - 3x3 - norm"""
    y = bias_free(p, f"{path}/conv1", relu(x), stride=stride, padding=1)
    y = relu(norm(p, f"{path}/norm1", y))
    y = bias_free(p, f"{path}/conv2", y, padding=1)
    return norm(p, f"{path}/norm2", y)


def shifted(x):
    """nn.SpatialZeroPadding(1, -1, 1, -1): zeros at the left and top, right and bottom cut off."""
    return np.pad(x, ((0, 0), (1, 0), (1, 0), (0, 0)))[:, :-1, :-1]


def shortcut(p, block, x, stride):
    x = relu(x)
    straight = bias_free(p, f"{block}/projection1", x[:, ::stride, ::stride])
    moved = bias_free(p, f"{block}/projection2", shifted(x)[:, ::stride, ::stride])
    return norm(p, f"{block}/projection_norm", np.concatenate([straight, moved], axis=3))


def shake_block(p, block, x, stride, widens):
    skip = shortcut(p, block, x, stride) if widens else x
    one = branch(p, f"{block}/branch1", x, stride)
    other = branch(p, f"{block}/branch2", x, stride)
    return skip + 0.5 * one + 0.5 * other


def shake_shake(p, x, depths):
    x = norm(p, "stem/norm", bias_free(p, "stem/conv", x, padding=1))
    for stage, depth in enumerate(depths, 1):
        for i in range(1, depth + 1):
            stride = 2 if stage > 1 and i == 1 else 1
            x = shake_block(p, f"stage{stage}/block{i}", x, stride, widens=i == 1)
    return classify(p, relu(x))
