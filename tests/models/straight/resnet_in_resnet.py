"""ResNet in ResNet on CIFAR (Targ, Almeida, Lyman 2016, equation 1 and figure 1).

What the paper leaves open follows the docstring of `flax_cnns/models/resnet_in_resnet.py`:
shortcuts take every other pixel and zeros for new channels; a block's outer shortcut joins the
residual streams after the ReLU of its last unit; the first unit of a stage has the stride; a
normalization without ReLU follows the 1x1 to the classes, before the mean.
"""

from functools import partial

import numpy as np

from tests.models.straight.cifar_resnet import bias_free, norm, shortcut_a
from tests.models.straight.numpy_layers import global_avg_pool, relu


def stem(p, path, x):
    return relu(norm(p, f"{path}/norm", bias_free(p, f"{path}/conv", x, padding=1)))


def unit(p, path, r, t, stride):
    """Equation 1: r has a shortcut, t has none; normalization follows the sum."""

    def to(stream, x):
        return bias_free(p, f"{path}/{stream}", x, stride=stride, padding=1)

    new_r = to("r_to_r", r) + to("t_to_r", t)
    new_t = to("r_to_t", r) + to("t_to_t", t)
    new_r = new_r + shortcut_a(p, path, r, new_r.shape[3], stride)
    return relu(norm(p, f"{path}/norm_r", new_r)), relu(norm(p, f"{path}/norm_t", new_t))


def block(p, path, r, t, stride, nested):
    """Figure 1d: two units replace the two convolutions of He et al.'s block."""
    new_r, new_t = unit(p, f"{path}/unit1", r, t, stride)
    new_r, new_t = unit(p, f"{path}/unit2", new_r, new_t, 1)
    if nested:
        new_r = new_r + shortcut_a(p, path, r, new_r.shape[3], stride)
    return new_r, new_t


def resnet_in_resnet(p, x, depths, nested):
    r, t = stem(p, "stem_r", x), stem(p, "stem_t", x)
    for stage, depth in enumerate(depths, 1):
        for i in range(1, depth + 1):
            stride = 2 if stage > 1 and i == 1 else 1
            r, t = block(p, f"stage{stage}/block{i}", r, t, stride, nested)
    x = np.concatenate([r, t], axis=3)
    return global_avg_pool(norm(p, "head_norm", bias_free(p, "head", x)))  # 1x1


rir = partial(resnet_in_resnet, nested=True)
resnet_init = partial(resnet_in_resnet, nested=False)
