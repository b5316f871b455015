"""SparseNet (Liu and Zeng 2018): a DenseNet with the farthest n / 2 and the nearest n / 2 maps.

A layer takes maps of its own block only; the block's input counts as one (sections 3.2 and 5.1).

Attention on the output H of a layer (section 3.3) is H + H F. F takes the mean of H over each map
and applies two 1x1, each after normalization and ReLU; the second one also takes the mean. Three
details come from the authors' programs and not from the paper: the sigmoid after F, the mean after
the output of the first 1x1 in the concatenation, and that a block returns what its next layer would
take.
"""

import numpy as np

from tests.models.straight.cifar_resnet import bias_free, classify, norm
from tests.models.straight.densenet import bottleneck, transition
from tests.models.straight.numpy_layers import relu, sigmoid


def linked(maps, path):
    return maps if len(maps) <= path else maps[: path // 2] + maps[-(path // 2) :]


def attended(p, layer, x):
    h, path = bottleneck(p, layer, x), f"{layer}/attention"
    mean = h.mean(axis=(1, 2), keepdims=True)
    f = bias_free(p, f"{path}/conv1", relu(norm(p, f"{path}/norm1", mean)))
    f = np.concatenate([f, mean], axis=3)
    f = bias_free(p, f"{path}/conv2", relu(norm(p, f"{path}/norm2", f)))
    return h + h * sigmoid(f)


def sparse_densenet(p, x, layer, depths, path):
    x = bias_free(p, "stem/conv", x, padding=1)
    for block, depth in enumerate(depths, 1):
        if block > 1:
            x = transition(p, f"transition{block - 1}", x)
        maps = [x]
        for i in range(1, depth + 1):
            x = np.concatenate(linked(maps, path), axis=3)
            maps.append(layer(p, f"block{block}/layer{i}", x))
        x = np.concatenate(linked(maps, path), axis=3)
    return classify(p, relu(norm(p, "norm", x)))
