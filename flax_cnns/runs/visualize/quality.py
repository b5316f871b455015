"""A table of how good saliency maps are: methods by measures, with intervals over images."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from flax_cnns import files
from flax_cnns import tree as pytree
from flax_cnns.analysis import statistics
from flax_cnns.analysis.explain import quality, targets
from flax_cnns.analysis.explain.features import Variables
from flax_cnns.analysis.explain.targets import Target
from flax_cnns.analysis.plots import quality as plots
from flax_cnns.analysis.statistics import Interval
from flax_cnns.errors import UserError
from flax_cnns.runs.subject import Subject
from flax_cnns.runs.visualize.saliency import DEFAULT_METHODS, METHODS, check_methods
from flax_cnns.types import Array

POINTS = 9  # of the cascade at which maps are compared
STEPS = 20  # of deletion and insertion
EDGES, RANDOM = "edges (Sobel)", "random"  # the baselines
MEASURES = {"deletion": -1, "insertion": 1, "road": 1}  # 1: higher is better
_PRINT_EVERY = 5.0  # seconds


class MethodScores(NamedTuple):
    """The measures of one method, or why there are none."""

    similarity: np.ndarray  # f64 [points N]: Spearman's correlation with the randomized network
    values: Mapping[str, np.ndarray]  # {measure: f64 [N]}
    reason: str = ""  # why the method cannot explain this network


class QualityTable(NamedTuple):
    """The measures of several methods and of the two baselines."""

    title: str
    layers: Sequence[str]  # [points]: the last layer that is random at each point
    scores: Mapping[str, MethodScores]  # by method; the baselines come last
    targets: np.ndarray  # i32 [N]: the explained classes

    @property
    def images(self) -> int:
        """The number of images."""
        return len(self.targets)

    def get_similarity(self, method: str) -> list[Interval]:
        """Returns the mean similarity at each point, over images whose maps are not constant."""
        found = self.scores[method].similarity
        return [statistics.mean(row[np.isfinite(row)].tolist()) for row in found]

    def get_mean(self, method: str, measure: str) -> Interval:
        """Returns the mean of a measure over the images."""
        return statistics.mean(self.scores[method].values[measure].tolist())

    def compare(self, method: str, baseline: str, measure: str) -> Interval:
        """Returns the mean of method minus baseline, paired by image."""
        ours, theirs = (
            dict(enumerate(self.scores[name].values[measure].tolist()))
            for name in (method, baseline)
        )
        return statistics.paired_difference(ours, theirs).interval

    def find_beaten(self, method: str, baseline: str) -> list[str]:
        """Returns the measures in which the method is better: the interval excludes 0."""
        differences = {name: self.compare(method, baseline, name) for name in MEASURES}
        return [
            name
            for name, found in differences.items()
            if found.excludes_zero and found.mean * MEASURES[name] > 0
        ]


def draw_quality(
    subject: Subject,
    png: str | os.PathLike,
    *,
    methods: Sequence[str] = DEFAULT_METHODS,
    classes: int | Sequence[int] | None = None,
    path: str | None = None,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> QualityTable:
    """Measures each method, and writes a picture, and a CSV and a Markdown file next to it.

    The results of each method are saved in a folder next to the picture, from which a killed call
    goes on; it is removed at the end. A method that cannot explain the network gets a row with the
    reason. Arguments are those of `draw_saliency`. Raises UserError, and KeyboardInterrupt, with a
    message, after Ctrl-C.
    """
    picture = pathlib.Path(png)
    check_methods(methods)
    subject.check_images()
    folder = picture.with_name(f"{picture.stem}.rows")
    try:
        table = measure_quality(
            subject, methods, classes=classes, path=path, seed=seed, folder=folder, say=say
        )
    except KeyboardInterrupt:
        saved = [name for name in methods if (folder / f"{name}.json").is_file()]
        if not saved:
            raise
        raise KeyboardInterrupt(
            f"interrupted; the results of {', '.join(saved)} are saved in {folder}; run the same"
            " command again to measure the others"
        ) from None
    files.write_text(picture.with_suffix(".csv"), format_csv(table))
    files.write_text(picture.with_suffix(".md"), format_markdown(table))
    measured = [name for name, found in table.scores.items() if not found.reason]
    plots.draw_quality(
        {name: table.get_similarity(name) for name in measured if name not in (EDGES, RANDOM)},
        table.layers,
        {name: {m: table.get_mean(name, m) for m in MEASURES} for name in measured},
        picture,
        f"{table.title}: {table.images} images",
        higher_is_better={name: sign > 0 for name, sign in MEASURES.items()},
    )
    _SavedScores(folder, "").remove(methods)
    return table


def measure_quality(
    subject: Subject,
    methods: Sequence[str],
    *,
    classes: int | Sequence[int] | None = None,
    path: str | None = None,
    seed: int = 0,
    folder: str | os.PathLike | None = None,
    say: Callable[[str], None] = print,
) -> QualityTable:
    """Returns the measures of methods, of a random map and of the image's edges.

    Every map explains the class that the trained network predicts, or `classes`. `folder`: where
    the results of each method are saved, and taken from if nothing has changed. Raises UserError.
    """
    images = subject.normalize(jnp.asarray(subject.pixels))
    goal = targets.make_target(classes, subject.model, subject.variables, images)
    key = jax.random.key(seed)
    cascade = list(quality.randomize(subject.model, subject.variables, images, key))
    chosen = np.unique(np.linspace(0, len(cascade) - 1, POINTS).round().astype(int))
    points = [cascade[i] for i in chosen]
    saved = _SavedScores(folder, _make_digest(subject, images, goal, path, seed))
    scores = {name: found for name in methods if (found := saved.read(name)) is not None}
    if scores:
        say(f"already measured: {', '.join(scores)}")
    to_do = [name for name in methods if name not in scores]
    clock = _Clock(len(to_do) * (1 + len(points) + len(MEASURES)), say)
    for name in to_do:

        def explain(variables: Variables, name: str = name) -> np.ndarray:
            changed = subject._replace(variables=variables)
            return np.asarray(METHODS[name](changed, images, goal, path, key))

        began = time.monotonic()
        try:
            scores[name] = _measure_method(name, subject, images, goal, points, explain, clock)
        except UserError as error:
            scores[name] = MethodScores(np.zeros((0, 0)), {}, str(error))
            clock.total -= 1 + len(points) + len(MEASURES)
            say(f"{name}: not measured: {error}")
            continue
        saved.write(name, scores[name])
        say(f"{name}: {time.monotonic() - began:.1f} s")
    for name, maps in (
        (EDGES, quality.edge_maps(subject.pixels)),
        (RANDOM, quality.random_maps(images, seed)),
    ):
        values = _measure_maps(name, subject, images, goal, maps, clock)
        scores[name] = MethodScores(np.zeros((0, 0)), values)
    ordered = {name: scores[name] for name in (*methods, EDGES, RANDOM)}
    layers = [layer for layer, _ in points]
    return QualityTable(subject.title, layers, ordered, np.asarray(goal.classes))


def _measure_method(
    name: str,
    subject: Subject,
    images: Array,
    goal: Target,
    points: Sequence[tuple[str, Variables]],
    explain: Callable[[Variables], np.ndarray],
    clock: _Clock,
) -> MethodScores:
    trained = explain(subject.variables)
    clock.finish_part(name)
    similarity = []
    for layer, variables in points:
        similarity.append(quality.rank_correlation(trained, explain(variables)))
        clock.finish_part(f"{name}: random from the head to {layer or 'the input'}")
    values = _measure_maps(name, subject, images, goal, trained, clock)
    return MethodScores(np.array(similarity), values)


def _measure_maps(
    name: str, subject: Subject, images: Array, goal: Target, maps: np.ndarray, clock: _Clock
) -> dict[str, np.ndarray]:
    given = (subject.model, subject.variables, images, maps, goal)
    functions: dict[str, Callable[[], np.ndarray]] = {
        "deletion": lambda: quality.deletion(*given, steps=STEPS),
        "insertion": lambda: quality.insertion(*given, steps=STEPS),
        "road": lambda: quality.road(*given).gap,
    }
    values = {}
    for measure in MEASURES:
        values[measure] = functions[measure]()
        clock.finish_part(f"{name}: {measure}")
    return values


class _Clock:
    """Prints what was finished and the time that is left, at most every few seconds."""

    def __init__(self, total: int, say: Callable[[str], None]) -> None:
        self.total, self.done, self.say = total + 2 * len(MEASURES), 0, say
        self.began = self.printed = time.monotonic()

    def finish_part(self, what: str) -> None:
        self.done += 1
        now = time.monotonic()
        if now - self.printed >= _PRINT_EVERY:
            self.printed = now
            left = (now - self.began) / self.done * (self.total - self.done)
            self.say(f"{what}; {self.done} of {self.total} parts, about {left:.0f} s left")


class _SavedScores:
    """One JSON file a method, which is read only if it was written for the same `digest`."""

    def __init__(self, folder: str | os.PathLike | None, digest: str) -> None:
        self.folder = None if folder is None else pathlib.Path(folder)
        self.digest = digest

    def read(self, method: str) -> MethodScores | None:
        if self.folder is None:
            return None
        try:
            content = json.loads((self.folder / f"{method}.json").read_text(encoding="utf-8"))
            if content["digest"] != self.digest:
                return None
            values = {name: np.array(content[name], float) for name in MEASURES}
            return MethodScores(np.array(content["similarity"], float), values)
        except (OSError, ValueError, KeyError, TypeError):
            return None  # absent or damaged: measured again

    def write(self, method: str, scores: MethodScores) -> None:
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {self.folder}: {error.strerror or error}") from None
        content = {"digest": self.digest, "similarity": scores.similarity.tolist()}
        content |= {name: scores.values[name].tolist() for name in MEASURES}
        files.write_json(self.folder / f"{method}.json", content)

    def remove(self, methods: Sequence[str]) -> None:
        """Removes the files of these methods, and the folder if nothing else lies in it."""
        if self.folder is None:
            return
        with contextlib.suppress(OSError):
            for method in methods:
                (self.folder / f"{method}.json").unlink(missing_ok=True)
            self.folder.rmdir()


def _make_digest(subject: Subject, images: Array, goal: Target, path: str | None, seed: int) -> str:
    """Returns a digest of all that the measures depend on."""
    digest = hashlib.sha256(repr((subject.model, path, seed, POINTS, STEPS)).encode())
    digest.update(repr(quality.ROAD_SHARES).encode())
    for name, leaf in sorted(pytree.flatten(subject.variables).items()):
        digest.update(name.encode() + np.asarray(leaf).tobytes())
    digest.update(np.asarray(images).tobytes() + np.asarray(goal.classes).tobytes())
    return digest.hexdigest()


# ---- the table in three forms


def make_rich_table(table: QualityTable) -> Table:
    """Returns the table for a terminal."""
    found = Table(title=f"{table.title}: means over {table.images} images, 95 % intervals")
    head, *rows = _make_cells(table)
    for i, column in enumerate(head):
        found.add_column(column, justify="right" if 0 < i < len(head) - 2 else "left")
    for row in rows:
        found.add_row(*row)
    return found


def format_markdown(table: QualityTable) -> str:
    """Returns the table as a Markdown page."""
    head, *rows = [[cell.replace("|", "\\|") for cell in row] for row in _make_cells(table)]
    lines = [head, ["---", *["---:"] * (len(head) - 3), "---", "---"], *rows]
    return "\n".join(
        [
            f"{table.title}: means over {table.images} images, with 95 % t intervals.",
            "",
            *(f"| {' | '.join(line)} |" for line in lines),
            "",
            "- random head, half, all: Spearman's correlation of the map with the map of the same"
            " network whose head, upper half of the layers, or whole is random. A method that"
            " explains the network is near 0 if all is random.",
            "- deletion (lower is better), insertion and road (higher is better): the class's"
            " probability while pixels are removed or inserted; road is that while the least"
            " salient pixels are removed, minus that while the most salient ones are.",
            f"- better than edges: the paired 95 % interval of the difference to {EDGES} excludes"
            " 0; not corrected for the number of comparisons.",
            "",
        ]
    )


def _make_cells(table: QualityTable) -> list[list[str]]:
    better = ["better than edges", "than a random map"]
    head = ["method", "random head", "half", "all", *MEASURES, *better]
    rows = [head]
    for name, scores in table.scores.items():
        if scores.reason:
            rows.append([f"{name}: {scores.reason}", *[""] * (len(head) - 1)])
            continue
        curve = table.get_similarity(name)
        places = (0, len(curve) // 2, -1) if curve else ()
        similarity = [_format(curve[i], table.images) for i in places] or ["", "", ""]
        means = [_format(table.get_mean(name, measure), table.images) for measure in MEASURES]
        beaten = [
            ""
            if name in (baseline, RANDOM)
            else ", ".join(table.find_beaten(name, baseline)) or "in nothing"
            for baseline in (EDGES, RANDOM)
        ]
        rows.append([name, *similarity, *means, *beaten])
    return rows


def _format(interval: Interval, images: int) -> str:
    text = f"{interval.mean:.3f}"
    if interval.is_known:
        text += f" [{interval.low:.3f}, {interval.high:.3f}]"
    return text if interval.n == images else f"{text} n={interval.n}"


def format_csv(table: QualityTable) -> str:
    """Returns a line per method, measure and point of the cascade; unknown values are empty."""
    text = io.StringIO()
    names = ("mean", "low", "high", "n")
    baselines = {"minus_edges": EDGES, "minus_random": RANDOM}
    differences = [f"{name}{end}" for name in baselines for end in ("", "_low", "_high")]
    columns = ["method", "measure", "random_down_to", *names, *differences, "reason"]
    out = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    out.writeheader()
    for method, scores in table.scores.items():
        if scores.reason:
            out.writerow({"method": method, "reason": scores.reason})
            continue
        for layer, interval in zip(table.layers, table.get_similarity(method)):
            row = {"method": method, "measure": "similarity", "random_down_to": layer or "input"}
            out.writerow(row | _round(dict(zip(names, interval))))
        for measure in MEASURES:
            row = {"method": method, "measure": measure}
            row |= _round(dict(zip(names, table.get_mean(method, measure))))
            for name, baseline in baselines.items():
                if method not in (baseline, RANDOM):
                    found = table.compare(method, baseline, measure)
                    ends = {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}
                    row |= _round(ends)
            out.writerow(row)
    return text.getvalue()


def _round(values: Mapping[str, float]) -> dict[str, str]:
    return {k: f"{v:.6g}" if np.isfinite(v) else "" for k, v in values.items()}
