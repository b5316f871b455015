"""Flags of compare that do nothing are refused before anything is read; the count of --errors."""

from __future__ import annotations

import subprocess
import sys

from tests.tiny_runs import ROOT

# Each runs in a process of its own, because each command defines its flags when it is imported.
COMPARE = """
from absl import flags
from flax_cnns.cli import compare
from flax_cnns.errors import UserError
for given in ("a b --margin=1", "a b --trust", "--chart=x.csv --split=test"):
    flags.FLAGS.unparse_flags()
    for name in ("margin", "trust", "chart", "split"):
        flags.FLAGS[name].unparse()
    try:
        compare.compare(flags.FLAGS(["compare", *given.split()]))
    except UserError as error:
        print(error)
"""
ERRORS = """
from absl import flags
from flax_cnns.cli import evaluate
for given in ("", "--errors", "--errors=7", "--noerrors", "--errors --split=train", "--errors=x"):
    flags.FLAGS.unparse_flags()
    flags.FLAGS["errors"].unparse()
    try:
        flags.FLAGS(["evaluate", "--workdir=x", *given.split()])
        print(flags.FLAGS.errors)
    except flags.Error as error:
        print(error)
"""


def test_what_is_refused_and_how_many_mistakes_are_shown():
    started = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for code in (COMPARE, ERRORS)
    ]
    refused, counts = (each.communicate(timeout=120)[0].splitlines() for each in started)
    assert refused == [
        "--margin belongs to a comparison on images; also give --split",
        "--trust belongs to a comparison on images; also give --split",
        "--split does not go with --chart",
    ]
    assert counts[:5] == ["0", "100", "7", "0", "100"]
    assert counts[5:] == ["flag --errors=x: expected a whole number, got 'x'"]
