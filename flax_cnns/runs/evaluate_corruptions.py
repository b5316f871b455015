"""Evaluates a run on corrupted images: ImageNet-C's corruptions, made while it evaluates."""

from __future__ import annotations

import csv
import io
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.table import Table

from flax_cnns import files
from flax_cnns.analysis.plots import corruptions as plots
from flax_cnns.data import pipeline
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.evaluation import uncertainty
from flax_cnns.evaluation.corruptions import scores, table
from flax_cnns.names import make_console
from flax_cnns.runs.classifier import Classifier, make_classifier_from_run
from flax_cnns.runs.corruption_cells import (
    CLEAN,
    CorruptedCell,
    evaluate_cells,
    name_folder,
    name_selection,
    take_images,
)
from flax_cnns.runs.same_images import check_same_images, describe_split
from flax_cnns.runtime import output

ALEXNET = "alexnet"


class _Scored(NamedTuple):
    """The cells of one network; for AlexNet only its published errors."""

    name: str
    errors: dict[str, list[float]]  # corruption -> error of each severity
    clean: float
    cells: dict[tuple[str, int], CorruptedCell]


@output.safe()
def evaluate_corruptions(
    workdir: str | os.PathLike,
    *,
    corruptions: Sequence[str] = ("all",),
    severities: Sequence[int] = table.SEVERITIES,
    baseline: str = "",
    split: str = "test",
    checkpoint: str = "",
    images: int = 0,
    seed: int = 0,
    sheet: int | None = None,
    accept_changed_data: bool = False,
    trust: bool = False,
) -> dict[str, Any]:
    """Evaluates a run on corrupted images and prints the errors by corruption and severity.

    Writes `evaluation_SPLIT_STEP_corruptions.json`, .md, .csv and .png into the run's directory,
    and one file for each cell into a folder `evaluation_SPLIT_STEP_corruptions`; cells that are
    there already are not evaluated again. Returns the content of the JSON file. `images` and
    `seed` are part of all these names; `corruptions` and `severities`, if they are not all, only of
    the names of the four files.

    `corruptions`: names, groups or "all". `baseline`: a run whose errors divide this run's (mCE),
    or "alexnet", the published errors for ImageNet's 1000 classes. `images`: evaluate so many
    evenly spaced images; 0: all. `sheet`: the number of the image whose corruptions are drawn into
    `corruptions_SPLIT_N.png`. The other arguments are those of `evaluate_run`.

    Means leave out procedural_frost, the corruptions of the group "extra", and those that do
    nothing to gray images. Raises UserError; see `make_classifier_from_run`,
    `table.select_corruptions` and `evaluate_cells`.
    """
    rows = table.select_corruptions(corruptions)
    severities = sorted(set(severities))
    if not severities or not set(severities) <= set(table.SEVERITIES):
        given_severities = ",".join(map(str, severities)) or "none"
        raise UserError(f"--severities: expected some of 1,2,3,4,5; got {given_severities}")
    given: dict[str, Any] = dict(accept_changed_data=accept_changed_data, trust=trust)
    classifier = make_classifier_from_run(workdir, checkpoint, **given)
    left_out = _explain_left_out(rows, classifier)
    counted = [row.name for row in rows if row.name not in left_out]
    other = make_classifier_from_run(baseline, **given) if baseline not in ("", ALEXNET) else None
    _check_baseline(classifier, other, baseline, split)
    if sheet is not None:
        _check_sheet(classifier, split, sheet)
    options: dict[str, Any] = dict(
        rows=rows, severities=severities, split=split, images=images, seed=seed
    )
    scored = [_score(classifier, **options)]
    if other is not None:
        scored.append(_score(other, **options))
    elif baseline:
        rates = {n: [e[s - 1] for s in severities] for n, e in scores.ALEXNET_ERRORS.items()}
        scored.append(_Scored("AlexNet", rates, scores.ALEXNET_CLEAN_ERROR, {}))
    results = _summarize(classifier, scored, counted, left_out, severities, split, images, seed)
    if jax.process_index() > 0:
        return results
    run = classifier.run
    assert run is not None
    stem = name_folder(classifier, split, images, seed)
    stem = stem.with_name(stem.name + name_selection(rows, severities))
    files.write_json(f"{stem}.json", results)
    files.write_text(f"{stem}.md", _format_markdown(scored, results, severities))
    files.write_text(f"{stem}.csv", _format_csv(scored, left_out))
    drawn = {
        each.name: {row.name: each.errors[row.name] for row in rows if row.name in each.errors}
        for each in scored
        if each.cells
    }
    clean = {each.name: each.clean for each in scored}
    plots.draw_corruption_curves(drawn, clean, severities, f"{stem}.png")
    written = [f"{stem.name}.json", ".md", ".csv", ".png"]
    if sheet is not None:
        path = run.folder / f"corruptions_{split}_{sheet}.png"
        draw_sheet(classifier, rows, severities, split, sheet, path, seed=seed)
        written.append(path.name)
    _print_table(scored, results, severities)
    print(f"written to {run.folder}: {', '.join(written)}")
    return results


