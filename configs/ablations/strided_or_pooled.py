"""Max pooling against convolutions with stride, in the All Convolutional Net's four forms.

  python -m experiments.ablate --config=configs/ablations/strided_or_pooled.py --seeds=5 \
      --workdir=runs/pooled --config.data.dir=FOLDER
  python -m experiments.ablate --config=configs/ablations/strided_or_pooled.py:digits --seeds=5 \
      --workdir=runs/pooled_digits
  python -m experiments.ablate --config=configs/ablations/strided_or_pooled.py:smoke --seeds=2 \
      --workdir=runs/smoke

FOLDER holds Fashion-MNIST's four .gz files (Debian's package dataset-fashion-mnist puts them under
/usr/share/datasets/fashion-mnist); without it TFDS downloads them. Model C, a
quarter as wide and without dropout, learns 1100 images for 400 steps of 64. "base" pools; "strided"
leaves the pooling out and gives the convolution in front of it a stride; "all" puts a convolution
with stride in its place; "convpool" is the pooling with as many convolutions as "all" has. So
"all" is to be held against "convpool", and "strided" against "base". Paper
(https://arxiv.org/abs/1412.6806, table 3), CIFAR-10's test error of model C: 9.74, 10.19, 9.08 and
9.31 %, for base, strided, all, convpool.
Ours: not measured yet; whoever runs it enters the table's place, seeds, device and hours here.
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
    config.schedule.learning_rate = 0.02  # it normalizes nothing
    if mode == "smoke":
        config.model.widths = (4, 8, 8)
        config.model.last_padding = 1
    return config


def sweep() -> list[tuple[str, dict]]:
    return [(form, {"model.form": form}) for form in ("base", "strided", "all", "convpool")]
