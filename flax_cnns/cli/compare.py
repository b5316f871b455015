"""Compares runs: the differences between their configs, their results and their curves.

flax-cnns compare runs/plain runs/mixup
flax-cnns compare runs/sweep/*/seed0 --out=pictures/seed0.png
flax-cnns compare runs/tags runs/tags_mixup --metric=label_accuracy

Unfinished runs are compared up to their last step. Writes the file that --out names. Without
--out, writes comparison.png, or comparison-2.png if that file exists.
"""

from __future__ import annotations

from absl import flags

from flax_cnns.cli.flags import choose_picture_path, define_arguments

_OUT = flags.DEFINE_string(
    "out",
    "comparison.png",
    "The picture to write, in the format of its suffix. Without this flag, no file is replaced.",
)
_METRIC = flags.DEFINE_string(
    "metric", "accuracy", "The metric to compare: any that the runs logged, or your own."
)
define_arguments("one or more runs (directories of finished or unfinished runs)", "RUN...")


def compare(argv: list[str]) -> None:
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
    out, description = choose_picture_path(_OUT)
    comparison.draw_runs(runs, out, metric)
    print(f"written: {description}")
