"""Initializers of the convolutions, with and without BatchNorm.

  python -m experiments.ablate --config=configs/ablations/initializers.py --seeds=5 \
      --workdir=runs/init --config.data.dir=FOLDER
  python -m experiments.ablate --config=configs/ablations/initializers.py:digits --seeds=5 \
      --workdir=runs/init_digits
  python -m experiments.ablate --config=configs/ablations/initializers.py:smoke --seeds=2 \
      --workdir=runs/smoke

FOLDER holds Fashion-MNIST's four .gz files (Debian's package dataset-fashion-mnist puts them under
/usr/share/datasets/fashion-mnist). Without FOLDER, TFDS downloads the data.

A ResNet-14 with widths 8, 16, 32 trains on 1100 images for 400 steps of 64. The learning rate is a
fifth of the other ablations' rate, so that networks without norms do not diverge. Rows are named
INITIALIZER_NORM. The head's initializer is LeCun's in all rows except "he_fixup" and those of
"lsuv" (https://arxiv.org/abs/1511.06422), which scales orthogonal kernels, that of the head too, so
that each layer's output over the first batch has variance 1. The row "he_fixup" scales
He's initializer as the Fixup paper does (https://arxiv.org/abs/1901.09321), with zeros in the head
and at the end of each branch; unlike in the paper, the scalars use the common learning rate. We
expect that with N(0, 0.01^2) ("gaussian"), the activations of deep networks vanish unless a norm
rescales them.
Ours: not measured yet. After a run, add seeds, device, hours and a link to the table here.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from .. import ablations, common

INITS = ("he", "xavier", "lecun", "gaussian", "orthogonal", "lsuv")


def get_config(mode: str = "") -> ConfigDict:
    common.check_mode(mode, "digits", "smoke")
    config = ablations.small(mode)
    if mode != "smoke":
        config.model.depths = (2, 2, 2)
    config.model.init = "he"
    with config.unlocked():
        config.model.norm = "batch"
    config.schedule.learning_rate = 0.02
    return config


def sweep() -> list[tuple[str, dict]]:
    rows = [
        (f"{init}_{norm}", {"model.init": init, "model.norm": norm})
        for norm in ("batch", "none")
        for init in INITS
    ]
    return [*rows, ("he_fixup", {"model.norm": "fixup"})]
