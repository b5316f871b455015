"""Max pooling or strided convolutions: the four forms of the All Convolutional Net.

  python -m experiments.ablate --config=configs/ablations/strided_or_pooled.py --seeds=5 \
      --workdir=runs/pooled --config.data.dir=FOLDER
  python -m experiments.ablate --config=configs/ablations/strided_or_pooled.py:digits --seeds=5 \
      --workdir=runs/pooled_digits
  python -m experiments.ablate --config=configs/ablations/strided_or_pooled.py:smoke --seeds=2 \
      --workdir=runs/smoke

FOLDER holds Fashion-MNIST's four .gz files (Debian's package dataset-fashion-mnist puts them under
/usr/share/datasets/fashion-mnist). Without FOLDER, TFDS downloads the data.

Model C, a quarter as wide and without dropout, trains on 1100 images for 400 steps of 64. "base"
pools. "strided" omits each pooling and gives the convolution before it a stride. "all" replaces
each pooling by a strided convolution. "convpool" pools, and has as many convolutions as "all". So
compare "all" with "convpool", and "strided" with "base". Paper (https://arxiv.org/abs/1412.6806,
table 3): the test errors of model C on CIFAR-10 are 9.74 % (base), 10.19 % (strided), 9.08 % (all)
and 9.31 % (convpool).
Ours: not measured yet. After a run, add seeds, device, hours and a link to the table here.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from .. import ablations, common


def get_config(mode: str = "") -> ConfigDict:
    common.check_mode(mode, "digits", "smoke")
    config = ablations.small(mode)
    config.model.name = "all_cnn_c"
    del config.model["depths"]
    config.model.widths = (24, 48, 48)
    with config.unlocked():
        config.model.update(dict(form="base", input_dropout=0.0, dropout=0.0, last_padding=0))
    config.schedule.learning_rate = 0.02  # the network has no norms
    if mode == "smoke":
        config.model.widths = (4, 8, 8)
        config.model.last_padding = 1
    return config


def sweep() -> list[tuple[str, dict]]:
    return [(form, {"model.form": form}) for form in ("base", "strided", "all", "convpool")]
