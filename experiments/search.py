"""`python -m experiments.search` is `flax-cnns search`; see flax_cnns/cli/search.py."""

from __future__ import annotations

import sys

if not __package__:  # run by path: experiments/inspect.py must not shadow Python's inspect
    sys.path[0] = sys.path[0].removesuffix("experiments")

from flax_cnns.cli import flags, search

if __name__ == "__main__":
    flags.main(search.search)
