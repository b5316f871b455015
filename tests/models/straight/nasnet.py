"""NASNet-A (Zoph, Vasudevan, Shlens, Le 2017): the cells of figure 4, stacked as in figure 2.

What the figures leave open is as in the authors' release (TensorFlow's slim,
`nets/nasnet/nasnet.py` and `nasnet_utils.py`).

ReLU precedes a convolution, and normalization follows it; pooling has neither. Zero padding is
TensorFlow's: as little as gives ceil(size / stride), with one more at the far end if it is odd. It
does not count in means. A cell squeezes its input to its width by a 1x1. It also squeezes the input
of the previous cell: by two shifted halves if the sizes differ, and not at all if that input has
this width already. The first cell has no previous cell. It takes its input a second time without
squeezing, and the operations on it adapt the width.
"""

import numpy as np

from tests.models.straight.cifar_resnet import bias_free, classify
from tests.models.straight.numpy_layers import avg_pool, batch_norm, conv, dense, max_pool, relu


def norm(p, path, x):
    """Normalizes; uses the statistics of the batch if `p` has none."""
    mean = p.get(f"batch_stats/{path}/mean", x.mean(axis=(0, 1, 2)))
    var = p.get(f"batch_stats/{path}/var", x.var(axis=(0, 1, 2)))
    scale, bias = p[f"params/{path}/scale"], p[f"params/{path}/bias"]
    return batch_norm(x, scale, bias, mean, var, p["epsilon"])


