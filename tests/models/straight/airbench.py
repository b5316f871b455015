"""airbench94's network (Jordan 2024, section 3.2, and `make_net` of airbench94.py).

A 2x2 convolution without padding and GELU, three groups of convolution, 2x2 max pooling, BatchNorm
without scale (epsilon 1e-12), GELU, convolution, BatchNorm, GELU; 3x3 max pooling of the last map,
a dense layer without bias, and a factor of 1/9.
"""

import numpy as np
from scipy.special import erf

from tests.models.straight.numpy_layers import batch_norm, conv, dense, flatten, max_pool


def _gelu(x):
    return x * (1 + erf(x / np.sqrt(2))) / 2


def _norm(p, path, x):
    bias = p[f"params/{path}/bias"]
    mean, var = (p[f"batch_stats/{path}/{name}"] for name in ("mean", "var"))
    return batch_norm(x, 1.0, bias, mean, var, 1e-12)


def airbench94(p, x):
    x = _gelu(conv(x, p["params/whiten/kernel"], p["params/whiten/bias"]))
    for stage in ("stage1", "stage2", "stage3"):
        x = conv(x, p[f"params/{stage}/conv1/kernel"], padding=1)
        x = _gelu(_norm(p, f"{stage}/norm1", max_pool(x, 2, 2)))
        x = conv(x, p[f"params/{stage}/conv2/kernel"], padding=1)
        x = _gelu(_norm(p, f"{stage}/norm2", x))
    x = flatten(max_pool(x, 3, 3))
    return dense(x, p["params/head/kernel"]) / 9
