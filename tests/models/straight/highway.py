"""Highway networks for CIFAR-10 (Srivastava, Greff, Schmidhuber 2015).

`highway_19` is `examples/highways/cifar10-19layers/cifar10_network.prototxt` of the authors' Caffe.
A highway layer is equation 3: y = H(x) T(x) + x (1 - T(x)), where H is a convolution with ReLU and
T a convolution with a sigmoid. For `highway_32` (table 2's Highway C), the paper says 32 layers and
"alternating receptive fields of size 3x3 and 1x1"; the rest follows the 19-layer network.
"""

from tests.models.straight.numpy_layers import (
    conv,
    dense,
    global_avg_pool,
    max_pool,
    relu,
    sigmoid,
)


def _conv(p, path, x, padding):
    return conv(x, p[f"params/{path}/kernel"], p[f"params/{path}/bias"], padding=padding)


def _highway(p, path, x, padding):
    h = relu(_conv(p, f"{path}/conv", x, padding))
    t = sigmoid(_conv(p, f"{path}/gate", x, padding))
    return h * t + x * (1 - t)


def highway_19(p, x):
    x = relu(_conv(p, "stage1/conv", x, padding=1))  # conv1: 3x3, 32
    x = _highway(p, "stage1/highway1", x, padding=1)  # conv2
    x = _highway(p, "stage1/highway2", x, padding=1)  # conv3
    x = _highway(p, "stage1/highway3", x, padding=1)  # conv4
    x = _highway(p, "stage1/highway4", x, padding=1)  # conv5
    x = max_pool(x, 2, 2)
    x = relu(_conv(p, "stage2/conv", x, padding=1))  # conv6: 3x3, 80
    x = _highway(p, "stage2/highway1", x, padding=1)  # conv7
    x = _highway(p, "stage2/highway2", x, padding=1)  # conv8
    x = _highway(p, "stage2/highway3", x, padding=1)  # conv9
    x = _highway(p, "stage2/highway4", x, padding=1)  # conv10
    x = _highway(p, "stage2/highway5", x, padding=1)  # conv11
    x = max_pool(x, 2, 2)
    x = relu(_conv(p, "stage3/conv", x, padding=1))  # conv12: 3x3, 128
    x = _highway(p, "stage3/highway1", x, padding=1)  # conv13
    x = _highway(p, "stage3/highway2", x, padding=1)  # conv14
    x = _highway(p, "stage3/highway3", x, padding=1)  # conv15
    x = _highway(p, "stage3/highway4", x, padding=1)  # conv16
    x = _highway(p, "stage3/highway5", x, padding=1)  # conv17
    x = relu(_conv(p, "last/conv", x, padding=0))  # conv18: 1x1, 100
    x = global_avg_pool(x)  # AVE over the whole map (8x8)
    return dense(x, p["params/head/kernel"], p["params/head/bias"])


def highway_32(p, x):
    x = relu(_conv(p, "stage1/conv", x, padding=1))  # 3x3
    x = _highway(p, "stage1/highway1", x, padding=0)  # 1x1, then 3x3 and 1x1 in turn
    x = _highway(p, "stage1/highway2", x, padding=1)
    x = _highway(p, "stage1/highway3", x, padding=0)
    x = _highway(p, "stage1/highway4", x, padding=1)
    x = _highway(p, "stage1/highway5", x, padding=0)
    x = _highway(p, "stage1/highway6", x, padding=1)
    x = _highway(p, "stage1/highway7", x, padding=0)
    x = _highway(p, "stage1/highway8", x, padding=1)
    x = _highway(p, "stage1/highway9", x, padding=0)
    x = max_pool(x, 2, 2)
    x = relu(_conv(p, "stage2/conv", x, padding=1))
    x = _highway(p, "stage2/highway1", x, padding=0)
    x = _highway(p, "stage2/highway2", x, padding=1)
    x = _highway(p, "stage2/highway3", x, padding=0)
    x = _highway(p, "stage2/highway4", x, padding=1)
    x = _highway(p, "stage2/highway5", x, padding=0)
    x = _highway(p, "stage2/highway6", x, padding=1)
    x = _highway(p, "stage2/highway7", x, padding=0)
    x = _highway(p, "stage2/highway8", x, padding=1)
    x = _highway(p, "stage2/highway9", x, padding=0)
    x = max_pool(x, 2, 2)
    x = relu(_conv(p, "stage3/conv", x, padding=1))
    x = _highway(p, "stage3/highway1", x, padding=0)
    x = _highway(p, "stage3/highway2", x, padding=1)
    x = _highway(p, "stage3/highway3", x, padding=0)
    x = _highway(p, "stage3/highway4", x, padding=1)
    x = _highway(p, "stage3/highway5", x, padding=0)
    x = _highway(p, "stage3/highway6", x, padding=1)
    x = _highway(p, "stage3/highway7", x, padding=0)
    x = _highway(p, "stage3/highway8", x, padding=1)
    x = _highway(p, "stage3/highway9", x, padding=0)
    x = relu(_conv(p, "last/conv", x, padding=0))  # 1x1, 100
    x = global_avg_pool(x)
    return dense(x, p["params/head/kernel"], p["params/head/bias"])
