"""`python -m experiments.audit` is `flax-cnns audit`; see flax_cnns/cli/audit.py."""

from __future__ import annotations

import sys

if not __package__:  # run by path: experiments/inspect.py must not shadow Python's inspect
    sys.path[0] = sys.path[0].removesuffix("experiments")

from flax_cnns.cli import audit, flags

if __name__ == "__main__":
    flags.main(audit.audit)