def draw_sheet(
    classifier: Classifier,
    rows: Sequence[table.Corruption],
    severities: Sequence[int],
    split: str,
    number: int,
    path: str | os.PathLike,
    *,
    seed: int = 0,
) -> None:
    """Draws the corruptions of image `number` of a split, as the network sees them. Raises
    UserError if there is no such image."""
    _check_sheet(classifier, split, number)
    dataset = classifier.dataset
    assert dataset is not None
    config = classifier.data_config
    image = None
    for at, batch in enumerate(
        pipeline.eval_batches(dataset, split, config, reader=classifier.reader)
    ):
        if at == number // config.eval_batch_size:
            image = np.asarray(batch["image"])[number % config.eval_batch_size]
            break
    assert image is not None
    numbers = np.array([number], np.int32)
    shown = {}
    for row in rows:
        constants = table.prepare_constants(row, image.shape)
        some = [
            table.make_corrupt(row.name)(
                image[None], numbers, table.pick_severity(constants, severity), seed
            )[0]
            for severity in severities
        ]
        shown[row.name] = np.stack([image, *map(np.asarray, some)])
    plots.draw_corruption_sheet(shown, [0, *severities], path)


def _check_sheet(classifier: Classifier, split: str, number: int) -> None:
    assert classifier.dataset is not None
    count = len(classifier.dataset.splits[split])
    if not 0 <= number < count:
        raise UserError(f"--sheet: expected an image from 0 to {count - 1}, got {number}")


def _explain_left_out(rows: Sequence[table.Corruption], classifier: Classifier) -> dict[str, str]:
    """{corruption: why the means leave it out}."""
    reasons = {}
    for row in rows:
        if not row.is_published:
            reasons[row.name] = "procedural: not the benchmark's photographs"
        elif row.needs_color and classifier.image_shape[2] == 1:
            reasons[row.name] = "does nothing to gray images"
        elif row.group == "extra":
            reasons[row.name] = "not one of the benchmark's fifteen"
    return reasons


def _check_baseline(
    classifier: Classifier, other: Classifier | None, baseline: str, split: str
) -> None:
    dataset = classifier.dataset
    assert dataset is not None
    if split not in dataset.splits:
        raise UserError(
            f"--split: {dataset.name} has no split {split!r}{did_you_mean(split, dataset.splits)}"
        )
    kind = table.name_constants(dataset.image_shape)
    if baseline == ALEXNET and (len(classifier.class_names) != 1000 or kind != "imagenet"):
        raise UserError(
            "--baseline=alexnet holds for ImageNet's 1000 classes and images of more than"
            f" {table.MAX_CIFAR_SIDE} pixels; this run has {len(classifier.class_names)} classes;"
            " name a run of the same data instead"
        )
    if other is None:
        return
    assert other.dataset is not None
    theirs = other.dataset
    same = theirs.name == dataset.name and len(theirs.splits.get(split, ())) == len(
        dataset.splits[split]
    )
    if not same or table.name_constants(theirs.image_shape) != kind:
        raise UserError(
            f"--baseline: {baseline} has other data ({theirs.name}, {theirs.image_shape}) than the"
            f" run ({dataset.name}, {dataset.image_shape}); mCE is about the same images"
        )
    facts = [
        describe_split(each.name, each.dataset, split, len(each.class_names))
        for each in (classifier, other)
        if each.dataset is not None
    ]
    check_same_images(*facts)


def _score(
    classifier: Classifier,
    *,
    rows: Sequence[table.Corruption],
    severities: Sequence[int],
    split: str,
    images: int,
    seed: int,
) -> _Scored:
    run = classifier.run
    assert run is not None
    assert classifier.dataset is not None
    facts = {"split": split, "step": run.step, "checkpoint": run.checkpoint}
    if jax.process_index() == 0:
        print(classifier.title)
    cells = evaluate_cells(
        classifier,
        name_folder(classifier, split, images, seed),
        rows,
        severities,
        split=split,
        dataset=take_images(classifier.dataset, split, images),
        seed=seed,
        facts=facts,
    )
    errors = {row.name: [cells[row.name, s].error for s in severities] for row in rows}
    return _Scored(pathlib.Path(run.folder).name, errors, cells[CLEAN, 0].error, cells)


