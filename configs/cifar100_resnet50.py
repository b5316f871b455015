"""ResNet-50 on CIFAR-100, images enlarged to 128x128.

  python -m experiments.train --workdir=runs/c100 --config=configs/cifar100_resnet50.py
  python -m experiments.train --workdir=runs/smoke --config=configs/cifar100_resnet50.py:smoke

ResNet-50 (https://arxiv.org/abs/1512.03385, here v1.5) is the ImageNet network, whose stem reduces
the resolution by four. With 32x32 images the last feature maps would be 1x1; with 128x128 images
the stages have 32, 16, 8 and 4 pixels. No paper trained exactly this. With
--config.data.labels=coarse the network learns the 20 superclasses.
Ours: not measured yet. After a run, add mean, spread, seeds, device and hours here.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from . import common


def get_config(mode: str = "") -> ConfigDict:
    common.check_mode(mode, "smoke")
    config = common.get_config()
    config.model.name = "resnet50"
    config.data.name = "cifar100"
    config.data.image_size = 128
    config.data.batch_size = 128
    config.data.augment.pad_crop = 16  # 4 pixels of the original 32
    config.data.augment.flip = True
    config.mix.label_smoothing = 0.1
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = ((r".*/kernel", 5e-4), (r".*", 0.0))
    config.schedule.learning_rate = 0.1 / 256 * config.data.batch_size
    config.schedule.warmup = "5 epochs"
    config.train.duration = "200 epochs"
    config.log.every = "50 steps"
    if mode == "smoke":
        config.data.mock = 100
        config.data.image_size = 64
        config.data.batch_size = 8
        config.data.eval_batch_size = 8
        config.schedule.warmup = "1 steps"
        config.schedule.learning_rate = 0.01
        config.train.precise_bn = 2  # four steps are too few for good running statistics
        config.train.duration = "4 steps"
        config.log.every = "1 steps"
    return config
