"""ResNet-110 on CIFAR-10, as in section 4.2 of https://arxiv.org/abs/1512.03385.

  python -m experiments.train --workdir=runs/r110 --config=configs/cifar10_resnet110.py
  python -m experiments.train --workdir=runs/smoke --config=configs/cifar10_resnet110.py:smoke

Paper: 6.43 % test error at best, 6.61 +- 0.16 % over five runs; 64 k steps of 128 images, with the
rate divided by ten at 32 k and 48 k. The schedule was chosen on a 45 k / 5 k split; the reported
networks were trained on all 50 k.
We differ: the paper starts with a rate of 0.01 until the training error is below 80 % (about 400
steps); we increase the rate linearly to 0.1 over 400 steps. The paper's mean is per pixel, ours per
channel.
Ours: not measured yet. After a run, add mean, spread, seeds, device and hours here.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from . import common


def get_config(mode: str = "") -> ConfigDict:
    common.check_mode(mode, "smoke")
    config = common.get_config()
    config.model.name = "cifar_resnet110"
    config.data.name = "cifar10"
    config.data.validation = 0  # train on all 50 k, like the reported runs: nothing is selected
    config.data.batch_size = 128
    config.data.augment.pad_crop = 4
    config.data.augment.flip = True
    config.optimizer.weight_decay = (1e-4,)
    config.schedule.name = "steps"
    config.schedule.learning_rate = 0.1
    config.schedule.warmup = "400 steps"
    config.schedule.boundaries = ("32000 steps", "48000 steps")
    config.train.duration = "64000 steps"
    config.log.every = "100 steps"
    if mode == "smoke":
        config.model.scan = True  # a third less compilation time
        config.train.precise_bn = 2  # four steps are too few for good running statistics
        config.data.mock = 256
        config.data.batch_size = 16
        config.data.eval_batch_size = 64
        config.schedule.learning_rate = 0.01
        config.schedule.warmup = "1 steps"
        config.schedule.boundaries = ("2 steps", "3 steps")
        config.train.duration = "4 steps"
        config.log.every = "1 steps"
    return config
