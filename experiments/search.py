"""`python -m experiments.search`, which is `flax-cnns search`: flax_cnns/cli/search.py."""

from __future__ import annotations

import sys

if not __package__:  # run by its path: experiments/inspect.py must not hide Python's
    sys.path[0] = sys.path[0].removesuffix("experiments")

from flax_cnns.cli import flags, search

if __name__ == "__main__":
    flags.main(search.search)
