"""The small run that the tests share: LeNet-5 on the real digits for a dozen steps."""

from __future__ import annotations

import json
from pathlib import Path

from configs.common import get_config
from flax_cnns.checkpoint import reading
from flax_cnns.config import flatten

ROOT = Path(__file__).resolve().parent.parent
TIMES = ("time", "images_per_second", "time/first_step")


def make_config(digits_dir):
    config = get_config()
    config.data.dir = digits_dir
    config.data.batch_size = 16
    config.data.augment.update(dict(pad_crop=2, rotate=10.0, scale=0.1))
    config.mix.label_smoothing = 0.1
    config.optimizer.name = "adam"
    config.schedule.learning_rate = 2e-3
    config.train.duration = "12 steps"
    config.train.eval_every = "5 steps"
    config.train.ema = 0.9
    config.checkpoint.every = "5 steps"
    config.log.every = "3 steps"
    config.log.tensorboard = False
    return config


def overrides(config):
    """Returns the flags that turn configs/common.py into `config`."""
    default, wanted = flatten(get_config().to_dict()), flatten(config.to_dict())
    changed = {k: v for k, v in wanted.items() if v != default[k]}
    return ["--config=configs/common.py", *(f"--config.{k}={v}" for k, v in changed.items())]


def arrays(workdir, which="latest"):
    path = f"{workdir}@{which}"
    return reading.read_leaves(path, list(reading.read_metadata(path)))


def records(workdir):
    """Returns the logged metrics, without times."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    records = [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]
    return [record for record in records if set(record) != {"step"}]
