"""Shake-Shake's forward and backward modes, drawn for each image or batch: table 1 of the paper.

  python -m experiments.ablate --config=configs/ablations/shake_modes.py --seeds=5 \
      --workdir=runs/shake --config.data.dir=FOLDER
  python -m experiments.ablate --config=configs/ablations/shake_modes.py:digits --seeds=5 \
      --workdir=runs/shake_digits
  python -m experiments.ablate --config=configs/ablations/shake_modes.py:smoke --seeds=2 \
      --workdir=runs/smoke

FOLDER holds Fashion-MNIST's four .gz files (Debian's package dataset-fashion-mnist puts them under
/usr/share/datasets/fashion-mnist). Without FOLDER, TFDS downloads the data.

Each stage has one block, with two branches of 8, 16 or 32 channels. The networks train on 1100
images for 400 steps of 64. Rows are named FORWARD_BACKWARD_LEVEL, as in the paper
(https://arxiv.org/abs/1705.07485, table 1). The paper ranks the modes on CIFAR-10 after 1800
epochs; here there are 23.
Ours: not measured yet. After a run, add seeds, device, hours and a link to the table here.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from .. import ablations, common

MODES = (("even", "shake"), ("shake", "keep"), ("shake", "even"), ("shake", "shake"))


def get_config(mode: str = "") -> ConfigDict:
    common.check_mode(mode, "digits", "smoke")
    config = ablations.small(mode)
    config.model.name = "shakeshake_26_2x32d"
    del config.model["widths"]
    with config.unlocked():
        config.model.update(dict(width=8, forward="even", backward="even", level="image"))
    if mode == "smoke":
        config.model.width = 4
    return config


def sweep() -> list[tuple[str, dict]]:
    rows = [
        (
            f"{forward}_{backward}_{level}",
            {"model.forward": forward, "model.backward": backward, "model.level": level},
        )
        for level in ("batch", "image")
        for forward, backward in MODES
    ]
    return [("even_even", {}), *rows]
