"""First values of the convolutions, with BatchNorm behind each and without.

  python -m experiments.ablate --config=configs/ablations/initializers.py --seeds=5 \
      --workdir=runs/init --config.data.dir=FOLDER
  python -m experiments.ablate --config=configs/ablations/initializers.py:digits --seeds=5 \
      --workdir=runs/init_digits
  python -m experiments.ablate --config=configs/ablations/initializers.py:smoke --seeds=2 \
      --workdir=runs/smoke

FOLDER holds Fashion-MNIST's four .gz files (Debian's package dataset-fashion-mnist puts them under
/usr/share/datasets/fashion-mnist); without it TFDS downloads them. ResNet-14 of
widths 8, 16, 32 learns 1100 images for 400 steps of 64, at a fifth of the other ablations' rate,
which a network without norms stands. A row is named first values, norm; the head's are LeCun's in
all but "fixup", which is He's, scaled as its paper says (https://arxiv.org/abs/1901.09321), the
head and the end of each branch zero, but its scalars learn at the rate of all. The lectures: N(0,
0.01) lets the activations of deep networks vanish, and a norm makes up for it.
Ours: not measured yet; whoever runs it enters the table's place, seeds, device and hours here.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from .. import ablations, common

INITS = ("he", "xavier", "lecun", "gaussian", "orthogonal")


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
