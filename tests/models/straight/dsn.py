"""The Deeply-Supervised Net for CIFAR-10 (Lee et al. 2015, section 3.2) as the authors released it.

From `examples/best_cifar10_9.65/cifar-10.prototxt` of their Caffe: Network in Network with max
pooling in both places and without ReLU on the maps of the classes. Caffe's pooling rounds up. The
companion heads `ip_svm1` to `ip_svm3` are dense layers on each 3x3 or 5x5 convolution's output
before its ReLU.
"""

from tests.models.straight.numpy_layers import conv, dense, flatten, global_avg_pool, max_pool, relu


def _conv(p, path, x, **geometry):
    return conv(x, p[f"params/{path}/kernel"], p[f"params/{path}/bias"], **geometry)


def _companion(p, path, x):
    return dense(flatten(x), p[f"params/{path}/head/kernel"], p[f"params/{path}/head/bias"])


def dsn(p, x):
    return _all(p, x)["head"]


def dsn_companions(p, x):
    """Returns the companions' logits in training, without dropout: {"aux1": [N K], ...}."""
    heads = _all(p, x)
    del heads["head"]
    return heads


def _all(p, x):
    x1 = _conv(p, "conv1", x, padding=2)  # 5x5, 192
    x = relu(x1)
    x = relu(_conv(p, "mlpconv1/cccp1", x))
    x = relu(_conv(p, "mlpconv1/cccp2", x))
    x = max_pool(x, 3, 2, ceil=True)  # pool1
    x2 = _conv(p, "conv2", x, padding=2)  # 5x5, 192
    x = relu(x2)
    x = relu(_conv(p, "mlpconv2/cccp1", x))  # cccp3
    x = relu(_conv(p, "mlpconv2/cccp2", x))  # cccp4
    x = max_pool(x, 3, 2, ceil=True)  # pool2
    x3 = _conv(p, "conv3", x, padding=1)  # 3x3, 192
    x = relu(x3)
    x = relu(_conv(p, "mlpconv3/cccp1", x))  # cccp5
    x = _conv(p, "head", x)  # cccp6
    return {
        "aux1": _companion(p, "aux1", x1),
        "aux2": _companion(p, "aux2", x2),
        "aux3": _companion(p, "aux3", x3),
        "head": global_avg_pool(x),  # pool3, AVE over the whole map (8x8)
    }
