"""A network of NAS-Bench-201 (Dong & Yang 2020, section 2), with one cell in each of two stages.

The cell has all five operations. Its text, as the paper's release writes it:
|nor_conv_3x3~0|+|none~0|nor_conv_1x1~1|+|skip_connect~0|avg_pool_3x3~1|nor_conv_3x3~2|
Figure 1 gives the skeleton; the shortcut of the residual block is the release's.
"""

from tests.models.straight.cifar_resnet import bias_free, classify, norm
from tests.models.straight.numpy_layers import avg_pool, relu

CELL = "|nor_conv_3x3~0|+|none~0|nor_conv_1x1~1|+|skip_connect~0|avg_pool_3x3~1|nor_conv_3x3~2|"


def relu_conv_norm(p, path, x, **geometry):
    return norm(p, f"{path}/norm", bias_free(p, f"{path}/conv", relu(x), **geometry))


def cell(p, path, x):
    first = relu_conv_norm(p, f"{path}/edge0_1", x, padding=1)
    second = relu_conv_norm(p, f"{path}/edge1_2", first)
    pooled = avg_pool(first, 3, 1, padding=1, count_padding=False)
    return x + pooled + relu_conv_norm(p, f"{path}/edge2_3", second, padding=1)


def residual(p, path, x):
    y = relu_conv_norm(p, f"{path}/conv1", x, stride=2, padding=1)
    y = relu_conv_norm(p, f"{path}/conv2", y, padding=1)
    means = avg_pool(x, 2, 2, ceil=True)  # as many pixels as the convolution leaves
    return y + bias_free(p, f"{path}/projection", means)


def network(p, x):
    x = norm(p, "stem/norm", bias_free(p, "stem/conv", x, padding=1))
    x = residual(p, "stage2/reduction", cell(p, "stage1/cell1", x))
    x = cell(p, "stage2/cell1", x)
    return classify(p, relu(norm(p, "norm", x)))
