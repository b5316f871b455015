"""SimpNets with equal numbers of parameters: balanced widths, or a wide end or start.

  python -m experiments.ablate --config=configs/ablations/balanced_or_wide_end.py --seeds=5 \
      --workdir=runs/widths --config.data.dir=FOLDER
  python -m experiments.ablate --config=configs/ablations/balanced_or_wide_end.py:digits --seeds=5 \
      --workdir=runs/widths_digits
  python -m experiments.ablate --config=configs/ablations/balanced_or_wide_end.py:smoke --seeds=2 \
      --workdir=runs/smoke

FOLDER holds Fashion-MNIST's four .gz files (Debian's package dataset-fashion-mnist puts them under
/usr/share/datasets/fashion-mnist). Without FOLDER, TFDS downloads the data.

The networks have eight convolutions and train on 1100 images for 400 steps of 64. The rows have
equally many parameters but different MACs, because early feature maps are large. SimpNet's
authors (https://github.com/Coderx7/SimpNet) report 95.19 % with a wide end and 95.51 % with
balanced widths in one experiment, 87.20 % and 89.70 % in another.
Ours: not measured yet. After a run, add seeds, device, hours and a link to the table here.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from .. import ablations, common

# 37.3 k parameters each.
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
        config.model.momentum = 0.9  # BatchNorm's; the default 0.99 is for longer runs
    return config


def sweep() -> list[tuple[str, dict]]:
    return [(name, {"model.widths": widths}) for name, widths in WIDTHS.items()]
