"""SqueezeNet, layer by layer: Iandola et al. 2016, table 1 and figure 2, and version 1.1.

Figure 2 has the simple bypass in the middle. The prototxt of the authors' version 1.1 has pooling
after conv1, fire3 and fire5. From the released files come 3x3 pooling with stride 2 that rounds up,
and the ReLU after conv10. The released version 1.0 pads conv10. Table 1 does not: there conv10 is
13x13, as fire9.
"""

import numpy as np

from tests.models.straight.numpy_layers import conv, global_avg_pool, max_pool, relu


def layer(p, name, x, **geometry):
    return relu(conv(x, p[f"params/{name}/conv/kernel"], p[f"params/{name}/conv/bias"], **geometry))


def classify(p, x):
    """conv10, ReLU, and the mean of each class's map."""
    return global_avg_pool(relu(conv(x, p["params/head/kernel"], p["params/head/bias"])))


def fire(p, name, x):
    """Figure 1: the 3x3 keep the size; 1x1 first, then 3x3."""
    x = layer(p, f"{name}/squeeze", x)
    return np.concatenate(
        [layer(p, f"{name}/expand1x1", x), layer(p, f"{name}/expand3x3", x, padding=1)], axis=3
    )


def squeezenet1_0_bypass(p, x):
    """Bypass around fire3, fire5, fire7 and fire9, whose inputs and outputs have equal shapes."""
    x = layer(p, "conv1", x, stride=2)
    x = max_pool(x, 3, 2, ceil=True)
    x = fire(p, "fire2", x)
    x = x + fire(p, "fire3", x)
    x = fire(p, "fire4", x)
    x = max_pool(x, 3, 2, ceil=True)
    x = x + fire(p, "fire5", x)
    x = fire(p, "fire6", x)
    x = x + fire(p, "fire7", x)
    x = fire(p, "fire8", x)
    x = max_pool(x, 3, 2, ceil=True)
    x = x + fire(p, "fire9", x)
    return classify(p, x)


def squeezenet1_1(p, x):
    x = layer(p, "conv1", x, stride=2)
    return after_pool1_of_1_1(p, max_pool(x, 3, 2, ceil=True))


def cifar_squeezenet1_1(p, x):
    """Version 1.1 with stride 1 in conv1 and pool1: maps of 30x30, 28x28, 14x14, 7x7.

    From the prototxt of Coderx7/SimpNet, SqueezeNet_v1.1_tests.
    """
    x = layer(p, "conv1", x)
    return after_pool1_of_1_1(p, max_pool(x, 3, 1, ceil=True))


def after_pool1_of_1_1(p, x):
    x = fire(p, "fire2", x)
    x = fire(p, "fire3", x)
    x = max_pool(x, 3, 2, ceil=True)
    x = fire(p, "fire4", x)
    x = fire(p, "fire5", x)
    x = max_pool(x, 3, 2, ceil=True)
    x = fire(p, "fire6", x)
    x = fire(p, "fire7", x)
    x = fire(p, "fire8", x)
    x = fire(p, "fire9", x)
    return classify(p, x)