def same(size, window, stride):
    """Returns the padding (before, after)."""
    zeros = max((-(-size // stride) - 1) * stride + window - size, 0)
    return zeros // 2, zeros - zeros // 2


def convolution(p, path, x, stride=1):
    """1x1"""
    x = bias_free(p, f"{path}/conv", relu(x), stride=stride)
    return norm(p, f"{path}/norm", x)


def separable(p, path, x, window, stride=1):
    """Two separable convolutions, the second with stride 1; nothing inside each of them."""
    for i in (1, 2):
        each = p[f"params/{path}/conv{i}/depthwise/kernel"]
        assert each.shape[:2] == (window, window)
        padding = same(x.shape[1], window, stride)
        x = conv(relu(x), each, stride=stride, padding=padding, groups=x.shape[3])
        x = bias_free(p, f"{path}/conv{i}/pointwise", x)
        x = norm(p, f"{path}/norm{i}", x)
        stride = 1
    return x


def adapted(p, path, x, width):
    """A 1x1 without ReLU after pooling, if the number of maps is not the cell's."""
    if x.shape[3] == width:
        return x
    return norm(p, f"{path}/norm", bias_free(p, f"{path}/conv", x))


def mean3(p, path, x, width, stride=1):
    padding, _ = same(x.shape[1], 3, stride)
    x = avg_pool(x, 3, stride, padding=padding, ceil=True, count_padding=False)
    return adapted(p, path, x, width)


def max3(p, path, x, width, stride=1):
    padding, _ = same(x.shape[1], 3, stride)
    return adapted(p, path, max_pool(x, 3, stride, padding=padding, ceil=True), width)


def identity(p, path, x, width, stride=1):
    if stride == 1 and x.shape[3] == width:
        return x
    return convolution(p, path, x, stride)


def halved(p, path, x):
    """Takes every other pixel, from the first and from the second (zeros follow the last)."""
    x = relu(x)
    shifted = np.pad(x[:, 1:, 1:], ((0, 0), (0, 1), (0, 1), (0, 0)))
    first = bias_free(p, f"{path}/conv1", x, stride=2)
    second = bias_free(p, f"{path}/conv2", shifted, stride=2)
    return norm(p, f"{path}/norm", np.concatenate([first, second], axis=3))


def given(p, cell, x, previous):
    """Returns h_i and h_(i-1) of figure 4, and the cell's width."""
    width = p[f"params/{cell}/squeeze/conv/kernel"].shape[3]
    if previous is None:
        old = x
    elif previous.shape[1] != x.shape[1]:
        old = halved(p, f"{cell}/squeeze_previous", previous)
    elif previous.shape[3] != width:
        old = convolution(p, f"{cell}/squeeze_previous", previous)
    else:
        old = previous
    return convolution(p, f"{cell}/squeeze", x), old, width


def normal(p, cell, x, previous):
    x, old, width = given(p, cell, x, previous)
    sums = [
        separable(p, f"{cell}/block1_left", x, 5) + separable(p, f"{cell}/block1_right", old, 3),
        separable(p, f"{cell}/block2_left", old, 5) + separable(p, f"{cell}/block2_right", old, 3),
        mean3(p, f"{cell}/block3_left", x, width) + identity(p, f"{cell}/block3_right", old, width),
        mean3(p, f"{cell}/block4_left", old, width) + mean3(p, f"{cell}/block4_right", old, width),
        separable(p, f"{cell}/block5_left", x, 3) + x,
    ]
    if old.shape[3] != width:  # again without ReLU
        old = norm(p, f"{cell}/project_norm", bias_free(p, f"{cell}/project", old))
    return np.concatenate([old, *sums], axis=3)


def reduction(p, cell, x, previous):
    x, old, width = given(p, cell, x, previous)
    one = separable(p, f"{cell}/block1_left", x, 5, 2)
    one = one + separable(p, f"{cell}/block1_right", old, 7, 2)
    two = max3(p, f"{cell}/block2_left", x, width, 2)
    two = two + separable(p, f"{cell}/block2_right", old, 7, 2)
    three = mean3(p, f"{cell}/block3_left", x, width, 2)
    three = three + separable(p, f"{cell}/block3_right", old, 5, 2)
    four = two + mean3(p, f"{cell}/block4_right", one, width)
    five = separable(p, f"{cell}/block5_left", one, 3)
    five = five + max3(p, f"{cell}/block5_right", x, width, 2)
    return np.concatenate([two, three, four, five], axis=3)


def cifar_stem(p, x):
    return [None, norm(p, "stem/norm", bias_free(p, "stem/conv", x, padding=1))]


def imagenet_stem(p, x, cell):
    """An unpadded convolution, and two cells of 1/4 and 1/2 of the first stage's width."""
    x = norm(p, "stem/norm", bias_free(p, "stem/conv", x, stride=2))
    y = cell(p, "stem/reduction1", x, None)
    return [y, cell(p, "stem/reduction2", y, x)]


def stages(p, maps, depths, normal, reduction, skip_reduction=False):
    """Returns the last maps of each stage, after ReLU; a stage has `depths` normal cells.

    With `skip_reduction` the cell after a reduction takes the older of the reduction's two inputs
    again.
    """
    ends = []
    for stage, depth in enumerate(depths, 1):
        previous, x = maps[-2:]
        if stage > 1:
            y = reduction(p, f"stage{stage}/reduction", x, previous)
            previous, x = (previous if skip_reduction else x), y
        for i in range(1, depth + 1):
            previous, x = x, normal(p, f"stage{stage}/normal{i}", x, previous)
        maps = [previous, x]
        ends.append(relu(x))
    return ends


def cifar(p, x, depths):
    p = {**p, "epsilon": 1e-5}
    return classify(p, stages(p, cifar_stem(p, x), depths, normal, reduction)[-1])


def imagenet(p, x, depths, skip_reduction=False):
    p = {**p, "epsilon": 1e-3}
    maps = imagenet_stem(p, x, reduction)
    return classify(p, stages(p, maps, depths, normal, reduction, skip_reduction)[-1])


def cifar_auxiliary(p, x, depths):
    """The auxiliary head after the second stage, in training."""
    p = {path: value for path, value in p.items() if not path.startswith("batch_stats")}
    p["epsilon"] = 1e-5
    x = stages(p, cifar_stem(p, x), depths, normal, reduction)[1]
    x = avg_pool(x, 5, 3)
    x = relu(norm(p, "aux1/norm1", bias_free(p, "aux1/conv1", x)))  # 1x1
    x = relu(norm(p, "aux1/norm2", bias_free(p, "aux1/conv2", x)))  # spans the whole map
    assert x.shape[1:3] == (1, 1)
    return dense(x[:, 0, 0], p["params/aux1/head/kernel"], p["params/aux1/head/bias"])
