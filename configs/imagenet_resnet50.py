"""ResNet-50 on ImageNet: the paper's recipe and a modern one.

  python -m experiments.train --workdir=runs/rn50 --config=configs/imagenet_resnet50.py
  python -m experiments.train --workdir=runs/rn50m --config=configs/imagenet_resnet50.py:modern
  python -m experiments.train --workdir=runs/smoke --config=configs/imagenet_resnet50.py:smoke

paper (the default): https://arxiv.org/abs/1512.03385, section 3.4: batches of 256, a rate of 0.1,
momentum 0.9, weight decay 1e-4. The paper divides the rate by ten when the error plateaus, and
trains for 60e4 steps (120 epochs). We divide after 30, 60 and 80 of 90 epochs, as later
reimplementations do. The paper scales the shorter side to 256..480 pixels, crops, and adds color
augmentation; we crop by area and leave data.augment.pca off. Published with such a recipe:
torchvision's IMAGENET1K_V1, 76.13 % top-1 (v1.5, one crop).

modern: a part of torchvision's recipe for IMAGENET1K_V2: cosine schedule over 600 epochs with 5
epochs of warmup, batches of 1024 with a rate of 0.5, label smoothing 0.1, mixup 0.2, EMA, no weight
decay on biases and norms. It leaves out TrivialAugment, repeated augmentation and the lower
training resolution, which flax_cnns does not have, and random erasing and CutMix, which are off
here (data.augment.erase, mix.cutmix). Published with the whole recipe: 80.86 %.

TFDS cannot download ImageNet: put its archives where TFDS asks for them.
Ours: not measured yet. After a run, add mean, spread, seeds, device and hours here.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from . import common


def get_config(mode: str = "paper") -> ConfigDict:
    common.check_mode(mode, "paper", "modern", "smoke")
    config = common.get_config()
    config.model.name = "resnet50"
    config.data.name = "imagenet2012"
    config.data.image_size = 224
    config.data.validation = 10000  # held out from train; our test split is TFDS's validation split
    config.data.batch_size = 256
    config.data.threads = 16
    config.data.augment.random_resized_crop = (0.08, 1.0)
    config.data.augment.flip = True
    config.optimizer.weight_decay = (1e-4,)
    config.schedule.name = "steps"
    config.schedule.learning_rate = 0.1 / 256 * config.data.batch_size
    config.schedule.boundaries = ("30 epochs", "60 epochs", "80 epochs")
    config.train.duration = "90 epochs"
    config.checkpoint.every = "1 epochs"
    config.log.every = "100 steps"
    if mode == "modern":
        config.data.batch_size = 1024
        config.model.dtype = "bfloat16"
        config.mix.label_smoothing = 0.1
        config.mix.mixup = 0.2
        config.optimizer.weight_decay = ((r".*/kernel", 2e-5), (r".*", 0.0))
        config.schedule.name = "cosine"
        config.schedule.boundaries = ()
        config.schedule.learning_rate = 0.5 / 1024 * config.data.batch_size
        config.schedule.warmup = "5 epochs"
        config.train.duration = "600 epochs"
        config.train.ema = 0.9999
    if mode == "smoke":
        config.data.mock = 64
        config.data.image_size = 64
        config.data.in_memory = "no"  # uses the streaming loader, like the real run
        config.data.validation = 0.1
        config.data.batch_size = 8
        config.data.eval_batch_size = 8
        config.schedule.boundaries = ("2 steps", "3 steps")
        config.schedule.learning_rate = 0.01
        config.train.precise_bn = 2  # four steps are too few for good running statistics
        config.train.duration = "4 steps"
        config.log.every = "1 steps"
    return config
