"""airbench94's recipe on CIFAR-10: as accurate as possible in ten epochs.

  python -m experiments.train --workdir=runs/fast --config=configs/cifar10_fast.py
  python -m experiments.train --workdir=runs/smoke --config=configs/cifar10_fast.py:smoke

Jordan 2024 (https://arxiv.org/abs/2404.00498) and his airbench94_muon.py: a frozen whitening layer,
identity filters, alternating flips, Muon, label smoothing, flips in evaluation. The author reports
94 % after 8 epochs, 2.6 s on one A100. Ours: not measured yet. After a run, add mean, spread,
seeds, device and time here.

Differences from the author's: 10 epochs; biases of `whiten` learn until the end; Muon's kernels are
not rescaled after each step; evaluation averages an image and its mirror image, not six views.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from . import common


def get_config(mode: str = "") -> ConfigDict:
    common.check_mode(mode, "smoke")
    config = common.get_config()
    config.model.name = "airbench94"
    config.model.whiten = True
    config.data.name = "cifar10"
    config.data.validation = 0
    config.data.batch_size = 1000
    config.data.eval_batch_size = 1000
    config.data.augment.pad_crop = 2
    config.data.augment.flip = True
    config.data.augment.alternate_flip = True
    config.mix.label_smoothing = 0.2
    config.optimizer.name = "muon"
    config.optimizer.momentum = 0.6
    config.optimizer.nesterov = True
    config.optimizer.trainable = ((r"params/whiten/kernel", False), (r".*", True))
    config.schedule.learning_rate = 0.05
    config.train.duration = "10 epochs"
    config.train.eval_flip = True
    config.train.eval_every = "0 steps"
    config.checkpoint.every = "10 epochs"
    if mode == "smoke":
        config.data.mock = 640
        config.data.batch_size = 64
        config.data.eval_batch_size = 64
        config.train.duration = "10 steps"
        config.log.every = "5 steps"
    return config
