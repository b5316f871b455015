"""A search for LeNet-5 on a quarter of the digits' training images, so that it overfits.

  python -m experiments.search tune --workdir=runs/search --config=configs/search_digits.py \
      --trials=20 --jobs=2
  python -m experiments.search tune --workdir=runs/smoke_search \
      --config=configs/search_digits.py:smoke --trials=4
  python -m experiments.train --workdir=runs/digits_small --config=configs/search_digits.py

269 training and 360 validation images. The given config is configs/digits_lenet5.py without its
augmentation, for 60 epochs.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from flax_cnns.config.spaces import Distribution, choice, log_uniform, uniform

from . import common


def get_config(mode: str = "") -> ConfigDict:
    common.check_mode(mode, "smoke")
    config = common.get_config()
    config.data.fraction = 0.25
    config.data.batch_size = 32
    config.optimizer.name = "adam"
    config.schedule.learning_rate = 2e-3
    config.train.duration = "60 epochs"
    config.train.eval_every = "4 epochs"
    config.checkpoint.every = "0 steps"
    config.checkpoint.keep_latest = 1
    config.log.every = "4 epochs"
    config.log.tensorboard = False
    if mode == "smoke":
        config.train.duration = "3 epochs"
        config.train.eval_every = "1 epochs"
        config.log.every = "1 epochs"
    return config


def decay_kernels(strength: float) -> tuple:
    """Returns rules that give this weight decay to the kernels alone."""
    return ((r".*/kernel", strength), (r".*", 0.0))


def drop_everywhere(rate: float) -> tuple:
    """Returns the rates of dropout after each layer."""
    return (rate,)


def space() -> dict[str, Distribution]:
    return {
        "schedule.learning_rate": log_uniform(1e-4, 1e-1),
        "optimizer.name": choice("adam", "sgd"),
        "optimizer.momentum": uniform(0.5, 0.99, when={"optimizer.name": "sgd"}),
        "optimizer.weight_decay": log_uniform(1e-5, 1e-1, to_value=decay_kernels),
        "train.dropout": uniform(0.0, 0.5, to_value=drop_everywhere),
        "data.augment.rotate": uniform(0.0, 30.0),
    }
