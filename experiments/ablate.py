"""`python -m experiments.ablate` is `flax-cnns ablate`; see flax_cnns/cli/ablate.py."""

from __future__ import annotations

import sys

if not __package__:  # run by path: experiments/inspect.py must not shadow Python's inspect
    sys.path[0] = sys.path[0].removesuffix("experiments")

from flax_cnns.cli import ablate, flags

if __name__ == "__main__":
    flags.main(ablate.ablate)
