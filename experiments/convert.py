"""`python -m experiments.convert`, which is `flax-cnns convert`: flax_cnns/cli/convert.py."""

from __future__ import annotations

import sys

if not __package__:  # run by its path: experiments/inspect.py must not hide Python's
    sys.path[0] = sys.path[0].removesuffix("experiments")

from flax_cnns.cli import convert, flags

if __name__ == "__main__":
    flags.main(convert.convert)
