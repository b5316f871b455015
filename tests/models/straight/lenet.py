"""LeNet-5 of 1998, layer by layer.

LeCun et al., "Gradient-based learning applied to document recognition", section II-B, with the
squashing function of appendix A.
"""

import numpy as np

from tests.models.straight.numpy_layers import conv, dense, flatten

# Table I: the maps of S2 that each map of C3 sees: three or four; the last map sees all six.
THREE = [(0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 5), (0, 4, 5), (0, 1, 5)]
FOUR = [(0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5), (0, 3, 4, 5), (0, 1, 4, 5), (0, 1, 2, 5)]
FOUR += [(0, 1, 3, 4), (1, 2, 4, 5), (0, 2, 3, 5)]


def squash(a):
    return 1.7159 * np.tanh(2 / 3 * a)


def subsample(p, name, x):
    """Adds the four inputs, multiplies the sum by a coefficient, and adds a bias."""
    total = x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]
    return squash(p[f"params/{name}/coefficient"] * total + p[f"params/{name}/bias"])


def lenet5(p, x):
    """The layout in the deck "Convolutional Neural Networks".

    Every map sees all maps, pooling is a plain mean, tanh is not scaled, the output is linear.
    """

    def mean(x):
        return (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4

    x = mean(np.tanh(conv(x, p["params/c1/kernel"], p["params/c1/bias"])))  # 6@28x28, 6@14x14
    x = mean(np.tanh(conv(x, p["params/c3/kernel"], p["params/c3/bias"])))  # 16@10x10, 16@5x5
    x = np.tanh(conv(x, p["params/c5/kernel"], p["params/c5/bias"]))  # 120@1x1
    x = np.tanh(dense(flatten(x), p["params/f6/kernel"], p["params/f6/bias"]))
    return dense(x, p["params/head/kernel"], p["params/head/bias"])


def lenet5_original(p, x):
    """`p` also has the bitmaps of the output: "codes" [10 84], +1 and -1."""
    x = squash(conv(x, p["params/c1/sums/kernel"], p["params/c1/sums/bias"]))  # C1 6@28x28
    x = subsample(p, "s2", x)  # S2 6@14x14

    maps = []  # C3 16@10x10
    for i, seen in enumerate(THREE):
        kernel, bias = p["params/c3/three/kernel"][..., i : i + 1], p["params/c3/three/bias"][i]
        maps.append(conv(x[..., seen], kernel, bias))
    for i, seen in enumerate(FOUR):
        kernel, bias = p["params/c3/four/kernel"][..., i : i + 1], p["params/c3/four/bias"][i]
        maps.append(conv(x[..., seen], kernel, bias))
    maps.append(conv(x, p["params/c3/six/kernel"], p["params/c3/six/bias"]))
    x = squash(np.concatenate(maps, axis=3))

    x = subsample(p, "s4", x)  # S4 16@5x5
    x = squash(conv(x, p["params/c5/sums/kernel"], p["params/c5/sums/bias"]))  # C5 120@1x1
    x = squash(dense(flatten(x), p["params/f6/sums/kernel"], p["params/f6/sums/bias"]))  # F6 84
    return -((x[:, None] - p["codes"]) ** 2).sum(axis=2)  # equation 7
