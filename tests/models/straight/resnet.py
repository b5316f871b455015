"""ImageNet networks of He et al. 2015 that the libraries do not have.

These are table 1 with the shortcuts A and C of section 3.3, the plain networks (figure 3, middle),
and bottlenecks with the stride in the first 1x1 (as in the authors' Caffe prototxt; the libraries
have it in the 3x3).
"""

from functools import partial

import numpy as np

from tests.models.straight.cifar_resnet import (
    basic,
    bias_free,
    classify,
    no_shortcut,
    norm,
    shortcut_a,
    shortcut_b,
    shortcut_c,
)
from tests.models.straight.numpy_layers import max_pool, relu


def bottleneck_v1(p, block, x, stride, shortcut):
    y = bias_free(p, f"{block}/conv1", x, stride=stride)
    y = relu(norm(p, f"{block}/norm1", y))
    y = bias_free(p, f"{block}/conv2", y, padding=1)
    y = relu(norm(p, f"{block}/norm2", y))
    y = bias_free(p, f"{block}/conv3", y)
    y = norm(p, f"{block}/norm3", y)
    return relu(shortcut(p, block, x, y.shape[3], stride) + y)


def imagenet_resnet(p, x, depths, block, shortcut):
    x = bias_free(p, "stem/conv", x, stride=2, padding=3)
    x = relu(norm(p, "stem/norm", x))
    # conv2_x begins with this pooling. 112x112 to 56x56 requires padding, here before, as in Torch.
    # After ReLU padding with zeros cannot change a maximum.
    x = max_pool(np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), 3, 2)
    for stage, depth in enumerate(depths, 1):
        for i in range(1, depth + 1):
            stride = 2 if stage > 1 and i == 1 else 1
            x = block(p, f"stage{stage}/block{i}", x, stride, shortcut)
    return classify(p, x)


v1 = partial(imagenet_resnet, block=bottleneck_v1, shortcut=shortcut_b)
option_a = partial(imagenet_resnet, block=basic, shortcut=shortcut_a)
option_c = partial(imagenet_resnet, block=basic, shortcut=shortcut_c)
plain = partial(imagenet_resnet, block=basic, shortcut=no_shortcut)
