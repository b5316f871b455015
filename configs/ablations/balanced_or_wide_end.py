"""SimpNet of balanced widths against one with a wide end, of the same number of parameters.

  python -m experiments.ablate --config=configs/ablations/balanced_or_wide_end.py --seeds=5 \
      --workdir=runs/widths --config.data.dir=FOLDER
  python -m experiments.ablate --config=configs/ablations/balanced_or_wide_end.py:digits --seeds=5 \
      --workdir=runs/widths_digits
  python -m experiments.ablate --config=configs/ablations/balanced_or_wide_end.py:smoke --seeds=2 \
      --workdir=runs/smoke

FOLDER holds Fashion-MNIST's four .gz files (Debian's package dataset-fashion-mnist puts them under
/usr/share/datasets/fashion-mnist); without it TFDS downloads them. Eight
convolutions learn 1100 images for 400 steps of 64. Early maps are large, so that the rows' MACs
differ where their parameters do not. The lectures' numbers, 95.19 and 95.51 %, 87.20 and 89.70 %,
are SimpNet's authors' (https://github.com/Coderx7/SimpNet), the wide end first.
Ours: not measured yet; whoever runs it enters the table's place, seeds, device and hours here.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from .. import ablations, common

# 37.3 thousand parameters each.
WIDTHS = {
    "balanced": ((24, 24, 24), (24, 24, 24), (24, 24)),
    "wide_end": ((8, 8, 8), (24, 24, 24), (40, 40)),
    "wide_start": ((30, 30, 30), (22, 22, 22), (16, 16)),
}


def get_config(mode: str = "") -> ConfigDict:
    common.check_mode(mode, "digits", "smoke")
    config = ablations.small(mode)
    config.model.name = "simpnet_slim_300k"
    del config.model["depths"]
    config.model.widths = WIDTHS["balanced"]
    with config.unlocked():
        config.model.momentum = 0.9  # its 0.99 is for longer runs
    return config


def sweep() -> list[tuple[str, dict]]:
    return [(name, {"model.widths": widths}) for name, widths in WIDTHS.items()]
