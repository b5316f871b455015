"""GoogLeNet, layer by layer: Szegedy et al. 2014, table 1 and figures 2(b) and 3.

Where the paper is silent, this is the network that Caffe released (bvlc_googlenet): poolings round
up; normalization is over 5 maps with alpha 1e-4 (which Caffe divides by the 5), beta 0.75 and k 1,
after the first pooling and before the second.
"""

import numpy as np

from tests.models.straight.numpy_layers import (
    batch_norm,
    conv,
    dense,
    global_avg_pool,
    local_response_norm,
    max_pool,
    relu,
)


def conv_bias(p, name, x, **geometry):
    return relu(conv(x, p[f"params/{name}/conv/kernel"], p[f"params/{name}/conv/bias"], **geometry))


def conv_bn(p, name, x, **geometry):
    """torchvision's: no bias, BatchNorm with epsilon 1e-3."""
    x = conv(x, p[f"params/{name}/conv/kernel"], **geometry)
    scale, bias = p[f"params/{name}/norm/scale"], p[f"params/{name}/norm/bias"]
    mean, var = p[f"batch_stats/{name}/norm/mean"], p[f"batch_stats/{name}/norm/var"]
    return relu(batch_norm(x, scale, bias, mean, var, epsilon=1e-3))


def inception(p, name, x, layer):
    """Figure 2(b): four parallel branches, all of which keep the size."""
    a = layer(p, f"{name}/conv1x1", x)
    b = layer(p, f"{name}/reduce3x3", x)
    b = layer(p, f"{name}/conv3x3", b, padding=1)
    c = layer(p, f"{name}/reduce5x5", x)
    c = layer(p, f"{name}/conv5x5", c, padding=2)
    d = max_pool(x, 3, 1, padding=1)
    d = layer(p, f"{name}/pool_proj", d)
    return np.concatenate([a, b, c, d], axis=3)


def norm(x):
    return local_response_norm(x, size=5, alpha=1e-4 / 5, beta=0.75, k=1)


def googlenet_2014(p, x):
    x = conv_bias(p, "conv1", x, stride=2, padding=3)  # 112x112x64
    x = norm(max_pool(x, 3, 2, ceil=True))  # 56x56
    x = conv_bias(p, "conv2_reduce", x)
    x = conv_bias(p, "conv2", x, padding=1)  # 56x56x192
    x = max_pool(norm(x), 3, 2, ceil=True)  # 28x28
    x = inception(p, "mixed3a", x, conv_bias)
    x = inception(p, "mixed3b", x, conv_bias)  # 28x28x480
    x = max_pool(x, 3, 2, ceil=True)  # 14x14
    x = inception(p, "mixed4a", x, conv_bias)
    x = inception(p, "mixed4b", x, conv_bias)
    x = inception(p, "mixed4c", x, conv_bias)
    x = inception(p, "mixed4d", x, conv_bias)
    x = inception(p, "mixed4e", x, conv_bias)  # 14x14x832
    x = max_pool(x, 3, 2, ceil=True)  # 7x7
    x = inception(p, "mixed5a", x, conv_bias)
    x = inception(p, "mixed5b", x, conv_bias)  # 7x7x1024
    return dense(global_avg_pool(x), p["params/head/kernel"], p["params/head/bias"])


def googlenet_bn_5x5(p, x):
    """torchvision's network, whose last pooling is 2x2, with the paper's 5x5."""
    x = conv_bn(p, "conv1", x, stride=2, padding=3)
    x = max_pool(x, 3, 2, ceil=True)
    x = conv_bn(p, "conv2_reduce", x)
    x = conv_bn(p, "conv2", x, padding=1)
    x = max_pool(x, 3, 2, ceil=True)
    x = inception(p, "mixed3a", x, conv_bn)
    x = inception(p, "mixed3b", x, conv_bn)
    x = max_pool(x, 3, 2, ceil=True)
    x = inception(p, "mixed4a", x, conv_bn)
    x = inception(p, "mixed4b", x, conv_bn)
    x = inception(p, "mixed4c", x, conv_bn)
    x = inception(p, "mixed4d", x, conv_bn)
    x = inception(p, "mixed4e", x, conv_bn)
    x = max_pool(x, 2, 2, ceil=True)
    x = inception(p, "mixed5a", x, conv_bn)
    x = inception(p, "mixed5b", x, conv_bn)
    return dense(global_avg_pool(x), p["params/head/kernel"], p["params/head/bias"])
