"""airbench94's recipe at a quarter of its width on Fashion-MNIST, 28x28 gray images.

  python -m experiments.train --workdir=runs/fast --config=configs/fashion_mnist_fast.py \
      --config.data.dir=FOLDER
  python -m experiments.train --workdir=runs/smoke --config=configs/fashion_mnist_fast.py:smoke

FOLDER holds the four .gz files (Debian's package dataset-fashion-mnist puts them under
/usr/share/datasets/fashion-mnist). Without FOLDER, TFDS downloads the data. The network has 124,232
parameters. Ours: not measured yet. After a run, add mean, spread, seeds, device and time here.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from . import cifar10_fast, common


def get_config(mode: str = "") -> ConfigDict:
    common.check_mode(mode, "smoke")
    config = cifar10_fast.get_config(mode)
    config.data.name = "fashion_mnist"
    with config.unlocked():
        config.model.widths = (16, 64, 64)
    return config
