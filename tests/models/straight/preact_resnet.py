"""He et al. 2016: the five orders of convolution, normalization, ReLU and addition of figure 4.

Appendix: the first pre-activation directly follows conv1, before the unit splits, and there is
another one after the last unit. As in the released code (`resnet-pre-act.lua`, the full
pre-activation), units that change the width share their first activation with the shortcut, which
is a 1x1 convolution without normalization; the first 1x1 of a bottleneck has the stride.
"""

from functools import partial

from tests.models.straight.cifar_resnet import bias_free, classify, norm, shortcut_b
from tests.models.straight.numpy_layers import relu


def weight(p, unit, i, x, stride):
    """Convolution i, 3x3 or in a bottleneck 1x1; the first has the stride."""
    name = f"{unit}/conv{i}"
    around = p[f"params/{name}/kernel"].shape[0] // 2
    return bias_free(p, name, x, stride=stride if i == 1 else 1, padding=around)


def convolutions(p, unit):
    return (1, 2, 3) if f"params/{unit}/conv3/kernel" in p else (1, 2)


def widens(p, unit):
    return f"params/{unit}/projection/kernel" in p


def original(p, unit, x, stride):
    """Order (a)."""
    y = x
    for i in convolutions(p, unit):
        y = norm(p, f"{unit}/norm{i}", weight(p, unit, i, y, stride))
        if i < len(convolutions(p, unit)):
            y = relu(y)
    return relu(shortcut_b(p, unit, x, y.shape[3], stride) + y)


def bn_after_add(p, unit, x, stride):
    """Order (b): the last norm follows the sum, so the shortcut has no norm."""
    y, *_, last = x, *convolutions(p, unit)
    for i in convolutions(p, unit):
        y = weight(p, unit, i, y, stride)
        if i < last:
            y = relu(norm(p, f"{unit}/norm{i}", y))
    if widens(p, unit):
        x = bias_free(p, f"{unit}/projection", x, stride=stride)
    return relu(norm(p, f"{unit}/norm{last}", x + y))


def relu_before_add(p, unit, x, stride):
    """Order (c)."""
    y = x
    for i in convolutions(p, unit):
        y = relu(norm(p, f"{unit}/norm{i}", weight(p, unit, i, y, stride)))
    return shortcut_b(p, unit, x, y.shape[3], stride) + y


def relu_only_preact(p, unit, x, stride, first=False):
    """Order (d)."""
    y = relu(x)
    if first or widens(p, unit):
        x = y
    for i in convolutions(p, unit):
        y = norm(p, f"{unit}/norm{i}", weight(p, unit, i, relu(y), stride))
    return shortcut_b(p, unit, x, y.shape[3], stride) + y


def full_preact(p, unit, x, stride, first=False):
    """Order (e)."""
    y = relu(norm(p, f"{unit}/norm1", x))
    if first:
        x = y
    if widens(p, unit):
        x = bias_free(p, f"{unit}/projection", y, stride=stride)
    for i in convolutions(p, unit):
        if i > 1:
            y = relu(norm(p, f"{unit}/norm{i}", y))
        y = weight(p, unit, i, y, stride)
    return x + y


PREACT = (relu_only_preact, full_preact)


def cifar_preact(p, x, depths, order):
    x = bias_free(p, "stem/conv", x, padding=1)
    if order is not full_preact:
        x = relu(norm(p, "stem/norm", x))
    for stage, depth in enumerate(depths, 1):
        for i in range(1, depth + 1):
            stride = 2 if stage > 1 and i == 1 else 1
            begins = {"first": True} if stage == i == 1 and order in PREACT else {}
            x = order(p, f"stage{stage}/block{i}", x, stride, **begins)
    if order is full_preact:
        x = relu(norm(p, "norm", x))
    if order is relu_only_preact:
        x = relu(x)
    return classify(p, x)


ORDERS = (original, bn_after_add, relu_before_add, relu_only_preact, full_preact)
full = partial(cifar_preact, order=full_preact)
