"""Fine-tunes published weights on your own folder of images: root/class/*.jpg.

  python -m experiments.finetune --workdir=runs/own --config=configs/finetune/folder.py \\
      --config.dir=FOLDER --config.source=torchvision:resnet18 --strategies=scratch,head_then_all
  python -m experiments.finetune --workdir=runs/smoke --config=configs/finetune/folder.py:smoke \\
      --strategies=features --seeds=1

Other weights need their own network and normalization: set --config.targets.own.model.name,
.data.image_size, .data.mean and .data.std. The smoke mode trains on noise and needs no files.
Ours: experiments/results/transfer.md: EfficientNet-Lite0 on 121 photos of five classes. A linear
classifier on its features reaches 84.3 % (sd 6.8, 3 seeds), training from scratch 56.9 % (sd 3.4).
"""

from __future__ import annotations

from ml_collections import ConfigDict

from flax_cnns.config import STRATEGY, make_defaults

from .. import common


def get_config(mode: str = "") -> ConfigDict:
    common.check_mode(mode, "smoke")
    config = ConfigDict(
        dict(
            dir="",
            source="torchvision:resnet18",
            pretrain=make_run_config(),  # used if `source` is ""
            targets=dict(own=make_run_config()),
            strategy=make_defaults(STRATEGY) | dict(layer_decay=0.75),
        )
    )
    config.targets.own.data.dir = config.get_ref("dir")
    if mode == "smoke":
        config.source = ""
        for run in (config.pretrain, config.targets.own):
            run.data.mock = 40
            run.data.image_size = 32
            run.train.duration = "3 steps"
    return config


def make_run_config() -> ConfigDict:
    """Returns the config of a run on a folder of images."""
    config = common.get_config()
    config.model.name = "resnet18"
    config.data.name = "folder"
    config.data.image_size = 224
    config.data.channels = 3
    config.data.batch_size = 16
    config.data.eval_batch_size = 32
    config.data.mean, config.data.std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    config.data.augment.flip = True
    config.data.augment.random_resized_crop = (0.35, 1.0)
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = ((r".*/kernel", 1e-4), (r".*", 0.0))
    config.schedule.learning_rate = 0.02
    config.train.duration = "20 epochs"
    config.train.eval_every = "0 steps"  # only at the end
    config.checkpoint.every = "0 steps"
    config.checkpoint.keep_latest = 1
    config.log.tensorboard = False
    return config
