"""SparseNet (Zhu, Deng, Maire, Deng, Mori, Tan 2018): layers take the maps 1, 2, 4, 8 ... before.

Layer i takes i - 1, i - 2, i - 4, i - 8 ... of its block, where 0 is the block's input. A block
returns what its next layer would take.

DenseNet's layers and transitions concatenate the maps, older ones first. The bottlenecks of He et
al. 2016 with full pre-activation add them up, and a projection gives a stage's map 0. The code of
the sums is not released. In two points this file follows `flax_cnns`, not He et al.'s code: the
projection takes its input without normalization and ReLU (He et al.: after the first ones), and the
3x3 has the stride (He et al.: the first 1x1).
"""

import numpy as np

from tests.models.straight.cifar_resnet import bias_free, classify, norm
from tests.models.straight.densenet import transition
from tests.models.straight.numpy_layers import max_pool, relu


def linked(maps):
    """Selects what layer i takes of 0 ... i - 1."""
    i = len(maps)
    return [maps[i - offset] for offset in (32, 16, 8, 4, 2, 1) if offset <= i]


def block(p, path, x, layer, depth):
    maps = [x]
    for i in range(1, depth + 1):
        maps.append(layer(p, f"{path}/layer{i}", np.concatenate(linked(maps), axis=3)))
    return np.concatenate(linked(maps), axis=3)


def blocks(p, x, layer, depths):
    for i, depth in enumerate(depths, 1):
        if i > 1:
            x = transition(p, f"transition{i - 1}", x)
        x = block(p, f"block{i}", x, layer, depth)
    return classify(p, relu(norm(p, "norm", x)))


def cifar(p, x, layer, depths):
    return blocks(p, bias_free(p, "stem/conv", x, padding=1), layer, depths)


def imagenet(p, x, layer, depths):
    x = relu(norm(p, "stem/norm", bias_free(p, "stem/conv", x, stride=2, padding=3)))
    return blocks(p, max_pool(x, 3, 2, padding=1), layer, depths)


def bottleneck(p, path, y, stride):
    """A bottleneck whose input is already normalized and rectified."""
    y = bias_free(p, f"{path}/conv1", y)  # 1x1
    y = relu(norm(p, f"{path}/norm2", y))
    y = bias_free(p, f"{path}/conv2", y, stride=stride, padding=1)
    y = relu(norm(p, f"{path}/norm3", y))
    return bias_free(p, f"{path}/conv3", y)  # 1x1


def summed(p, x, depth):
    """SparseNet with sums: three stages of `depth` bottlenecks."""
    x = bias_free(p, "stem/conv", x, padding=1)
    for stage in (1, 2, 3):
        stride = 1 if stage == 1 else 2
        y = relu(norm(p, f"stage{stage}/block1/norm1", x))
        maps = [
            bias_free(p, f"stage{stage}/projection", x, stride=stride),
            bottleneck(p, f"stage{stage}/block1", y, stride),
        ]
        for i in range(2, depth + 1):
            y = relu(norm(p, f"stage{stage}/block{i}/norm1", np.sum(linked(maps), axis=0)))
            maps.append(bottleneck(p, f"stage{stage}/block{i}", y, 1))
        x = np.sum(linked(maps), axis=0)
    return classify(p, relu(norm(p, "norm", x)))
