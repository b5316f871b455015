"""The tables that a run and an evaluation close with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from flax_cnns.names import make_console


def print_summary(summary: dict[str, Any]) -> None:
    """The closing table."""
    table = Table(title=f"{summary['model']} on {summary['dataset']}", show_header=False)

    def row(name: str, key: str, form: str) -> None:
        if summary.get(key) is not None:
            table.add_row(name, form.format(summary[key]))

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
        said = ", ".join(f"{kind}: {count:,}" for kind, count in left_out.items())
        console.print(f"left out: {said}", markup=False, highlight=False, soft_wrap=True)
    if several := summary.get("files_of_several_pictures"):
        console.print(f"files with several pictures, of which the first was used: {several}")
    if damaged := summary["damaged_images"]:
        shown = ", ".join(damaged[:3]) + (", …" if len(damaged) > 3 else "")
        console.print(f"left out {len(damaged)} images that cannot be decoded: {shown}")
    opaque = [part["name"] for parts in summary.get("own", {}).values() for part in parts]
    opaque = [name for name in opaque if ":" not in name]
    if opaque:
        said = f"objects of this process alone, which no other can import: {', '.join(opaque)}"
        console.print(said, markup=False, highlight=False, soft_wrap=True)
    for warning in summary.get("warnings", ()):  # older runs have none
        console.print(f"warning: {warning}", markup=False, highlight=False, soft_wrap=True)


def print_evaluation(found: dict[str, Any], most: int = 30) -> None:
    """Accuracy per class with what each is most often taken for; the `most` worst classes."""
    console = make_console()
    title = f"{found['split']}, step {found['step']} ({found['checkpoint']})"
    if "confusion" in found:
        _print_classes(console, found, f"{title}: {found['examples']} examples", most)
    else:
        console.print(f"{title}: {found['examples']} examples", highlight=False)
    said = [f"loss {found['loss']:.4f}"]
    said += [f"accuracy {found['accuracy']:.2%}"] if "accuracy" in found else []
    said += [f"top-5 {found['top5']:.2%}"] if "top5" in found else []
    known = ("loss", "accuracy", "top5", "split", "step", "checkpoint", "examples")
    said += [
        f"{name} {value:.4g}"
        for name, value in found.items()
        if name not in known and isinstance(value, (int, float))
    ]
    console.print("   ".join(said))


def _print_classes(console: Any, found: dict[str, Any], title: str, most: int) -> None:
    counts, names = found["confusion"], [c["class"] for c in found["classes"]]
    table = Table(title=title)
    for column in ("class", "examples", "accuracy", "precision", "most often taken for"):
        table.add_column(column, justify="left" if column.startswith(("c", "m")) else "right")

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value:.2%}"

    rows = list(enumerate(found["classes"]))
    if len(rows) > most:
        rows = sorted(rows, key=lambda row: (row[1]["accuracy"] is None, row[1]["accuracy"]))[:most]
    for i, c in rows:
        wrong = [(n, j) for j, n in enumerate(counts[i]) if j != i and n]
        taken = ", ".join(f"{names[j]} ({n})" for n, j in sorted(wrong, reverse=True)[:3])
        table.add_row(
            c["class"], str(c["examples"]), percent(c["accuracy"]), percent(c["precision"]), taken
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
    """The likeliest classes of each photo with their probabilities."""
    table = Table()
    table.add_column("photo")
    table.add_column("class")
    table.add_column("probability", justify="right")
    for photo, guessed in zip(photos, guesses):
        for i, (name, share) in enumerate(guessed):
            last = i == len(guessed) - 1
            table.add_row("" if i else photo, name, f"{share:.1%}", end_section=last)
    console = make_console()
    console.print(title, highlight=False, soft_wrap=True)  # no table's title, which it would narrow
    console.print(table)
