"""The CIFAR-100 classifier of the HSLU deck "Image Classification and Network Architectures".

3x3 convolutions without padding and 2x2 max pooling, layer by layer.
"""

from tests.models.straight.numpy_layers import conv, dense, flatten, max_pool, relu


def deck003_cifar100_example(p, x):
    x = relu(conv(x, p["params/conv1/conv/kernel"], p["params/conv1/conv/bias"]))  # 30x30x32
    x = max_pool(x, 2, 2)  # 15x15
    x = relu(conv(x, p["params/conv2/conv/kernel"], p["params/conv2/conv/bias"]))  # 13x13
    x = max_pool(x, 2, 2)  # 6x6
    x = relu(conv(x, p["params/conv3/conv/kernel"], p["params/conv3/conv/bias"]))  # 4x4
    return dense(flatten(x), p["params/head/kernel"], p["params/head/bias"])
