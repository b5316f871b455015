"""The CIFAR networks of He et al. 2015, section 4.2 (table 6).

A 3x3 convolution, three stages of n blocks of two 3x3 each, the mean, and 10 classes. The first
blocks of stages 2 and 3 have stride 2.

Stochastic depth in evaluation (Huang et al. 2016, equation 5): branch l of L is added times its
survival probability p_l = 1 - l/L (1 - p_L), with p_L = 0.5. Its shortcuts take 2x2 means where He
et al. take every second pixel.
"""

from functools import partial

import numpy as np

from tests.models.straight.numpy_layers import batch_norm, conv, dense, global_avg_pool, relu

EPSILON = 1e-5  # Torch's, in which the authors and others released their networks


def bias_free(p, path, x, **geometry):
    return conv(x, p[f"params/{path}/kernel"], **geometry)


def norm(p, path, x, epsilon=EPSILON):
    scale, bias = p[f"params/{path}/scale"], p[f"params/{path}/bias"]
    mean, var = p[f"batch_stats/{path}/mean"], p[f"batch_stats/{path}/var"]
    return batch_norm(x, scale, bias, mean, var, epsilon)


def classify(p, x):
    return dense(global_avg_pool(x), p["params/head/kernel"], p["params/head/bias"])


def zero_padded(x, channels):
    """Appends zeros as new channels after the existing ones."""
    return np.concatenate([x, np.zeros((*x.shape[:3], channels - x.shape[3]))], axis=3)


def shortcut_a(p, block, x, channels, stride):
    """Section 3.3: no parameters, every second pixel."""
    return zero_padded(x[:, ::stride, ::stride], channels)


def shortcut_of_means(p, block, x, channels, stride):
    """Huang et al., "Implementation details"; for even sizes."""
    n, height, width, old = x.shape
    means = x.reshape(n, height // stride, stride, width // stride, stride, old).mean((2, 4))
    return zero_padded(means, channels)


def shortcut_b(p, block, x, channels, stride):
    """A 1x1 convolution and a norm where the shape changes, otherwise the identity."""
    if stride == 1 and x.shape[3] == channels:
        return x
    return shortcut_c(p, block, x, channels, stride)


def shortcut_c(p, block, x, channels, stride):
    """A 1x1 convolution and a norm around every block."""
    x = bias_free(p, f"{block}/projection", x, stride=stride)
    return norm(p, f"{block}/projection_norm", x)


def no_shortcut(p, block, x, channels, stride):
    return 0


def basic(p, block, x, stride, shortcut, survival=1.0):
    """Figure 2, and figure 5, left."""
    y = bias_free(p, f"{block}/conv1", x, stride=stride, padding=1)
    y = relu(norm(p, f"{block}/norm1", y))
    y = bias_free(p, f"{block}/conv2", y, padding=1)
    y = norm(p, f"{block}/norm2", y)
    return relu(shortcut(p, block, x, y.shape[3], stride) + survival * y)


def cifar_resnet(p, x, depths, shortcut, last_survival=1.0):
    x = bias_free(p, "stem/conv", x, padding=1)
    x = relu(norm(p, "stem/norm", x))
    number = 0
    for stage, depth in enumerate(depths, 1):
        for i in range(1, depth + 1):
            number += 1
            survival = 1 - number / sum(depths) * (1 - last_survival)
            stride = 2 if stage > 1 and i == 1 else 1
            x = basic(p, f"stage{stage}/block{i}", x, stride, shortcut, survival)
    return classify(p, x)


option_a = partial(cifar_resnet, shortcut=shortcut_a)
option_b = partial(cifar_resnet, shortcut=shortcut_b)
plain = partial(cifar_resnet, shortcut=no_shortcut)
halved = partial(cifar_resnet, shortcut=shortcut_of_means, last_survival=0.5)
