"""A lecture exercise: a small network on CIFAR-100, trained as in Keras's tutorials.

  python -m experiments.train --workdir=runs/deck --config=configs/cifar100_deck.py
  python -m experiments.train --workdir=runs/smoke --config=configs/cifar100_deck.py:smoke

The network is from the HSLU slides "Image Classification and Network Architectures": three 3x3
convolutions with 32 channels, two poolings and a dense layer, 70,692 parameters, with Keras's
initializers. The slides give no recipe. Adam and batches of 32 are Keras's defaults, and ten epochs
are from the TensorFlow tutorial on CIFAR. We normalize the images; the tutorial divides by 255.
Cost: 2.5 million multiply-accumulates per image in the forward pass; time not measured yet.
Ours: not measured yet. After a run, add mean, spread, seeds, device and hours here.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from . import common


def get_config(mode: str = "") -> ConfigDict:
    common.check_mode(mode, "smoke")
    config = common.get_config()
    config.model.name = "deck003_cifar100_example"
    config.model.init = "paper"
    config.data.name = "cifar100"
    config.data.batch_size = 32
    config.optimizer.name = "adam"
    config.optimizer.eps = 1e-7
    config.schedule.name = "constant"
    config.schedule.learning_rate = 1e-3
    config.train.duration = "10 epochs"
    config.checkpoint.every = "1 epochs"
    config.log.every = "100 steps"
    if mode == "smoke":
        config.data.mock = 100
        config.data.batch_size = 8
        config.data.eval_batch_size = 8
        config.train.duration = "4 steps"
        config.log.every = "1 steps"
    return config
