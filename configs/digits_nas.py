"""Four convolutions on scikit-learn's handwritten digits: where a search of layers begins.

  flax-cnns search nas --space=layers --config=configs/digits_nas.py --workdir=runs/nas
  python -m experiments.train --workdir=runs/plain --config=configs/digits_nas.py
  python -m experiments.train --workdir=runs/smoke --config=configs/digits_nas.py:smoke

The network is from the space of Zoph & Le 2016 (https://arxiv.org/abs/1611.01578, section 4.1):
3x3 filters, 36 in each layer, no skips. The images keep their own 8x8 pixels, so that a network
trains in seconds.
Ours: 98.24 % test accuracy [97.19, 99.29] of this network, seeds 1 to 3; the networks that were
found: 99.63 and 99.54 %. See experiments/results/search.md, "Layers".
"""

from __future__ import annotations

from ml_collections import ConfigDict

from . import common

PLAIN = tuple(((3, 3), 36, (i,)) for i in range(4))


def get_config(mode: str = "") -> ConfigDict:
    common.check_mode(mode, "smoke")
    config = common.get_config()
    config.model.name = "nas_v1"
    config.model.table = PLAIN
    config.data.image_size = 8
    config.optimizer.name = "adam"
    config.schedule.learning_rate = 2e-3
    config.train.duration = "8 epochs"
    config.train.eval_every = "1 epochs"
    config.checkpoint.every = "0 steps"
    config.log.every = "1 epochs"
    config.log.tensorboard = False
    if mode == "smoke":
        config.train.duration = "2 epochs"
    return config
