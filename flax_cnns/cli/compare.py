"""Compares runs (configs, results and curves), or accuracy against operations of networks.

flax-cnns compare runs/plain runs/mixup
flax-cnns compare runs/plain runs/mixup@best --split=test --margin=0.5
flax-cnns compare runs/sweep/*/seed0 --out=pictures/seed0.png
flax-cnns compare runs/tags runs/tags_mixup --metric=label_accuracy
flax-cnns compare --chart=experiments/results/imagenet_top1.csv

Unfinished runs are compared up to their last step. With --split, all runs also predict the images
of that split, and each run is compared with the first one: paired interval of the difference and
McNemar's test, and with --margin whether it is equivalent or not worse. Writes the file that --out
names. Without --out, writes comparison.png, or comparison-2.png if that file exists.

--chart draws a bubble for each network of a CSV: across its multiply-adds, up its accuracy, with
its parameters as area. The columns are network and accuracy (percent). Columns that may be added
are family (its color), label, size (side of the images), macs, params and source. For a network of
flax_cnns, macs and params are counted.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from absl import flags

from flax_cnns.cli.flags import (
    choose_picture_path,
    define_accept,
    define_arguments,
    define_trust,
)
from flax_cnns.errors import UserError

if TYPE_CHECKING:
    from flax_cnns.runs.compare_images import ComparedRun

_OUT = flags.DEFINE_string(
    "out",
    "",
    "The picture to write, in the format of its suffix. Without this flag it is comparison.png, or"
    " accuracy.png with --chart, and no file is replaced.",
)
_METRIC = flags.DEFINE_string(
    "metric", "accuracy", "The metric to compare: any that the runs logged, or your own."
)
_CHART = flags.DEFINE_string(
    "chart", "", "A CSV of networks and accuracies, to draw instead of runs."
)
_TITLE = flags.DEFINE_string("title", "", "--chart: the title of the picture.")
_SPLIT = flags.DEFINE_string(
    "split",
    "",
    "Also compare the runs on the same images: those of train, validation or test. The runs need"
    " the same data; networks and image sizes may differ.",
)
_MARGIN = flags.DEFINE_float(
    "margin", None, "With --split: the largest difference that does not matter, in points."
)
_ACCEPT = define_accept()
_TRUST = define_trust()
_RUNS = "one or more runs (directories of finished or unfinished runs)"
define_arguments(_RUNS, "[RUN...]", least=0)


def compare(argv: list[str]) -> None:
    if _CHART.value:
        _draw_chart(argv[1:])
        return
    if _TITLE.value:
        raise UserError("--title needs --chart")
    if not argv[1:]:
        raise UserError(f"expected {_RUNS}, got none; for networks: --chart=FILE.csv")
    if not _SPLIT.value:
        for flag in ("margin", "accept-changed-data", "trust"):
            if flags.FLAGS[flag].present:
                raise UserError(f"--{flag} belongs to a comparison on images; also give --split")
    from flax_cnns.names import make_console
    from flax_cnns.runs import compare as comparison
    from flax_cnns.runs import compare_images

    runs = comparison.read_runs(compare_images.split_folders(argv[1:]))
    images = _compare_on_images(argv[1:]) if _SPLIT.value else None
    width = max(120, make_console().width) if sys.stdout.isatty() else 200
    console = make_console(width=width)
    if table := comparison.make_config_table(runs):
        console.print(table)
    else:
        print("the configs are the same" if len(runs) > 1 else "one run: nothing to compare with")
    metric = comparison.check_metric(runs, _METRIC.value)
    console.print(comparison.make_result_table(runs, metric))
    if (known := comparison.find_metrics(runs)) and metric not in known:
        print(f"none of these runs logged {metric}; they logged {', '.join(known)}")
    if note := comparison.explain_missing_fit(runs, metric):
        print(note)
    if images is not None:
        console.print(compare_images.make_image_table(images, _SPLIT.value, _MARGIN.value))
        print(compare_images.explain_image_table(images, _MARGIN.value))
    out, description = choose_picture_path(_OUT, default="comparison.png")
    comparison.draw_runs(runs, out, metric)
    print(f"written: {description}")


def _draw_chart(runs: list[str]) -> None:
    if runs:
        raise UserError(f"--chart draws the networks of a CSV; got the run {runs[0]!r} too")
    for flag in ("metric", "split", "margin", "accept-changed-data", "trust"):
        if flags.FLAGS[flag].present:
            raise UserError(f"--{flag} does not go with --chart")
    from flax_cnns.runs import accuracy_chart

    out, description = choose_picture_path(_OUT, default="accuracy.png")
    accuracy_chart.draw_chart(_CHART.value, out, _TITLE.value)
    print(f"written: {description}")


def _compare_on_images(runs: list[str]) -> list[ComparedRun]:
    from flax_cnns.runs.compare_images import compare_on_images

    return compare_on_images(
        runs,
        split=_SPLIT.value,
        margin=_MARGIN.value,
        accept_changed_data=_ACCEPT.value,
        trust=_TRUST.value,
    )
