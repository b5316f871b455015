"""Transfer from five classes of clothes to five others and to digits: a narrow ResNet-8, 28x28.

The source network learns T-shirts, trousers, pullovers, sandals and ankle boots. The similar target
has dresses, coats, shirts, sneakers and bags. The dissimilar target is scikit-learn's handwritten
digits.

  python -m experiments.finetune --workdir=runs/finetune --config.dir=FOLDER --strategies=all \\
      --fractions=0.01,0.1,1 --seeds=3
  python -m experiments.finetune --workdir=runs/smoke --strategies=scratch,features --seeds=1 \\
      --config=configs/finetune/fashion_digits.py:smoke

FOLDER holds Fashion-MNIST's four .gz files (Debian's package dataset-fashion-mnist puts them under
/usr/share/datasets/fashion-mnist). Without --config.dir, TFDS downloads the data. The smoke mode
transfers from the digits 0 to 4 to the digits 5 to 9 and needs no files.
Ours: experiments/results/transfer.md: 198 runs, 3 seeds, 40 minutes on 2 CPU cores shared with
other work. On the similar target with 275, 2,750 and 27,500 images, slower lower layers
(layer_decay) reach 85.7, 88.4 and 88.8 % (sd 1.5, 0.3, 0.1), and training from scratch 83.4, 85.2
and 85.8 % (sd 0.1, 1.5, 0.4).
"""

from __future__ import annotations

from ml_collections import ConfigDict

from flax_cnns.config import STRATEGY, make_defaults

from .. import common


def get_config(mode: str = "") -> ConfigDict:
    common.check_mode(mode, "smoke")
    config = ConfigDict(
        dict(
            dir="",  # data.dir of Fashion-MNIST
            source="",  # as graft.source; "": start from the run `pretrain`
            pretrain=make_run_config("fashion_mnist", (0, 1, 2, 5, 9), 2500),
            # The targets are named as in CS231n's table (docs/transfer.md).
            targets=dict(
                similar=make_run_config("fashion_mnist", (3, 4, 6, 7, 8), 2500),
                dissimilar=make_run_config("digits", (), 0.1),
            ),
            strategy=make_defaults(STRATEGY),
        )
    )
    for run in (config.pretrain, config.targets.similar):
        run.data.dir = config.get_ref("dir")
    config.pretrain.train.duration = "2000 steps"
    if mode == "smoke":
        for run, classes in ((config.pretrain, range(5)), (config.targets.similar, range(5, 10))):
            run.data.update(dict(name="digits", classes=tuple(classes), validation=0.1))
        del config.targets["dissimilar"]
        for run in (config.pretrain, config.targets.similar):
            run.data.image_size = 8
            run.train.duration = "20 steps"
    return config


def make_run_config(name: str, classes: tuple[int, ...], validation: float) -> ConfigDict:
    """Returns the config of a run on these classes of the data set `name`."""
    config = common.get_config()
    config.model.name = "cifar_resnet20"
    with config.unlocked():
        config.model.depths = (1, 1, 1)
        config.model.widths = (8, 16, 32)
    config.data.name = name
    config.data.classes = classes
    config.data.image_size = 28
    config.data.validation = validation
    config.data.augment.pad_crop = 2
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = ((r".*/kernel", 5e-4), (r".*", 0.0))
    config.schedule.learning_rate = 0.1
    config.schedule.warmup = "20 steps"
    config.train.duration = "300 steps"
    config.train.eval_every = "0 steps"  # only at the end
    config.checkpoint.every = "0 steps"
    config.checkpoint.keep_latest = 1
    config.log.tensorboard = False
    return config
