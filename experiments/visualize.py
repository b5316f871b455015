"""`python -m experiments.visualize` is `flax-cnns visualize`; see flax_cnns/cli/visualize.py."""

from __future__ import annotations

import sys

if not __package__:  # run by path: experiments/inspect.py must not shadow Python's inspect
    sys.path[0] = sys.path[0].removesuffix("experiments")

from flax_cnns.cli import flags, visualize

if __name__ == "__main__":
    flags.main(visualize.visualize)
