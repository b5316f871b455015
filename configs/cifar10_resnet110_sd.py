"""ResNet-110 with stochastic depth on CIFAR-10, section 4 of https://arxiv.org/abs/1603.09382.

  python -m experiments.train --workdir=runs/r110sd --config=configs/cifar10_resnet110_sd.py
  python -m experiments.train --workdir=runs/smoke --config=configs/cifar10_resnet110_sd.py:smoke

Paper: 5.23 % test error at the lowest validation error (6.41 % without stochastic depth), with
p_L = 0.5 and linear decay; 500 epochs with batches of 128 on 45 k training images, a rate of 0.1
divided by ten after half and three quarters of the run, Nesterov momentum 0.9, weight decay 1e-4.
We differ: we draw the 5 k held-out images ourselves; mean and standard deviation are per channel.
Ours: not measured yet. After a run, add mean, spread, seeds, device and hours here.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from . import common


def get_config(mode: str = "") -> ConfigDict:
    common.check_mode(mode, "smoke")
    config = common.get_config()
    config.model.name = "cifar_resnet110_sd"
    config.data.name = "cifar10"
    config.data.validation = 5000  # images
    config.data.batch_size = 128
    config.data.augment.pad_crop = 4
    config.data.augment.flip = True
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = (1e-4,)
    config.schedule.name = "steps"
    config.schedule.learning_rate = 0.1
    config.schedule.boundaries = ("250 epochs", "375 epochs")
    config.train.duration = "500 epochs"
    config.train.test_on = "best"
    config.log.every = "100 steps"
    if mode == "smoke":
        config.model.scan = True  # compiles one block per stage instead of eighteen
        config.data.mock = 256
        config.data.validation = 64
        config.data.batch_size = 16
        config.data.eval_batch_size = 64
        config.schedule.boundaries = ("2 steps", "3 steps")
        config.schedule.learning_rate = 0.01
        config.train.precise_bn = 2  # four steps are too few for good running statistics
        config.train.duration = "4 steps"
        config.log.every = "1 steps"
    return config
