"""Stochastic depth: effect of its rate on the accuracy and on the time of a step.

  python -m experiments.ablate --config=configs/ablations/stochastic_depth.py --seeds=5 \
      --workdir=runs/depth --config.data.dir=FOLDER
  python -m experiments.ablate --config=configs/ablations/stochastic_depth.py:digits --seeds=5 \
      --workdir=runs/depth_digits
  python -m experiments.ablate --config=configs/ablations/stochastic_depth.py:smoke --seeds=2 \
      --workdir=runs/smoke

FOLDER holds Fashion-MNIST's four .gz files (Debian's package dataset-fashion-mnist puts them under
/usr/share/datasets/fashion-mnist). Without FOLDER, TFDS downloads the data.

A ResNet-32 with widths 8, 16, 32 trains on 1100 images for 400 steps of 64. The number of a row is
the drop rate of the last block; rates grow linearly from the first block. "batch" is the paper's
mode: one decision for all images, and dropped branches are not computed. "sample" decides for each
image and computes everything. Paper (https://arxiv.org/abs/1603.09382, section 4): with a rate of
0.5, the error of ResNet-110 on CIFAR-10 falls from 6.41 to 5.23 %, and training takes about a
quarter less time. The time of a step is in experiments/results/stochastic_depth.md.
Ours: not measured yet. After a run, add seeds, device, hours and a link to the table here.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from .. import ablations, common

RATES = {"batch": (0.2, 0.5, 0.8), "sample": (0.2, 0.5)}


def get_config(mode: str = "") -> ConfigDict:
    common.check_mode(mode, "digits", "smoke")
    config = ablations.small(mode)
    if mode != "smoke":
        config.model.depths = (5, 5, 5)
    with config.unlocked():
        config.model.drop_path = 0.0
        config.model.drop_path_mode = "batch"
    return config


def sweep() -> list[tuple[str, dict]]:
    rows = [
        (f"{mode}_{rate}", {"model.drop_path": rate, "model.drop_path_mode": mode})
        for mode, rates in RATES.items()
        for rate in rates
    ]
    return [("none", {}), *rows]
