"""Writes reference/*.npz, the outputs of other libraries' networks; cases.py describes the files.

python -m tests.models.make_reference [FAMILY or network of Keras ...]
"""

from __future__ import annotations

import argparse
import json
import sys

import numpy as np

from tests.models import cases, foreign


def main(argv: list[str] | None = None) -> None:
    known = [*foreign.CASES, *foreign.KERAS_SHAPES]
    parser = argparse.ArgumentParser(prog="python -m tests.models.make_reference")
    parser.add_argument(
        "names", nargs="*", help=f"which to write: {', '.join(known)}; by default all"
    )
    wanted = parser.parse_args(argv).names
    if unknown := sorted(set(wanted) - set(known)):
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    cases.FOLDER.mkdir(exist_ok=True)
    for name in wanted or known:
        path = cases.FOLDER / f"{name}.npz"
        if name in foreign.KERAS_SHAPES:  # Keras's networks cannot be shortened
            weights = foreign.build(name, "keras").weights
            np.savez_compressed(path, shapes=json.dumps({w.path: tuple(w.shape) for w in weights}))
        else:
            cases.save(path, *cases.run_theirs(foreign.CASES[name]))
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    sys.exit(main())
