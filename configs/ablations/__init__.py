"""The base config of the ablations: a ResNet-8 on so few images that it overfits."""

from __future__ import annotations

from ml_collections import ConfigDict

from .. import common


def small(mode: str = "") -> ConfigDict:
    """Returns the base config for a mode.

    "": 1100 training images of Fashion-MNIST, 28x28. "digits": 538 images of the digits, 16x16.
    "smoke": the same 538 digits, 8x8, for ten steps. The config sets every field of the network
    that a row may override.
    """
    config = common.get_config()
    config.model.name = "cifar_resnet20"
    with config.unlocked():
        config.model.depths = (1, 1, 1)
        config.model.widths = (8, 16, 32)
    config.data.name = "fashion_mnist"
    config.data.image_size = 28
    config.data.validation = 5000
    config.data.fraction = 0.02
    config.optimizer.nesterov = True
    config.schedule.learning_rate = 0.1 / 64 * config.data.batch_size
    config.schedule.warmup = "20 steps"
    config.train.duration = "400 steps"
    config.train.eval_every = "0 steps"  # only at the end
    config.checkpoint.every = "0 steps"
    config.checkpoint.keep_latest = 1
    config.train.evaluate_train = True
    config.log.tensorboard = False
    if mode in ("digits", "smoke"):
        config.data.name = "digits"
        config.data.image_size = 16
        config.data.validation = 0.1  # the default: the digits have their own validation split
        config.data.fraction = 0.5
    if mode == "smoke":
        config.model.widths = (4, 8, 8)
        config.data.image_size = 8
        config.data.batch_size = 16
        config.train.duration = "10 steps"
        config.schedule.warmup = "2 steps"
        config.log.every = "5 steps"
    return config