def _summarize(
    classifier: Classifier,
    scored: Sequence[_Scored],
    counted: Sequence[str],
    left_out: dict[str, str],
    severities: Sequence[int],
    split: str,
    images: int,
    seed: int,
) -> dict[str, Any]:
    """The content of the JSON file: the metrics are means over the counted corruptions."""
    run, ours = classifier.run, scored[0]
    assert run is not None
    clean = ours.cells[CLEAN, 0]
    results: dict[str, Any] = {
        "split": split,
        "step": run.step,
        "checkpoint": run.checkpoint,
        "examples": len(clean.correct),
        "clean_accuracy": 1 - ours.clean,
    }
    intervals = {"clean_accuracy": [1 - end for end in reversed(clean.interval)]}
    protocol: dict[str, Any] = {
        "corruptions": [name for name, s in ours.cells if s == severities[0]],
        "severities": list(severities),
        "constants": table.name_constants(classifier.image_shape),
        "seed": seed,
    }
    if images:
        protocol["images"] = images
    if left_out:
        protocol["left_out"] = left_out
    if counted:
        some = [ours.cells[name, s].correct for name in counted for s in severities]
        share = np.mean(some, 0)  # f64 [N]: in how many cells each image is right
        results["accuracy"] = float(share.mean())
        intervals["accuracy"] = list(uncertainty.bootstrap_interval(share))
        if len(scored) > 1:
            theirs = scored[1]
            errors = {name: ours.errors[name] for name in counted if name in theirs.errors}
            results["mce"] = scores.mean_corruption_error(errors, theirs.errors)
            results["relative_mce"] = scores.relative_corruption_error(
                errors, ours.clean, theirs.errors, theirs.clean
            )
            protocol["baseline"] = theirs.name
    results |= {"intervals": intervals, "protocol": protocol}
    results["cells"] = [
        {
            "corruption": name,
            "severity": severity,
            "accuracy": 1 - cell.error,
            "interval": [1 - end for end in reversed(cell.interval)],
        }
        for (name, severity), cell in ours.cells.items()
    ]
    return results


# ---- tables


def _describe_means(results: dict[str, Any], name: str) -> list[str]:
    low, high = results["intervals"]["clean_accuracy"]
    lines = [
        f"clean error {1 - results['clean_accuracy']:.2%} [{1 - high:.2%}, {1 - low:.2%}]"
        f" of {results['examples']} images"
    ]
    left_out = results["protocol"].get("left_out", {})
    why = "; ".join(f"without {corruption} ({reason})" for corruption, reason in left_out.items())
    if "accuracy" in results:
        low, high = results["intervals"]["accuracy"]
        lines.append(
            f"mean error {1 - results['accuracy']:.2%} [{1 - high:.2%}, {1 - low:.2%}]"
            + (f", {why}" if why else "")
        )
    elif why:
        lines.append(f"no mean: {why}")
    if "mce" in results:
        relative = results["relative_mce"]
        shown = "unknown (the baseline is not worse on some corrupted images than on clean ones)"
        lines.append(
            f"mCE {100 * results['mce']:.1f}, relative mCE"
            f" {shown if relative is None else f'{100 * relative:.1f}'}; baseline {name}: 100"
        )
    return lines


def _print_table(
    scored: Sequence[_Scored], results: dict[str, Any], severities: Sequence[int]
) -> None:
    ours, console = scored[0], make_console()
    shown = Table(title=f"error under corruption, % ({results['protocol']['constants']} constants)")
    shown.add_column("corruption")
    for severity in severities:
        shown.add_column(str(severity), justify="right")
    shown.add_column("mean", justify="right")
    if len(scored) > 1:
        shown.add_column(f"{scored[1].name}", justify="right")
    for name, row in ours.errors.items():
        numbers = [f"{100 * error:.2f}" for error in [*row, float(np.mean(row))]]
        if len(scored) > 1:
            theirs = scored[1].errors.get(name)
            numbers.append("-" if theirs is None else f"{100 * np.mean(theirs):.2f}")
        shown.add_row(name, *numbers)
    console.print(shown)
    for line in _describe_means(results, scored[-1].name):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _format_markdown(
    scored: Sequence[_Scored], results: dict[str, Any], severities: Sequence[int]
) -> str:
    """Errors in % of all networks, with Wilson's 95 % intervals of the cells of the first."""
    heads = ["corruption", *(f"severity {s}" for s in severities), "mean"]
    heads += [f"mean of {each.name}" for each in scored[1:]]
    lines = [f"| {' | '.join(heads)} |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for name, row in scored[0].errors.items():
        parts = [name]
        for severity, error in zip(severities, row):
            low, high = scored[0].cells[name, severity].interval
            parts.append(f"{100 * error:.1f} [{100 * low:.1f}, {100 * high:.1f}]")
        parts.append(f"{100 * np.mean(row):.1f}")
        for each in scored[1:]:
            theirs = each.errors.get(name)
            parts.append("-" if theirs is None else f"{100 * np.mean(theirs):.1f}")
        lines.append(f"| {' | '.join(parts)} |")
    means = "\n".join(f"- {line}" for line in _describe_means(results, scored[-1].name))
    return f"Errors of {scored[0].name} in %.\n\n" + "\n".join(lines) + f"\n\n{means}\n"


def _format_csv(scored: Sequence[_Scored], left_out: dict[str, str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    heads = ("network", "corruption", "severity", "examples", "error", "low", "high", "in_mean")
    writer.writerow(heads)
    for each in scored:
        for (name, severity), cell in each.cells.items():
            low, high = cell.interval
            numbers = [f"{value:.5f}" for value in (cell.error, low, high)]
            in_mean = int(severity > 0 and name not in left_out)
            writer.writerow([each.name, name, severity, len(cell.correct), *numbers, in_mean])
    return text.getvalue()
