"""`python -m experiments.evaluate`, which is `flax-cnns evaluate`: flax_cnns/cli/evaluate.py."""

from __future__ import annotations

import sys

if not __package__:  # run by its path: experiments/inspect.py must not hide Python's
    sys.path[0] = sys.path[0].removesuffix("experiments")

from flax_cnns.cli import evaluate, flags

if __name__ == "__main__":
    flags.main(evaluate.evaluate)
