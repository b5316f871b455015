"""ZFNet, layer by layer: Zeiler and Fergus 2013, figure 3 and its caption.

For images of 224x224 the maps are 110, 55, 26, 13 and 6. The shapes of the weights decide between
figure 3 and the 512-1024-512 maps of table 2.

Layers 1 and 2 are convolved, rectified, pooled (3x3, stride 2), then "contrast normalized across
feature maps". The caption gives no constants; these are AlexNet's. 110 -> 55 and 26 -> 13 require
rounding up.
"""

from tests.models.straight.numpy_layers import (
    adaptive_avg_pool,
    conv,
    dense,
    flatten,
    local_response_norm,
    max_pool,
    relu,
)


def layer(p, name, x, **geometry):
    return relu(conv(x, p[f"params/{name}/conv/kernel"], p[f"params/{name}/conv/bias"], **geometry))


def zfnet(p, x):
    x = layer(p, "conv1", x, stride=2, padding=1)  # 110x110x96
    x = max_pool(x, 3, 2, ceil=True)  # 55x55
    x = local_response_norm(x, size=5, alpha=1e-4, beta=0.75, k=2)
    x = layer(p, "conv2", x, stride=2)  # 26x26x256
    x = max_pool(x, 3, 2, ceil=True)  # 13x13
    x = local_response_norm(x, size=5, alpha=1e-4, beta=0.75, k=2)
    x = layer(p, "conv3", x, padding=1)  # 13x13
    x = layer(p, "conv4", x, padding=1)
    x = layer(p, "conv5", x, padding=1)
    x = max_pool(x, 3, 2, ceil=True)  # 6x6
    x = adaptive_avg_pool(x, 6)  # changes nothing at 224x224
    x = relu(dense(flatten(x), p["params/fc6/kernel"], p["params/fc6/bias"]))
    x = relu(dense(x, p["params/fc7/kernel"], p["params/fc7/bias"]))
    return dense(x, p["params/head/kernel"], p["params/head/bias"])
