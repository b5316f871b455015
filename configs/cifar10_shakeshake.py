"""Shake-Shake 26 2x32d on CIFAR-10, as in section 2.1 of https://arxiv.org/abs/1705.07485.

  python -m experiments.train --workdir=runs/ss --config=configs/cifar10_shakeshake.py
  python -m experiments.train --workdir=runs/smoke --config=configs/cifar10_shakeshake.py:smoke

Options for the other networks and rows of table 1: --config.model.name=shakeshake_26_2x96d,
--config.model.forward=even, --config.model.backward=keep, --config.model.level=batch.

Paper: 3.55 % test error (shake, shake, image; mean of three runs), 2.98 % for 2x64d and 2.86 % for
2x96d (five runs). 1800 epochs with batches of 128; the rate falls from 0.2 to 0 as a cosine. The
paper used two GPUs with 64 images each, and each GPU normalized its own images. The other settings
are from fb.resnet.torch: Nesterov momentum 0.9, weight decay 1e-4, random crops and flips.
Ours: not measured yet. After a run, add mean, spread, seeds, device and hours here.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from . import common


def get_config(mode: str = "") -> ConfigDict:
    common.check_mode(mode, "smoke")
    config = common.get_config()
    config.model.name = "shakeshake_26_2x32d"
    config.model.forward = "shake"
    config.model.backward = "shake"
    config.model.level = "image"
    config.data.name = "cifar10"
    config.data.validation = 0  # train on all 50 k, like the reported runs: nothing is selected
    config.data.batch_size = 128
    config.data.augment.pad_crop = 4
    config.data.augment.flip = True
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = (1e-4,)
    config.schedule.name = "cosine"
    config.schedule.learning_rate = 0.2
    config.train.duration = "1800 epochs"
    config.checkpoint.every = "20 epochs"
    config.log.every = "100 steps"
    if mode == "smoke":
        config.data.mock = 256
        config.data.batch_size = 16
        config.data.eval_batch_size = 64
        config.train.duration = "4 steps"
        config.log.every = "1 steps"
    return config
