"""Prints the tables at the end of a run, an evaluation and a prediction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from flax_cnns.names import make_console
from flax_cnns.runs.metric import FRACTION_METRICS

MIN_WIDTH = 120  # columns of the table of classes; a narrower terminal wraps its lines


def print_summary(summary: dict[str, Any]) -> None:
    """Prints the final table of a run, and notes on its data and its own parts."""
    table = Table(title=f"{summary['model']} on {summary['dataset']}", show_header=False)

    def row(name: str, key: str, form: str) -> None:
        if summary.get(key) is not None:
            table.add_row(name, form.format(summary[key]))

    def print_line(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    row("parameters", "params", "{:,}")
    row("steps", "step", "{:,}")
    row("epochs", "epochs", "{:.1f}")
    row("best validation accuracy", "validation/best_accuracy", "{:.2%}")
    for key in summary:
        if key.startswith("validation/best_") and key != "validation/best_accuracy":
            row(f"best validation {key.removeprefix('validation/best_')}", key, "{:.4g}")
    row("test loss", "test/loss", "{:.4g}")
    row("test accuracy", "test/accuracy", "{:.2%}")
    row("test top-5 accuracy", "test/top5", "{:.2%}")
    shown = ("test/loss", "test/accuracy", "test/top5", "test/examples", "test/step")
    for key in summary:
        if key.startswith("test/") and key not in shown:
            row(key.replace("/", " "), key, "{:.4g}")
    row("test examples", "test/examples", "{:,}")
    row("accuracy on the training examples", "fit/accuracy", "{:.2%}")
    row("time to the first step", "seconds_to_first_step", "{:.1f} s")
    row("training speed", "images_per_second", "{:,.0f} images/s")
    row("training time", "seconds", "{:.1f} s")
    console = make_console()
    console.print(table)
    if left_out := summary.get("left_out"):
        counts = ", ".join(f"{kind}: {count:,}" for kind, count in left_out.items())
        print_line(f"left out: {counts}")
    if several := summary.get("files_of_several_pictures"):
        console.print(f"files with several frames (only the first is used): {several}")
    if damaged := summary["damaged_images"]:
        names = ", ".join(damaged[:3]) + (", …" if len(damaged) > 3 else "")
        images = "1 image" if len(damaged) == 1 else f"{len(damaged)} images"
        console.print(f"left out {images} that cannot be decoded: {names}")
    parts = [part["name"] for parts in summary.get("own", {}).values() for part in parts]
    if opaque := [name for name in parts if ":" not in name]:
        print_line(f"objects that only this process can use: {', '.join(opaque)}")
    for warning in summary.get("warnings", ()):  # summaries of older versions have no such entry
        print_line(f"warning: {warning}")


def print_evaluation(results: dict[str, Any], max_classes: int = 30, title: str = "") -> None:
    """Prints the loss and the accuracies with their intervals, below `title` or else the split and
    the checkpoint.

    With a confusion matrix also prints, for the `max_classes` worst classes, the accuracy and the
    classes they are most often mistaken for.
    """
    console = make_console(width=max(MIN_WIDTH, make_console().width))
    if not title:
        title = f"{results['split']}, step {results['step']} ({results['checkpoint']})"
        title += f": {results['examples']} examples"
    if "confusion" in results:
        _print_classes(console, results, title, max_classes)
    else:
        console.print(title, highlight=False)
    intervals = results.get("intervals", {})  # files of older versions have none
    for name in [name for name in results if name not in _NOT_METRICS]:
        value = results[name]
        if isinstance(value, int | float):
            console.print(f"{_TITLES.get(name, name)} {describe_value(name, value, intervals)}")
    if intervals:
        console.print("brackets: 95 % intervals over the images of the split, not over seeds")


def print_corruptions(results: dict[str, Any]) -> None:
    """Prints the accuracy of each corruption at each severity, and the means."""
    cells = {(cell["corruption"], cell["severity"]): cell["accuracy"] for cell in results["cells"]}
    severities = sorted({severity for _, severity in cells})
    table = Table(title="accuracy by severity")
    for column in ("corruption", *map(str, severities), "mean"):
        table.add_column(column, justify="left" if column == "corruption" else "right")
    for name, mean in results["corruptions"].items():
        found = (cells.get((name, severity)) for severity in severities)
        row = ["-" if value is None else f"{value:.2%}" for value in found]
        table.add_row(name, *row, f"{mean:.2%}")
    console = make_console()
    console.print(table)
    text = describe_value("accuracy", results["accuracy"], results.get("intervals", {}))
    console.print(f"mean accuracy {text}", highlight=False)
    if "mce" in results:
        console.print(f"mean corruption error (AlexNet: 100%) {results['mce']:.2%}")


# Keys of an evaluation's file that are numbers but no metrics.
_NOT_METRICS = ("split", "step", "checkpoint", "examples")
_TITLES = {
    "top5": "top-5",
    "label_accuracy": "label accuracy",
    "subset_accuracy": "subset accuracy",
}


def describe_value(name: str, value: float, intervals: Mapping[str, Sequence[float]] = {}) -> str:
    """Formats a metric with its interval: "97.22% [94.98, 98.48]", "0.0894 [0.0617, 0.1213]"."""
    if name in FRACTION_METRICS:
        text, ends = f"{value:.2%}", "{:.2f}"
        factor = 100
    else:
        ends, factor = "{:.4f}" if name == "loss" else "{:.4g}", 1
        text = ends.format(value)
    interval = intervals.get(name)
    if not interval or not all(end is not None and math.isfinite(end) for end in interval):
        return text
    return f"{text} [{', '.join(ends.format(factor * end) for end in interval)}]"


def _print_classes(console: Any, results: dict[str, Any], title: str, max_classes: int) -> None:
    counts, names = results["confusion"], [c["class"] for c in results["classes"]]
    table = Table(title=title)
    for column in ("class", "examples", "accuracy", "precision", "most often taken for"):
        table.add_column(column, justify="left" if column.startswith(("c", "m")) else "right")

    def percent(c: dict[str, Any], key: str) -> str:
        interval = {"accuracy": c.get(f"{key}_interval") or ()}
        return "-" if c[key] is None else describe_value("accuracy", c[key], interval)

    rows = list(enumerate(results["classes"]))
    if len(rows) > max_classes:
        rows.sort(key=lambda row: (row[1]["accuracy"] is None, row[1]["accuracy"]))
        rows = rows[:max_classes]
    for i, c in rows:
        wrong = [(n, j) for j, n in enumerate(counts[i]) if j != i and n]
        taken = ", ".join(f"{names[j]} ({n})" for n, j in sorted(wrong, reverse=True)[:3])
        table.add_row(
            c["class"], str(c["examples"]), percent(c, "accuracy"), percent(c, "precision"), taken
        )
    console.print(table)
    if len(counts) <= 20:
        matrix = Table(title="confusion: rows true, columns predicted")
        for column in ("", *names):
            matrix.add_column(column, justify="right")
        for name, row in zip(names, counts):
            matrix.add_row(name, *(str(n) if n else "·" for n in row))
        console.print(matrix)


def print_predictions(
    title: str, photos: Sequence[str], guesses: Sequence[Sequence[tuple[str, float]]]
) -> None:
    """Prints the most likely classes of each photo with their probabilities."""
    table = Table()
    table.add_column("photo")
    table.add_column("class")
    table.add_column("probability", justify="right")
    for photo, photo_guesses in zip(photos, guesses):
        for i, (name, probability) in enumerate(photo_guesses):
            is_last = i == len(photo_guesses) - 1
            table.add_row("" if i else photo, name, f"{probability:.1%}", end_section=is_last)
    console = make_console()
    console.print(title, highlight=False, soft_wrap=True)  # as the table's title it would be cut
    console.print(table)
