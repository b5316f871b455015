"""The searched network without strides and pooling of Zoph and Le 2016, figure 7 in the appendix.

Also section 4.1's two perturbations of its skip connections. Each layer is a convolution with zero
padding that keeps the size, normalization and ReLU (section 4.1 mentions both). A layer takes the
concatenation of the layers that lead to it, the earliest first (section 3.3). The mean and the
dense layer at the end are our choice.

The connections of figure 7 follow two public transcriptions. They differ in one connection: layer
15 takes layer 6 (so here) or layer 2, which are equally wide.
"""

from functools import partial

import numpy as np

from tests.models.straight.cifar_resnet import bias_free, classify, norm
from tests.models.straight.numpy_layers import relu

# FH, FW, N, from the image to the softmax.
BOXES = [
    (3, 3, 36),
    (3, 3, 48),
    (3, 3, 36),
    (5, 5, 36),
    (3, 7, 48),
    (7, 7, 48),
    (7, 7, 48),
    (7, 3, 36),
    (7, 1, 36),
    (7, 7, 36),
    (5, 7, 36),
    (7, 7, 48),
    (7, 5, 48),
    (7, 5, 48),
    (7, 5, 48),
]
FIGURE_7 = {  # the layers that each layer takes
    2: [1],
    3: [1, 2],
    4: [1, 2, 3],
    5: [3, 4],
    6: [2, 3, 4, 5],
    7: [2, 3, 4, 5, 6],
    8: [1, 6, 7],
    9: [1, 5, 6, 8],
    10: [1, 3, 4, 5, 6, 7, 8, 9],
    11: [1, 2, 5, 6, 7, 8, 9, 10],
    12: [1, 2, 3, 4, 6, 11],
    13: [1, 3, 6, 7, 8, 9, 10, 11, 12],
    14: [3, 7, 12, 13],
    15: [6, 7, 11, 12, 13, 14],
}
ALL = {number: range(1, number) for number in FIGURE_7}
NONE = {number: [number - 1] for number in FIGURE_7}


def layer(p, path, x, height, width, maps):
    assert p[f"params/{path}/conv/kernel"].shape == (height, width, x.shape[3], maps)
    rows, columns = (height // 2, height // 2), (width // 2, width // 2)
    x = np.pad(x, ((0, 0), rows, columns, (0, 0)))
    return relu(norm(p, f"{path}/norm", bias_free(p, f"{path}/conv", x)))


def nas(p, x, lines):
    outputs = {1: layer(p, "conv1", x, *BOXES[0])}
    for number, taken in lines.items():
        x = np.concatenate([outputs[i] for i in taken], axis=3)
        outputs[number] = layer(p, f"conv{number}", x, *BOXES[number - 1])
    return classify(p, outputs[15])


v1 = partial(nas, lines=FIGURE_7)
dense = partial(nas, lines=ALL)
no_skips = partial(nas, lines=NONE)
