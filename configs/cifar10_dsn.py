"""Deeply-Supervised Nets on CIFAR-10, https://arxiv.org/abs/1409.5185, section 3.2.

  python -m experiments.train --workdir=runs/dsn --config=configs/cifar10_dsn.py
  python -m experiments.train --workdir=runs/smoke --config=configs/cifar10_dsn.py:smoke

Paper: 7.97 % test error with augmentation. Schedule, batch, momentum and weight decay are those of
the authors' release (github.com/s9xie/DSN): 50,000 steps of 100 with the companions, then 150,000
without, the rate divided by 20 at 150,000 and lower still at 170,000.
We differ: the companions' weight falls from 0.1 to 0 over their 50,000 steps, the paper's
alpha_m = 0.1 (1 - t/N) with N those steps, where the release keeps it at 1; losses are softmax, not
squared hinge; mean and standard deviation are per channel, not each image's (global contrast
normalization); the last rate is 6.25e-5, not 1e-4; the release's rates per layer are left out
(biases twice, the last layer a tenth). The companions are computed to the end, with weight 0 after
step 50,000: dropping them then would be another program.
Ours: not measured yet; whoever runs it enters mean, spread, seeds, device and hours here.
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
    config.data.validation = 0  # all 50 k, as the reported runs: nothing is chosen on the way
    config.data.batch_size = 100
    config.data.augment.pad_crop = 4
    config.data.augment.flip = True
    config.optimizer.weight_decay = ((r".*/kernel", 5e-4), (r".*", 0.0))
    config.schedule.name = "steps"
    config.schedule.learning_rate = 0.025
    config.schedule.boundaries = ("150000 steps", "170000 steps")
    config.schedule.factor = 0.05
    config.train.duration = "200000 steps"
    config.train.aux_weight = ((("0 steps", 0.1), ("50000 steps", 0.0)),)  # then 0: no companions
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
