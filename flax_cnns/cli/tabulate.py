"""Collects the evaluations of many runs in one table: network, size, cost, accuracies.

flax-cnns tabulate runs/*
flax-cnns tabulate runs/* --out=results.md --sort=parameters
flax-cnns tabulate runs/a@best runs/b@best --split=validation --out=results.csv
flax-cnns tabulate runs/* --protocol=crops10
flax-cnns tabulate runs/a resnet50_v2.json --split=imagenet_v2

Reads the files that `evaluate` wrote, and names the runs that were not evaluated. Of a run with
several evaluations, the one with the highest step is taken; RUN@best, RUN@latest and RUN@STEP name
another. A file that `evaluate --out` wrote can be named in place of a run.
"""

from __future__ import annotations

import sys

from absl import flags

from flax_cnns.cli.flags import define_arguments

_SPLIT = flags.DEFINE_string(
    "split", "test", "The split: train, validation or test, or a set of `evaluate --set`."
)
_PROTOCOL = flags.DEFINE_string(
    "protocol",
    "",
    "The protocol at the end of a file's name: crops10 for evaluation_test_STEP_crops10.json."
    " Without this flag: the plain evaluation.",
)
_SORT = flags.DEFINE_string(
    "sort", "accuracy", "The order of the rows: accuracy (best first), name, parameters or macs."
)
_OUT = flags.DEFINE_string("out", "", "A file to write too: *.md (Markdown) or *.csv.")
define_arguments("one or more runs, or files of evaluations", "RUN...")


def tabulate(argv: list[str]) -> None:
    from flax_cnns.files import write_text
    from flax_cnns.names import make_console
    from flax_cnns.runs import tabulate as tables

    table = tables.collect_evaluations(
        argv[1:], split=_SPLIT.value, protocol=_PROTOCOL.value, sort=_SORT.value
    )
    text = tables.format_for(_OUT.value, table) if _OUT.value else ""
    width = max(120, make_console().width) if sys.stdout.isatty() else 200
    console = make_console(width=width)
    console.print(tables.make_rich_table(table))
    how = f" with the flags of {table.protocol}" if table.protocol else ""
    for run, command in table.missing:
        print(f"{run} has no such evaluation; run `{command}`{how}")
    if text:
        write_text(_OUT.value, text)
        print(f"written: {_OUT.value}")
