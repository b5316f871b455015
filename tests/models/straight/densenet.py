"""DenseNet for CIFAR (Huang, Liu, van der Maaten, Weinberger 2017, section 3) as released.

The authors released `models/densenet.lua` and `DenseConnectLayer.lua` for Torch. There are three
dense blocks, with transitions between them; new maps come after the existing ones. A layer is
normalization, ReLU and 3x3; in -B, normalization, ReLU and 1x1 come before it. A transition is
normalization, ReLU, 1x1 and a 2x2 mean (rounding sizes down). A last normalization and ReLU precede
the mean over the maps.
"""

import numpy as np

from tests.models.straight.cifar_resnet import bias_free, classify, norm
from tests.models.straight.numpy_layers import avg_pool, relu


def plain(p, layer, x):
    x = relu(norm(p, f"{layer}/norm1", x))
    return bias_free(p, f"{layer}/conv1", x, padding=1)  # 3x3


def bottleneck(p, layer, x):
    """A layer of -B."""
    x = relu(norm(p, f"{layer}/norm1", x))
    x = bias_free(p, f"{layer}/conv1", x)  # 1x1
    x = relu(norm(p, f"{layer}/norm2", x))
    return bias_free(p, f"{layer}/conv2", x, padding=1)  # 3x3


def dense_block(p, block, x, layer, depth):
    maps = [x]
    for i in range(1, depth + 1):
        maps.append(layer(p, f"{block}/layer{i}", np.concatenate(maps, axis=3)))
    return np.concatenate(maps, axis=3)


def transition(p, path, x):
    x = relu(norm(p, f"{path}/norm", x))
    return avg_pool(bias_free(p, f"{path}/conv", x), 2, 2)


def densenet(p, x, layer, depth):
    """`depth` layers in each block."""
    x = bias_free(p, "stem/conv", x, padding=1)  # no norm or ReLU here: layers begin with them
    x = dense_block(p, "block1", x, layer, depth)
    x = transition(p, "transition1", x)
    x = dense_block(p, "block2", x, layer, depth)
    x = transition(p, "transition2", x)
    x = dense_block(p, "block3", x, layer, depth)
    return classify(p, relu(norm(p, "norm", x)))
