"""The base of a compound-scaling search: EfficientNet-B0, half as wide and half as deep.

  python -m experiments.search scaling --workdir=runs/scaling --config=configs/scaling_small.py
  python -m experiments.search scaling --workdir=runs/fashion \
      --config=configs/scaling_small.py:fashion_mnist --config.data.dir=FOLDER
  python -m experiments.train --workdir=runs/smoke --config=configs/scaling_small.py:smoke
  python -m experiments.search scaling --workdir=runs/smoke_search \
      --config=configs/scaling_small.py:smoke --step=0.4 --phi=1 --seeds=1

The last command tries the search: two points of the grid, then five networks. That took 11 minutes
on 2 CPU cores shared with other work.

All strides except two are 1, for images of 14 pixels and more. The digits are 8x8 originally, so a
higher resolution adds no detail. Fashion-MNIST has 28x28 pixels, and the search trains on 10,000 of
its images. FOLDER holds the data set's four .gz files. Debian's package dataset-fashion-mnist
installs them in /usr/share/datasets/fashion-mnist. Our search on Fashion-MNIST found alpha 1, beta
1.2 and gamma 1.2. The table of results is in experiments/results/scaling.md.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from . import common


def get_config(mode: str = "") -> ConfigDict:
    common.check_mode(mode, "fashion_mnist", "smoke")
    config = common.get_config()
    config.model.name = "efficientnet_b0"
    config.model.width_mult = 0.5
    config.model.depth_mult = 0.5
    config.model.strides = (1, 1, 2, 1, 2, 1, 1, 1)
    config.model.dropout = 0.0
    config.model.drop_path = 0.0
    config.data.image_size = 16
    config.optimizer.name = "adam"
    config.schedule.learning_rate = 2e-3
    config.schedule.warmup = "50 steps"
    config.train.duration = "400 steps"
    config.train.eval_every = "0 steps"  # only at the end
    config.checkpoint.every = "0 steps"
    config.log.every = "50 steps"
    config.log.tensorboard = False
    if mode == "fashion_mnist":
        config.data.image_size = 14  # half of the original 28: higher resolutions add real detail
        config.data.name = "fashion_mnist"
        config.data.validation = 50_000
        config.data.augment.flip = True
    if mode == "smoke":
        config.schedule.warmup = "2 steps"
        config.train.duration = "10 steps"
        config.log.every = "5 steps"
    return config
