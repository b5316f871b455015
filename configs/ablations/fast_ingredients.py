"""The fast recipe of Fashion-MNIST without each of its ingredients.

  python -m experiments.ablate --config=configs/ablations/fast_ingredients.py --seeds=5 \
      --workdir=runs/fast_ingredients --config.data.dir=FOLDER
  python -m experiments.ablate --config=configs/ablations/fast_ingredients.py:smoke --seeds=2 \
      --workdir=runs/smoke

FOLDER holds Fashion-MNIST's four .gz files (Debian's package dataset-fashion-mnist puts them under
/usr/share/datasets/fashion-mnist). Without FOLDER, TFDS downloads the data.

The learning rate of sgd is that of configs/fashion_mnist_resnet20.py; no other row has a setting of
its own. Jordan 2024 (https://arxiv.org/abs/2404.00498) measures these ingredients on CIFAR-10.
Ours: not measured yet. After a run, add seeds, device, hours and a link to the table here.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from .. import common, fashion_mnist_fast


def get_config(mode: str = "") -> ConfigDict:
    common.check_mode(mode, "smoke")
    config = fashion_mnist_fast.get_config(mode)
    config.data.validation = 5000
    config.log.tensorboard = False
    if mode == "smoke":
        config.data.name, config.data.mock = "digits", 0
        config.data.image_size = 16
        config.data.validation = 0.1  # the default: the digits have their own validation split
    return config


def sweep() -> list[tuple[str, dict]]:
    return [
        ("all", {}),
        ("no_whitening", {"model.whiten": False, "optimizer.trainable": ()}),
        ("he_filters", {"model.init": "he"}),
        ("random_flip", {"data.augment.alternate_flip": False}),
        ("no_flip", {"data.augment.flip": False, "data.augment.alternate_flip": False}),
        (
            "sgd",
            {"optimizer.name": "sgd", "optimizer.momentum": 0.9, "schedule.learning_rate": 0.1},
        ),
        ("hard_labels", {"mix.label_smoothing": 0.0}),
        ("one_view", {"train.eval_flip": False}),
    ]
