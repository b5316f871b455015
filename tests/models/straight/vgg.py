"""VGG, layer by layer: Simonyan and Zisserman 2014, table 1 (columns A-LRN and C).

Section 2.1: 3x3 convolutions with padding 1, 1x1 without padding, stride 1, ReLU after each, 2x2
pooling with stride 2. BatchNorm, which the paper does not have, is between convolution and ReLU,
with epsilon 1e-5, as in torchvision.
"""

from tests.models.straight.numpy_layers import (
    adaptive_avg_pool,
    batch_norm,
    conv,
    dense,
    flatten,
    local_response_norm,
    max_pool,
    relu,
)


def conv3(p, name, x):
    return conv(x, p[f"params/{name}/kernel"], p[f"params/{name}/bias"], padding=1)


def conv1(p, name, x):
    return conv(x, p[f"params/{name}/kernel"], p[f"params/{name}/bias"])


def bn(p, name, x):
    scale, bias = p[f"params/{name}/scale"], p[f"params/{name}/bias"]
    mean, var = p[f"batch_stats/{name}/mean"], p[f"batch_stats/{name}/var"]
    return batch_norm(x, scale, bias, mean, var, epsilon=1e-5)


def classify(p, x):
    x = adaptive_avg_pool(x, 7)  # changes nothing at 224x224
    x = relu(dense(flatten(x), p["params/fc6/kernel"], p["params/fc6/bias"]))
    x = relu(dense(x, p["params/fc7/kernel"], p["params/fc7/bias"]))
    return dense(x, p["params/head/kernel"], p["params/head/bias"])


def vgg11_lrn(p, x):
    """A-LRN: the normalization has the constants of AlexNet (section 2.1)."""
    x = relu(conv3(p, "stage1/conv1", x))
    x = local_response_norm(x, size=5, alpha=1e-4, beta=0.75, k=2)
    x = max_pool(x, 2, 2)
    x = relu(conv3(p, "stage2/conv1", x))
    x = max_pool(x, 2, 2)
    x = relu(conv3(p, "stage3/conv1", x))
    x = relu(conv3(p, "stage3/conv2", x))
    x = max_pool(x, 2, 2)
    x = relu(conv3(p, "stage4/conv1", x))
    x = relu(conv3(p, "stage4/conv2", x))
    x = max_pool(x, 2, 2)
    x = relu(conv3(p, "stage5/conv1", x))
    x = relu(conv3(p, "stage5/conv2", x))
    x = max_pool(x, 2, 2)
    return classify(p, x)


def vgg16_c(p, x):
    x = relu(conv3(p, "stage1/conv1", x))
    x = relu(conv3(p, "stage1/conv2", x))
    x = max_pool(x, 2, 2)
    x = relu(conv3(p, "stage2/conv1", x))
    x = relu(conv3(p, "stage2/conv2", x))
    x = max_pool(x, 2, 2)
    x = relu(conv3(p, "stage3/conv1", x))
    x = relu(conv3(p, "stage3/conv2", x))
    x = relu(conv1(p, "stage3/conv3", x))
    x = max_pool(x, 2, 2)
    x = relu(conv3(p, "stage4/conv1", x))
    x = relu(conv3(p, "stage4/conv2", x))
    x = relu(conv1(p, "stage4/conv3", x))
    x = max_pool(x, 2, 2)
    x = relu(conv3(p, "stage5/conv1", x))
    x = relu(conv3(p, "stage5/conv2", x))
    x = relu(conv1(p, "stage5/conv3", x))
    x = max_pool(x, 2, 2)
    return classify(p, x)


def vgg16_c_bn(p, x):
    x = relu(bn(p, "stage1/norm1", conv3(p, "stage1/conv1", x)))
    x = relu(bn(p, "stage1/norm2", conv3(p, "stage1/conv2", x)))
    x = max_pool(x, 2, 2)
    x = relu(bn(p, "stage2/norm1", conv3(p, "stage2/conv1", x)))
    x = relu(bn(p, "stage2/norm2", conv3(p, "stage2/conv2", x)))
    x = max_pool(x, 2, 2)
    x = relu(bn(p, "stage3/norm1", conv3(p, "stage3/conv1", x)))
    x = relu(bn(p, "stage3/norm2", conv3(p, "stage3/conv2", x)))
    x = relu(bn(p, "stage3/norm3", conv1(p, "stage3/conv3", x)))
    x = max_pool(x, 2, 2)
    x = relu(bn(p, "stage4/norm1", conv3(p, "stage4/conv1", x)))
    x = relu(bn(p, "stage4/norm2", conv3(p, "stage4/conv2", x)))
    x = relu(bn(p, "stage4/norm3", conv1(p, "stage4/conv3", x)))
    x = max_pool(x, 2, 2)
    x = relu(bn(p, "stage5/norm1", conv3(p, "stage5/conv1", x)))
    x = relu(bn(p, "stage5/norm2", conv3(p, "stage5/conv2", x)))
    x = relu(bn(p, "stage5/norm3", conv1(p, "stage5/conv3", x)))
    x = max_pool(x, 2, 2)
    return classify(p, x)


def cifar_vgg11_bn(p, x):
    """Column A with BatchNorm, and one dense layer on the mean of the last maps (1x1 at 32x32)."""
    x = relu(bn(p, "stage1/norm1", conv3(p, "stage1/conv1", x)))
    x = max_pool(x, 2, 2)
    x = relu(bn(p, "stage2/norm1", conv3(p, "stage2/conv1", x)))
    x = max_pool(x, 2, 2)
    x = relu(bn(p, "stage3/norm1", conv3(p, "stage3/conv1", x)))
    x = relu(bn(p, "stage3/norm2", conv3(p, "stage3/conv2", x)))
    x = max_pool(x, 2, 2)
    x = relu(bn(p, "stage4/norm1", conv3(p, "stage4/conv1", x)))
    x = relu(bn(p, "stage4/norm2", conv3(p, "stage4/conv2", x)))
    x = max_pool(x, 2, 2)
    x = relu(bn(p, "stage5/norm1", conv3(p, "stage5/conv1", x)))
    x = relu(bn(p, "stage5/norm2", conv3(p, "stage5/conv2", x)))
    x = max_pool(x, 2, 2)
    return dense(x.mean(axis=(1, 2)), p["params/head/kernel"], p["params/head/bias"])


def cifar_vgg(p, x, depths):
    """Any column, with `depths` convolutions in the stages, and BatchNorm if `p` has it."""
    for i, depth in enumerate(depths, 1):
        for j in range(1, depth + 1):
            x = conv3(p, f"stage{i}/conv{j}", x)
            if f"params/stage{i}/norm{j}/scale" in p:
                x = bn(p, f"stage{i}/norm{j}", x)
            x = relu(x)
        x = max_pool(x, 2, 2)
    return dense(x.mean(axis=(1, 2)), p["params/head/kernel"], p["params/head/bias"])
