"""Five orders of norm, ReLU and addition in a residual unit: table 2 of the paper.

  python -m experiments.ablate --config=configs/ablations/preact_orders.py --seeds=5 \
      --workdir=runs/orders --config.data.dir=FOLDER
  python -m experiments.ablate --config=configs/ablations/preact_orders.py:digits --seeds=5 \
      --workdir=runs/orders_digits
  python -m experiments.ablate --config=configs/ablations/preact_orders.py:smoke --seeds=2 \
      --workdir=runs/smoke

FOLDER holds Fashion-MNIST's four .gz files (Debian's package dataset-fashion-mnist puts them under
/usr/share/datasets/fashion-mnist). Without FOLDER, TFDS downloads the data.

A ResNet-20 with widths 8, 16, 32 trains on 1100 images for 400 steps of 64. Paper
(https://arxiv.org/abs/1603.05027): with 110 layers, the test error on CIFAR-10 is 6.61, 8.17, 7.84,
6.71 and 6.37 %, in the order of the rows. With 20 layers and few images, the ranking may differ.
Ours: experiments/results/ablations.md, "The five orders of a residual unit": 5 seeds, 29 minutes on
2 CPU cores with --jobs=2, shared with other work. All rows reach 81.5 to 81.8 %; no order differs
significantly from the original.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from .. import ablations, common

ORDERS = ("original", "bn_after_add", "relu_before_add", "relu_only_preact", "full_preact")


def get_config(mode: str = "") -> ConfigDict:
    common.check_mode(mode, "digits", "smoke")
    config = ablations.small(mode)
    config.model.name = "cifar_preact110"
    with config.unlocked():
        config.model.order = "original"
    if mode != "smoke":
        config.model.depths = (3, 3, 3)
    return config


def sweep() -> list[tuple[str, dict]]:
    return [(order, {"model.order": order}) for order in ORDERS]
