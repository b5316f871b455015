"""Writes reference/FAMILY.npz, what other libraries' networks compute: see cases.py.

python -m tests.models.make_reference [FAMILY ...]
"""

from __future__ import annotations

import sys

from tests.models import cases


def main(families: list[str]) -> None:
    cases.FOLDER.mkdir(exist_ok=True)
    for family in families or cases.CASES:
        path = cases.FOLDER / f"{family}.npz"
        cases.save(path, *cases.theirs(cases.CASES[family]))
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
