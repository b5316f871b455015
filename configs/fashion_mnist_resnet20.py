"""CIFAR ResNet-20 on Fashion-MNIST, 32x32 gray images.

  python -m experiments.train --workdir=runs/fashion --config=configs/fashion_mnist_resnet20.py \
      --config.data.dir=FOLDER
  python -m experiments.train --workdir=runs/smoke --config=configs/fashion_mnist_resnet20.py:smoke

FOLDER holds the four .gz files (Debian's package dataset-fashion-mnist puts them under
/usr/share/datasets/fashion-mnist). Without --config.data.dir, TFDS downloads the data.
Xiao et al. 2017 (https://arxiv.org/abs/1708.07747) have no results for ResNet-20. Zhong et al. 2017
(https://arxiv.org/abs/1708.04896) report 4.39 % test error for a ResNet-20 that is trained longer.
Ours: not measured yet. After a run, add mean, spread, seeds, device and hours here.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from . import common


def get_config(mode: str = "") -> ConfigDict:
    common.check_mode(mode, "smoke")
    config = common.get_config()
    config.model.name = "cifar_resnet20"
    config.data.name = "fashion_mnist"
    config.data.validation = 5000
    config.data.batch_size = 128
    config.data.augment.pad_crop = 4
    config.data.augment.flip = True
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = ((r".*/kernel", 5e-4), (r".*", 0.0))
    config.schedule.learning_rate = 0.1 / 128 * config.data.batch_size
    config.schedule.warmup = "1 epochs"
    config.train.duration = "60 epochs"
    config.log.every = "50 steps"
    if mode == "smoke":
        config.data.mock = 640
        config.data.validation = 0.1
        config.train.duration = "10 steps"
        config.log.every = "5 steps"
    return config
