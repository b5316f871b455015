"""SimpNet's 13 layers (Hasanpour et al. 2018, section 4 and figure 4), and SAF pooling in training.

The layers come from the authors' Caffe files (Coderx7/SimpNet, `Architectures/CIFAR10/5Mil/` and
`Experiments/Slim Test/CIFAR10/300K_93.25/`), which differ only in widths and dropout: 3x3
convolution with bias, BatchNorm (Caffe's epsilon, 1e-5), scale and shift, ReLU; max pooling after
the fifth and the tenth layer, global max pooling after the thirteenth.
"""

from heapq import nlargest

import numpy as np

from tests.models.straight.numpy_layers import batch_norm, conv, dense, relu


def _evaluation(p, path, x):
    x = conv(x, p[f"params/{path}/conv/kernel"], p[f"params/{path}/conv/bias"], padding=1)
    mean, var = p[f"batch_stats/{path}/norm/mean"], p[f"batch_stats/{path}/norm/var"]
    scale, bias = p[f"params/{path}/norm/scale"], p[f"params/{path}/norm/bias"]
    return relu(batch_norm(x, scale, bias, mean, var, epsilon=1e-5))


def _training(p, path, x):
    """A layer in training, with the mean and variance of the batch."""
    x = conv(x, p[f"params/{path}/conv/kernel"], p[f"params/{path}/conv/bias"], padding=1)
    mean, var = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
    scale, bias = p[f"params/{path}/norm/scale"], p[f"params/{path}/norm/bias"]
    return relu(batch_norm(x, scale, bias, mean, var, epsilon=1e-5))


def simpnet(p, x, layer=_evaluation, rates=(0, 0, 0)):
    x = layer(p, "conv1", x)  # conv1
    x = layer(p, "conv2", x)  # conv1_0
    x = layer(p, "conv3", x)  # conv2
    x = layer(p, "conv4", x)  # conv2_1
    x = layer(p, "conv5", x)  # conv2_2
    x = saf_strongest(x, 2, rates[0])  # pool2_1 and drop5
    x = layer(p, "conv6", x)  # conv3
    x = layer(p, "conv7", x)  # conv3_1
    x = layer(p, "conv8", x)  # conv4
    x = layer(p, "conv9", x)  # conv4_1
    x = layer(p, "conv10", x)  # conv4_2
    x = saf_strongest(x, 2, rates[1])  # pool4_2 and drop9
    x = layer(p, "conv11", x)  # conv4_0
    x = layer(p, "conv12", x)  # conv11
    x = layer(p, "conv13", x)  # conv12
    x = saf_strongest(x, None, rates[2])  # poolcp6 and drop12
    return dense(x, p["params/head/kernel"], p["params/head/bias"])


def simpnet_training(p, x, rates):
    """SimpNet in training, with SAF pooling at these rates and no other dropout."""
    return simpnet(p, x, _training, rates)


def saf_strongest(x, window, rate):
    """[N H W C] -> [N H/window W/window C], or [N C] if `window` is None (the whole map).

    The strongest fraction `rate` of an image's maxima, over positions and channels, becomes 0.
    """
    n, height, width, channels = x.shape
    tall, wide = (height, width) if window is None else (window, window)
    pooled = np.empty((n, height // tall, width // wide, channels))
    for i, j in np.ndindex(pooled.shape[1:3]):
        cut = x[:, i * tall : (i + 1) * tall, j * wide : (j + 1) * wide]
        pooled[:, i, j] = cut.max(axis=(1, 2))
    for image in pooled:
        for place in nlargest(round(rate * image.size), np.ndindex(image.shape), image.__getitem__):
            image[place] = 0
    return pooled[:, 0, 0] if window is None else pooled
