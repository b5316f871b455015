"""The regularizers of regularizers.py with strengths that are tuned for each row.

  python -m experiments.ablate --config=configs/ablations/regularizers_tuned.py --tune=8 \
      --seeds=5 --jobs=2 --workdir=runs/tuned --config.data.dir=FOLDER
  python -m experiments.ablate --config=configs/ablations/regularizers_tuned.py:digits --tune=8 \
      --seeds=5 --workdir=runs/tuned_digits
  python -m experiments.ablate --config=configs/ablations/regularizers_tuned.py:smoke --tune=2 \
      --seeds=2 --rows=none,mixup --workdir=runs/smoke_tuned

FOLDER holds Fashion-MNIST's four .gz files, see regularizers.py.

The network, the images and the steps are those of regularizers.py, so the two tables can be set
side by side. Each row tunes its strength together with the learning rate, because a regularizer can
need another rate than the baseline. Each row has the same number of trials; a row with more fields
searches its space more thinly. The ranges include the customary strength, and most of them go from
a tenth of it or less, which does almost nothing, to three times or more.
Ours: experiments/results/ablations.md, "Regularizers, tuned": 19 rows in two pieces of 102 and 57
minutes on 2 CPU cores. Baselines 81.33 % [80.47, 82.19] and 80.86 % [80.24, 81.49], 5 seeds; no
tuned row is significantly better, and one is significantly worse.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from flax_cnns.config.spaces import Distribution, choice, integer, log_uniform, uniform

from .. import ablations, common
from . import regularizers


def get_config(mode: str = "") -> ConfigDict:
    common.check_mode(mode, "digits", "smoke")
    return ablations.small(mode)


def decay_kernels(rate: float) -> tuple:
    """Returns the rules of weight decay for kernels only."""
    return ((r".*/kernel", rate), (r".*", 0.0))


def for_all(value: float) -> tuple:
    """Returns the rule that gives all layers one value."""
    return (value,)


def two_operations(magnitude: int) -> tuple:
    """Returns RandAugment's two operations with this magnitude."""
    return (2, magnitude)


DECAY = {"optimizer.weight_decay": log_uniform(5e-5, 2e-2, to_value=decay_kernels)}
AUGMENT = {
    "data.augment.pad_crop": integer(1, 4),
    "data.augment.flip": choice(False, True),
    "data.augment.pca": log_uniform(0.01, 0.5),
}
SMOOTHING = {"mix.label_smoothing": log_uniform(0.01, 0.4)}
MIXUP = {"mix.mixup": log_uniform(0.02, 2.0)}
DROPOUT = {"train.dropout": log_uniform(0.005, 0.3, to_value=for_all)}

SPACES: dict[str, dict[str, Distribution]] = {
    "none": {},
    "weight_decay": DECAY,
    "max_norm": {"optimizer.max_norm": log_uniform(0.5, 8.0, to_value=for_all)},
    "dropout": DROPOUT,
    "spatial_dropout": DROPOUT,
    "stochastic_depth": {"model.drop_path": log_uniform(0.02, 0.6)},
    "shake_drop": {"model.shake_drop": log_uniform(0.02, 0.6)},
    "label_smoothing": SMOOTHING,
    "mixup": MIXUP,
    "cutmix": {"mix.cutmix": log_uniform(0.02, 2.0)},
    "augment": AUGMENT,
    "cutout": {"data.augment.cutout": integer(2, 14)},
    "erasing": {"data.augment.erase": uniform(0.1, 1.0)},
    "randaugment": {"data.augment.randaugment": integer(1, 20, to_value=two_operations)},
    "gradient_noise": {"optimizer.grad_noise": log_uniform(1e-4, 3e-2)},
    "sam": {"optimizer.sam": log_uniform(0.005, 0.5)},
    "ema": {"train.ema": choice(0.9, 0.95, 0.98, 0.99, 0.995)},
    "early_stopping": {"train.early_stopping": integer(1, 6)},
    "together": DECAY | AUGMENT | SMOOTHING | MIXUP,
}


def space() -> dict[str, Distribution]:
    """Returns what every row tunes."""
    return {"schedule.learning_rate": log_uniform(0.02, 0.5)}


def sweep() -> list[tuple[str, dict, dict]]:
    return [(name, overrides, SPACES[name]) for name, overrides in regularizers.sweep()]
