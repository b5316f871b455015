"""AlexNet, layer by layer: Krizhevsky et al. 2012, section 3.5 and figure 2.

Images have 227x227 pixels, which gives maps of the paper's sizes 55, 27, 13 and 6.
"""

from tests.models.straight.numpy_layers import (
    conv,
    dense,
    flatten,
    local_response_norm,
    max_pool,
    relu,
)


def layer(p, name, x, **geometry):
    return relu(conv(x, p[f"params/{name}/conv/kernel"], p[f"params/{name}/conv/bias"], **geometry))


def norm(x):
    """Section 3.3: k = 2, n = 5, alpha = 1e-4, beta = 0.75, over all maps of the layer."""
    return local_response_norm(x, size=5, alpha=1e-4, beta=0.75, k=2)


def classify(p, x):
    x = relu(dense(flatten(x), p["params/fc6/kernel"], p["params/fc6/bias"]))
    x = relu(dense(x, p["params/fc7/kernel"], p["params/fc7/bias"]))
    return dense(x, p["params/head/kernel"], p["params/head/bias"])


def alexnet_2gpu(p, x):
    """Conv2, conv4 and conv5 see the maps of their own half.

    Section 3.5: normalization follows conv1 and conv2. Pooling (3x3 with stride 2, section 3.4)
    follows both normalizations and conv5.
    """
    x = layer(p, "conv1", x, stride=4)  # 55x55x96
    x = max_pool(norm(x), 3, 2)  # 27x27
    x = layer(p, "conv2", x, padding=2, groups=2)  # 27x27x256
    x = max_pool(norm(x), 3, 2)  # 13x13
    x = layer(p, "conv3", x, padding=1)  # 13x13x384
    x = layer(p, "conv4", x, padding=1, groups=2)  # 13x13x384
    x = layer(p, "conv5", x, padding=1, groups=2)  # 13x13x256
    x = max_pool(x, 3, 2)  # 6x6x256
    return classify(p, x)


def alexnet_single_tower(p, x):
    """The table in the deck "Convolutional Neural Networks": CONV1, MAX POOL1, NORM1, CONV2, ..."""
    x = layer(p, "conv1", x, stride=4)
    x = norm(max_pool(x, 3, 2))
    x = layer(p, "conv2", x, padding=2)
    x = norm(max_pool(x, 3, 2))
    x = layer(p, "conv3", x, padding=1)
    x = layer(p, "conv4", x, padding=1)
    x = layer(p, "conv5", x, padding=1)
    x = max_pool(x, 3, 2)
    return classify(p, x)
