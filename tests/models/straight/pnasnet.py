"""PNASNet-5 (Liu et al. 2017): the cell of figure 1, stacked as in the authors' release.

The release is TensorFlow's slim, `nets/nasnet/pnasnet.py`. The cell computes as NASNet's and
follows NASNet's stem, which has two of these cells. With stride 2 the cell leads from a stage to
the next.
"""

from functools import partial

import numpy as np

from tests.models.straight.cifar_resnet import classify
from tests.models.straight.nasnet import given, identity, imagenet_stem, max3, separable, stages


def cell(p, cell, x, previous, stride=1):
    x, old, width = given(p, cell, x, previous)
    one = separable(p, f"{cell}/block1_left", old, 5, stride)
    one = one + max3(p, f"{cell}/block1_right", old, width, stride)
    two = separable(p, f"{cell}/block2_left", x, 7, stride)
    two = two + max3(p, f"{cell}/block2_right", x, width, stride)
    three = separable(p, f"{cell}/block3_left", x, 5, stride)
    three = three + separable(p, f"{cell}/block3_right", x, 3, stride)
    four = separable(p, f"{cell}/block4_left", three, 3)
    four = four + max3(p, f"{cell}/block4_right", x, width, stride)
    five = separable(p, f"{cell}/block5_left", old, 3, stride)
    five = five + identity(p, f"{cell}/block5_right", x, width, stride)
    return np.concatenate([one, two, three, four, five], axis=3)


def pnasnet(p, x, depths):
    """PNASNet with `depths` cells of stride 1 in each stage."""
    p = {**p, "epsilon": 1e-3}
    striding = partial(cell, stride=2)
    maps = imagenet_stem(p, x, striding)
    return classify(p, stages(p, maps, depths, cell, striding)[-1])
