"""WRN-28-10 on CIFAR-10, as in section 3 of https://arxiv.org/abs/1605.07146.

  python -m experiments.train --workdir=runs/wrn --config=configs/cifar10_wrn28_10.py
  python -m experiments.train --workdir=runs/wrn --config=configs/cifar10_wrn28_10.py:dropout
  python -m experiments.train --workdir=runs/smoke --config=configs/cifar10_wrn28_10.py:smoke

Paper: 4.00 % test error, 3.89 % with dropout 0.3 (`:dropout`), medians of five runs; 200 epochs
with batches of 128, the rate multiplied by 0.2 at epochs 60, 120 and 160.
We differ: the paper pads images by reflection before cropping; we pad with black.
Ours: not measured yet. After a run, add mean, spread, seeds, device and hours here.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from . import common


def get_config(mode: str = "") -> ConfigDict:
    common.check_mode(mode, "dropout", "smoke")
    config = common.get_config()
    config.model.name = "wrn_28_10"
    config.data.name = "cifar10"
    config.data.validation = 0  # train on all 50 k, like the reported runs: nothing is selected
    config.data.batch_size = 128
    config.data.augment.pad_crop = 4
    config.data.augment.flip = True
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = (5e-4,)
    config.schedule.name = "steps"
    config.schedule.learning_rate = 0.1
    config.schedule.boundaries = ("60 epochs", "120 epochs", "160 epochs")
    config.schedule.factor = 0.2
    config.train.duration = "200 epochs"
    config.log.every = "100 steps"
    if mode == "dropout":
        config.model.dropout = 0.3
    if mode == "smoke":
        config.model.update(width_mult=2, dropout=0.3)
        config.data.mock = 64
        config.data.batch_size = 8
        config.data.eval_batch_size = 64
        config.schedule.boundaries = ("1 steps",)
        config.train.duration = "2 steps"
        config.log.every = "1 steps"
    return config
