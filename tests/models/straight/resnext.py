"""ResNeXt-29 for CIFAR (Xie et al. 2017, section 5.3 and figure 3c): a 3x3 convolution of 64 maps,
three stages of three blocks, shortcuts B. The 3x3 has the stride (`models/resnext.lua`)."""

from tests.models.straight.cifar_resnet import bias_free, classify, norm, shortcut_b
from tests.models.straight.numpy_layers import relu


def aggregated(p, block, x, stride, cardinality):
    """1x1, a 3x3 in `cardinality` groups, 1x1."""
    y = bias_free(p, f"{block}/conv1", x)
    y = relu(norm(p, f"{block}/norm1", y))
    y = bias_free(p, f"{block}/conv2", y, stride=stride, padding=1, groups=cardinality)
    y = relu(norm(p, f"{block}/norm2", y))
    y = bias_free(p, f"{block}/conv3", y)
    y = norm(p, f"{block}/norm3", y)
    return relu(shortcut_b(p, block, x, y.shape[3], stride) + y)


def cifar(p, x, depths, cardinality):
    x = bias_free(p, "stem/conv", x, padding=1)
    x = relu(norm(p, "stem/norm", x))
    for stage, depth in enumerate(depths, 1):
        for i in range(1, depth + 1):
            stride = 2 if stage > 1 and i == 1 else 1
            x = aggregated(p, f"stage{stage}/block{i}", x, stride, cardinality)
    return classify(p, x)
