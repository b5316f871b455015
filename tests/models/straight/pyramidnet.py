"""PyramidNet on CIFAR (Han, Kim, Kim 2017, figure 6 (d)), with ShakeDrop in evaluation.

The network follows its authors' code (`addpyramidnet.lua` for Torch). The stem has no ReLU. A block
begins with normalization without ReLU and ends with normalization. With stride 2 the shortcut takes
2x2 means; it has zeros for new channels.

ShakeDrop (Yamada et al. 2019) scales branch l of L by E[b + alpha - b alpha] = p_l, since alpha is
symmetric around zero, with p_l = 1 - l/L (1 - p_L) and p_L = 0.5.
"""

from tests.models.straight.cifar_resnet import bias_free, classify, norm, zero_padded
from tests.models.straight.numpy_layers import avg_pool, relu


def basic(p, block, x, stride):
    y = norm(p, f"{block}/norm1", x)
    y = bias_free(p, f"{block}/conv1", y, stride=stride, padding=1)
    y = relu(norm(p, f"{block}/norm2", y))
    y = bias_free(p, f"{block}/conv2", y, padding=1)
    return norm(p, f"{block}/norm3", y)


def bottleneck(p, block, x, stride):
    y = norm(p, f"{block}/norm1", x)
    y = bias_free(p, f"{block}/conv1", y)  # 1x1
    y = relu(norm(p, f"{block}/norm2", y))
    y = bias_free(p, f"{block}/conv2", y, stride=stride, padding=1)
    y = relu(norm(p, f"{block}/norm3", y))
    y = bias_free(p, f"{block}/conv3", y)  # 1x1
    return norm(p, f"{block}/norm4", y)


def pyramidnet(p, x, residual, depth, last_survival=1.0):
    """PyramidNet with three stages of `depth` blocks."""
    x = norm(p, "stem/norm", bias_free(p, "stem/conv", x, padding=1))
    number = 0
    for stage in (1, 2, 3):
        for i in range(1, depth + 1):
            number += 1
            survival = 1 - number / (3 * depth) * (1 - last_survival)
            stride = 2 if stage > 1 and i == 1 else 1
            y = residual(p, f"stage{stage}/block{i}", x, stride)
            if stride == 2:
                x = avg_pool(x, 2, 2)
            x = zero_padded(x, y.shape[3]) + survival * y
    return classify(p, relu(norm(p, "norm", x)))
