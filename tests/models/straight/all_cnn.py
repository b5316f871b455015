"""The All Convolutional Net (Springenberg et al. 2015): table 1's base models without max pooling.

A 3x3 convolution with stride 2 replaces each 3x3 max pooling, as table 2 shows for C.

Every row of the tables has a ReLU, including the last 1x1 convolution. The paper does not say what
is padded. Here padding keeps all sizes, except for the first 3x3 convolution after the second
pooling. This gives the 6x6 maps that table 1 averages over.
"""

from tests.models.straight.numpy_layers import conv, global_avg_pool, relu


def _conv(p, path, x, **geometry):
    return relu(conv(x, p[f"params/{path}/kernel"], p[f"params/{path}/bias"], **geometry))


def all_cnn_a(p, x):
    x = _conv(p, "stage1/conv1", x, padding=2)  # 5x5, 96
    x = _conv(p, "stage1/conv2", x, padding=1, stride=2)  # 3x3, 96
    x = _conv(p, "stage2/conv1", x, padding=2)  # 5x5, 192
    x = _conv(p, "stage2/conv2", x, padding=1, stride=2)  # 3x3, 192
    x = _conv(p, "stage3/conv1", x)  # 3x3, 192
    x = _conv(p, "stage3/conv2", x)  # 1x1, 192
    x = _conv(p, "head", x)  # 1x1, 10
    return global_avg_pool(x)


def all_cnn_b(p, x):
    x = _conv(p, "stage1/conv1", x, padding=2)  # 5x5, 96
    x = _conv(p, "stage1/conv2", x)  # 1x1, 96
    x = _conv(p, "stage1/conv3", x, padding=1, stride=2)  # 3x3, 96
    x = _conv(p, "stage2/conv1", x, padding=2)  # 5x5, 192
    x = _conv(p, "stage2/conv2", x)  # 1x1, 192
    x = _conv(p, "stage2/conv3", x, padding=1, stride=2)  # 3x3, 192
    x = _conv(p, "stage3/conv1", x)  # 3x3, 192
    x = _conv(p, "stage3/conv2", x)  # 1x1, 192
    x = _conv(p, "head", x)  # 1x1, 10
    return global_avg_pool(x)


def all_cnn_c(p, x):
    x = _conv(p, "stage1/conv1", x, padding=1)  # 3x3, 96
    x = _conv(p, "stage1/conv2", x, padding=1)  # 3x3, 96
    x = _conv(p, "stage1/conv3", x, padding=1, stride=2)  # 3x3, 96
    x = _conv(p, "stage2/conv1", x, padding=1)  # 3x3, 192
    x = _conv(p, "stage2/conv2", x, padding=1)  # 3x3, 192
    x = _conv(p, "stage2/conv3", x, padding=1, stride=2)  # 3x3, 192
    x = _conv(p, "stage3/conv1", x)  # 3x3, 192
    x = _conv(p, "stage3/conv2", x)  # 1x1, 192
    x = _conv(p, "head", x)  # 1x1, 10
    return global_avg_pool(x)
