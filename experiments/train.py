"""Trains a network.

python -m experiments.train --workdir=runs/digits
python -m experiments.train --workdir=runs/x --config=configs/cifar10_resnet110.py:smoke
python -m experiments.train --workdir=runs/y --config.schedule.learning_rate=1e-3 --config.seed=1

The same command again goes on where the run stopped, to the bit. It refuses if the data changed
since the run began; with --accept-changed-data it goes on.
"""

from __future__ import annotations

import sys

if not __package__:  # run by its path: experiments/inspect.py must not hide Python's
    sys.path[0] = sys.path[0].removesuffix("experiments")

from absl import flags

from experiments import script

_WORKDIR = flags.DEFINE_string("workdir", None, "The run's directory.", required=True)
_CONFIG = script.define_config("digits_lenet5")
_ACCEPT = script.define_accept()


def train(argv: list[str]) -> None:
    from flax_cnns import run  # after the flags: JAX is not started for a mistyped one

    del argv
    run(_CONFIG.value, _WORKDIR.value, accept_changed_data=_ACCEPT.value)


if __name__ == "__main__":
    script.main(train)
