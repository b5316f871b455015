"""Deeply-Supervised Nets on CIFAR-10, https://arxiv.org/abs/1409.5185, section 3.2.

  python -m experiments.train --workdir=runs/dsn --config=configs/cifar10_dsn.py
  python -m experiments.train --workdir=runs/smoke --config=configs/cifar10_dsn.py:smoke

Paper: 7.97 % test error with augmentation. Schedule, batch size, momentum and weight decay are from
the authors' release (github.com/s9xie/DSN): 50,000 steps of 100 images with the companion losses,
then 150,000 steps without. The rate is divided by 20 at step 150,000 and falls again at 170,000.

We differ:
- The companions' weight falls from 0.1 to 0 over their 50,000 steps: the paper's
  alpha_m = 0.1 (1 - t/N), with N = 50,000. The release keeps the weight at 1.
- The losses are softmax cross-entropy, not squared hinge.
- Mean and standard deviation are per channel, not per image (global contrast normalization).
- The last rate is 6.25e-5, not 1e-4.
- All layers have one rate. The release doubles it for biases and uses a tenth for the last layer.
- The companions are computed until the end, with weight 0 after step 50,000, because omitting them
  would need a second compiled program.

Ours: not measured yet. After a run, add mean, spread, seeds, device and hours here.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from . import common


def get_config(mode: str = "") -> ConfigDict:
    common.check_mode(mode, "smoke")
    config = common.get_config()
    config.model.name = "dsn"
    config.model.init = "paper"
    config.data.name = "cifar10"
    config.data.validation = 0  # train on all 50 k, like the reported runs: nothing is selected
    config.data.batch_size = 100
    config.data.augment.pad_crop = 4
    config.data.augment.flip = True
    config.optimizer.weight_decay = ((r".*/kernel", 5e-4), (r".*", 0.0))
    config.schedule.name = "steps"
    config.schedule.learning_rate = 0.025
    config.schedule.boundaries = ("150000 steps", "170000 steps")
    config.schedule.factor = 0.05
    config.train.duration = "200000 steps"
    # From step 50,000 on, the weight is 0: no companions.
    config.train.aux_weight = ((("0 steps", 0.1), ("50000 steps", 0.0)),)
    config.log.every = "100 steps"
    if mode == "smoke":
        config.data.mock = 200
        config.data.batch_size = 10
        config.data.eval_batch_size = 50
        config.schedule.boundaries = ("2 steps", "3 steps")
        config.train.duration = "4 steps"
        config.train.aux_weight = ((("0 steps", 0.1), ("4 steps", 0.0)),)
        config.log.every = "1 steps"
    return config
