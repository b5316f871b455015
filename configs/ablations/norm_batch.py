"""Batch sizes from 2 to 32 with BatchNorm, GroupNorm and LayerNorm.

  python -m experiments.ablate --config=configs/ablations/norm_batch.py --seeds=5 \
      --workdir=runs/norm --config.data.dir=FOLDER
  python -m experiments.ablate --config=configs/ablations/norm_batch.py:digits --seeds=5 \
      --workdir=runs/norm_digits
  python -m experiments.ablate --config=configs/ablations/norm_batch.py:smoke --seeds=2 \
      --workdir=runs/smoke

FOLDER holds Fashion-MNIST's four .gz files (Debian's package dataset-fashion-mnist puts them under
/usr/share/datasets/fashion-mnist). Without FOLDER, TFDS downloads the data.

A common rule is that BatchNorm needs batches of at least 8 images, better 16 to 32. Wu & He 2018
(https://arxiv.org/abs/1803.08494, figure 1) show this on ImageNet.

Every row sees the same number of images. The learning rate is 0.1 / 64 for each image of a batch,
so small batches take more and smaller steps. Momentum is the same in all rows. The momentum of
BatchNorm's running statistics is 0.9 in all rows, so with small batches they average over fewer
images. With --config.train.precise_bn=100 they do not, and the rows differ only by training. A
group of GroupNorm has 16 channels, so in the first stage, which has 16 channels, GroupNorm is
LayerNorm. Run this on one device: with several, each device would normalize its own part of the
batch.
Ours: not measured yet. After a run, add seeds, device, hours and a link to the table here.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from .. import ablations, common

RATE = 0.1 / 64  # for each image of a batch
NORMS = {"batch": (32, 16, 8, 4, 2), "group": (32, 8, 2), "layer": (32, 8, 2)}


def get_config(mode: str = "") -> ConfigDict:
    common.check_mode(mode, "digits", "smoke")
    config = ablations.small(mode)
    config.model.widths = (16, 32, 64)
    with config.unlocked():
        config.model.norm = "batch"
    config.data.batch_size = 32
    config.schedule.learning_rate = RATE * config.data.batch_size
    config.schedule.warmup = "1 epochs"
    config.train.duration = "10 epochs"
    if mode == "smoke":
        config.data.fraction = 0.1
        config.schedule.warmup = "0 steps"
        config.train.duration = "1 epochs"
    return config


def sweep() -> list[tuple[str, dict]]:
    return [
        (
            f"{norm}_{size}",
            {
                "model.norm": norm,
                "data.batch_size": size,
                "schedule.learning_rate": RATE * size,
            },
        )
        for norm, sizes in NORMS.items()
        for size in sizes
    ]
