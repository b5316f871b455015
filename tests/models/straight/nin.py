"""Network in Network (Lin, Chen, Yan 2014, figure 2) as the first author released it for Caffe.

The paper gives neither widths nor kernel sizes; these come from `train_val.prototxt` in the model
zoo's CIFAR-10 and ImageNet entries. Caffe's pooling rounds sizes up, and its average divides by the
part of the window that lies in the map. ReLU also follows the last 1x1 convolution.
"""

from tests.models.straight.numpy_layers import avg_pool, conv, global_avg_pool, max_pool, relu


def _conv(p, path, x, **how):
    return relu(conv(x, p[f"params/{path}/kernel"], p[f"params/{path}/bias"], **how))


def nin_cifar10(p, x):
    x = _conv(p, "mlpconv1/conv", x, padding=2)  # conv1, 5x5
    x = _conv(p, "mlpconv1/cccp1", x)
    x = _conv(p, "mlpconv1/cccp2", x)
    x = max_pool(x, 3, 2, ceil=True)  # pool1, MAX
    x = _conv(p, "mlpconv2/conv", x, padding=2)  # conv2, 5x5
    x = _conv(p, "mlpconv2/cccp1", x)  # cccp3
    x = _conv(p, "mlpconv2/cccp2", x)  # cccp4
    x = avg_pool(x, 3, 2, ceil=True)  # pool2, AVE
    x = _conv(p, "mlpconv3/conv", x, padding=1)  # conv3, 3x3
    x = _conv(p, "mlpconv3/cccp1", x)  # cccp5
    x = _conv(p, "head", x)  # cccp6
    return global_avg_pool(x)  # pool3, AVE over the whole map (8x8)


def nin_imagenet(p, x):
    x = _conv(p, "mlpconv1/conv", x, stride=4)  # conv1, 11x11
    x = _conv(p, "mlpconv1/cccp1", x)
    x = _conv(p, "mlpconv1/cccp2", x)
    x = max_pool(x, 3, 2, ceil=True)  # pool0
    x = _conv(p, "mlpconv2/conv", x, padding=2)  # conv2, 5x5
    x = _conv(p, "mlpconv2/cccp1", x)  # cccp3
    x = _conv(p, "mlpconv2/cccp2", x)  # cccp4
    x = max_pool(x, 3, 2, ceil=True)  # pool2
    x = _conv(p, "mlpconv3/conv", x, padding=1)  # conv3, 3x3
    x = _conv(p, "mlpconv3/cccp1", x)  # cccp5
    x = _conv(p, "mlpconv3/cccp2", x)  # cccp6
    x = max_pool(x, 3, 2, ceil=True)  # pool3
    x = _conv(p, "mlpconv4/conv", x, padding=1)  # conv4-1024, 3x3
    x = _conv(p, "mlpconv4/cccp1", x)  # cccp7-1024
    x = _conv(p, "head", x)  # cccp8-1024
    return global_avg_pool(x)  # pool4, AVE over the whole map (6x6)
