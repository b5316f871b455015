"""`python -m experiments.predict`, which is `flax-cnns predict`: flax_cnns/cli/predict.py."""

from __future__ import annotations

import sys

if not __package__:  # run by its path: experiments/inspect.py must not hide Python's
    sys.path[0] = sys.path[0].removesuffix("experiments")

from flax_cnns.cli import flags, predict

if __name__ == "__main__":
    flags.main(predict.predict)
