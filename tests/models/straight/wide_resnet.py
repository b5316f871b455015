"""Wide ResNets for CIFAR (Zagoruyko, Komodakis 2016, table 1).

A stage has (depth - 4) / 6 blocks of two 3x3, each after normalization and ReLU. As in the released
code (`models/wide-resnet.lua`), a block that changes the width applies its first normalization and
ReLU before it splits, and its shortcut is a bare 1x1 convolution. The network ends with
normalization and ReLU.
"""

from tests.models.straight.cifar_resnet import bias_free, classify, norm
from tests.models.straight.numpy_layers import relu


def wide_basic(p, block, x, stride):
    y = relu(norm(p, f"{block}/norm1", x))
    if f"params/{block}/projection/kernel" in p:
        x = bias_free(p, f"{block}/projection", y, stride=stride)
    y = bias_free(p, f"{block}/conv1", y, stride=stride, padding=1)
    y = relu(norm(p, f"{block}/norm2", y))
    y = bias_free(p, f"{block}/conv2", y, padding=1)  # in training, dropout precedes it
    return x + y


def wide_resnet(p, x, depth):
    x = bias_free(p, "stem", x, padding=1)
    for stage in (1, 2, 3):
        for i in range(1, (depth - 4) // 6 + 1):
            x = wide_basic(p, f"stage{stage}/block{i}", x, stride=2 if stage > 1 and i == 1 else 1)
    return classify(p, relu(norm(p, "norm", x)))
