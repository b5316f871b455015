"""The run that the ablations vary: a ResNet of eight layers on few images, which it can overfit."""

from __future__ import annotations

from ml_collections import ConfigDict

from .. import common


def small(mode: str = "") -> ConfigDict:
    """On 1100 of Fashion-MNIST's training images, 28x28; in the mode "digits" on 538 of the digits,
    16x16; in "smoke" on as many digits, 8x8, for a few steps. Fields of the network are given where
    a row may override them."""
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
    config.train.eval_every = "0 steps"  # at the end alone
    config.checkpoint.every = "0 steps"
    config.checkpoint.keep_latest = 1
    config.train.evaluate_train = True
    config.log.tensorboard = False
    if mode in ("digits", "smoke"):
        config.data.name = "digits"
        config.data.image_size = 16
        config.data.validation = 0.1  # the digits have a split of their own
        config.data.fraction = 0.5
    if mode == "smoke":
        config.model.widths = (4, 8, 8)
        config.data.image_size = 8
        config.data.batch_size = 16
        config.train.duration = "10 steps"
        config.schedule.warmup = "2 steps"
        config.log.every = "5 steps"
    return config
