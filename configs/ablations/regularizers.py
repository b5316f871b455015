"""Effect of each regularizer on a small ResNet that overfits, and of several together.

  python -m experiments.ablate --config=configs/ablations/regularizers.py --seeds=5 \
      --workdir=runs/regular --config.data.dir=FOLDER
  python -m experiments.ablate --config=configs/ablations/regularizers.py:digits --seeds=5 \
      --workdir=runs/regular_digits
  python -m experiments.ablate --config=configs/ablations/regularizers.py:smoke --seeds=2 \
      --workdir=runs/smoke

FOLDER holds Fashion-MNIST's four .gz files (Debian's package dataset-fashion-mnist puts them under
/usr/share/datasets/fashion-mnist). Without FOLDER, TFDS downloads the data.

A ResNet-8 with widths 8, 16, 32 trains on 1100 images, the same for every seed, for 400 steps of
64, which is 23 epochs. The strengths are customary values, chosen before the first run and not
tuned: a row only shows the effect of this strength here. `augment` is AlexNet's augmentation:
translation, mirroring (which changes the class of a digit) and color.
Ours: experiments/results/ablations.md, "Regularizers": 5 seeds, 34 minutes on 2 CPU cores with
--jobs=2. Without regularizers 80.96 % [80.52, 81.39]; no row is significantly better, four rows are
significantly worse.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from .. import ablations, common

DECAY = {"optimizer.weight_decay": ((r".*/kernel", 5e-4), (r".*", 0.0))}
AUGMENT = {"data.augment.pad_crop": 3, "data.augment.flip": True, "data.augment.pca": 0.1}
EARLY = {"train.eval_every": "40 steps", "train.early_stopping": 3, "train.test_on": "best"}


def get_config(mode: str = "") -> ConfigDict:
    common.check_mode(mode, "digits", "smoke")
    return ablations.small(mode)


def sweep() -> list[tuple[str, dict]]:
    return [
        ("none", {}),
        ("weight_decay", DECAY),
        ("max_norm", {"optimizer.max_norm": (2.0,)}),
        ("dropout", {"train.dropout": (0.1,)}),
        ("spatial_dropout", {"train.dropout": (0.1,), "train.dropout_mode": "channel"}),
        ("stochastic_depth", {"model.drop_path": 0.2}),
        ("shake_drop", {"model.shake_drop": 0.2}),
        ("label_smoothing", {"mix.label_smoothing": 0.1}),
        ("mixup", {"mix.mixup": 0.2}),
        ("cutmix", {"mix.cutmix": 1.0}),
        ("augment", AUGMENT),
        ("cutout", {"data.augment.cutout": 7}),
        ("erasing", {"data.augment.erase": 0.5}),
        ("randaugment", {"data.augment.randaugment": (2, 9)}),
        ("gradient_noise", {"optimizer.grad_noise": 0.01}),
        ("sam", {"optimizer.sam": 0.05}),
        ("ema", {"train.ema": 0.99}),
        ("early_stopping", EARLY),
        ("together", DECAY | AUGMENT | {"mix.label_smoothing": 0.1, "mix.mixup": 0.2}),
    ]
