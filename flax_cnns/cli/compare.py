"""Compares runs (configs, results and curves), or accuracy against operations of networks.

flax-cnns compare runs/plain runs/mixup
flax-cnns compare runs/sweep/*/seed0 --out=pictures/seed0.png
flax-cnns compare runs/tags runs/tags_mixup --metric=label_accuracy
flax-cnns compare --chart=experiments/results/imagenet_top1.csv

Unfinished runs are compared up to their last step. Writes the file that --out names. Without
--out, writes comparison.png, or comparison-2.png if that file exists.

--chart draws a bubble for each network of a CSV: across its multiply-adds, up its accuracy, with
its parameters as area. The columns are network and accuracy (percent). Columns that may be added
are family (its color), label, size (side of the images), macs, params and source. For a network of
flax_cnns, macs and params are counted.
"""

from __future__ import annotations

from absl import flags

from flax_cnns.cli.flags import choose_picture_path, define_arguments
from flax_cnns.errors import UserError

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
    from flax_cnns.names import make_console
    from flax_cnns.runs import compare as comparison

    runs = comparison.read_runs(argv[1:])
    console = make_console(width=max(120, make_console().width))
    if table := comparison.make_config_table(runs):
        console.print(table)
    else:
        print("the configs are the same" if len(runs) > 1 else "one run: nothing to compare with")
    metric = comparison.check_metric(runs, _METRIC.value)
    console.print(comparison.make_result_table(runs, metric))
    if (known := comparison.find_metrics(runs)) and metric not in known:
        print(f"none of these runs logged {metric}; they logged {', '.join(known)}")
    out, description = choose_picture_path(_OUT, default="comparison.png")
    comparison.draw_runs(runs, out, metric)
    print(f"written: {description}")


def _draw_chart(runs: list[str]) -> None:
    if runs:
        raise UserError(f"--chart draws the networks of a CSV; got the run {runs[0]!r} too")
    if flags.FLAGS["metric"].present:
        raise UserError("--metric does not go with --chart")
    from flax_cnns.runs import accuracy_chart

    out, description = choose_picture_path(_OUT, default="accuracy.png")
    accuracy_chart.draw_chart(_CHART.value, out, _TITLE.value)
    print(f"written: {description}")
