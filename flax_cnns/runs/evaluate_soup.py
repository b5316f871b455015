"""Averages the weights of several runs or checkpoints, and evaluates the network that results.

evaluate_soup(["runs/a@best", "runs/b@best"], "greedy", save="runs/soup")
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.table import Table

from flax_cnns import config as configs
from flax_cnns import files
from flax_cnns import tree as pytree
from flax_cnns.checkpoint import manager
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.evaluation import uncertainty
from flax_cnns.evaluation.ensembles import PairedDifference, compare_accuracy
from flax_cnns.evaluation.exact import summarize
from flax_cnns.evaluation.soups import (
    SOUPS,
    Soup,
    Taste,
    check_same_shapes,
    make_greedy_soup,
    make_uniform_soup,
)
from flax_cnns.names import make_console
from flax_cnns.runs import reestimation, tables
from flax_cnns.runs.classifier import (
    Classifier,
    check_split,
    make_classifier_from_run,
    predict_split,
)
from flax_cnns.runs.evaluate import measure_predictions
from flax_cnns.runs.evaluate_ensemble import describe_difference, format_points
from flax_cnns.runs.load import LoadedRun, load_run
from flax_cnns.runs.members import check_members, choose_members_file
from flax_cnns.runtime import output
from flax_cnns.types import PyTree

IMAGES = 2048  # for the statistics of BatchNorm
_HELD_OUT = "validation"


class Ingredient(NamedTuple):
    """A checkpoint that may go into a soup."""

    name: str  # as the user named it
    step: int
    checkpoint: str  # why this checkpoint
    score: float  # its own, in 0..1


@output.safe()
def evaluate_soup(
    runs: Sequence[str | os.PathLike],
    recipe: str = "greedy",
    *,
    split: str = "test",
    save: str | os.PathLike = "",
    images: int = IMAGES,
    accept_changed_data: bool = False,
    trust: bool = False,
) -> dict[str, Any]:
    """Averages weights of one network, and evaluates it beside the best ingredient.

    `runs`: RUN, RUN@best, RUN@latest or RUN@STEP of the same network; averaged weights (EMA) where
    a run evaluates them. `recipe`: "uniform" averages all. "greedy" goes from the best ingredient
    on, and keeps those with which the accuracy on the validation split is not worse. The statistics
    of BatchNorm are re-estimated for each average on the first training batches of the first run,
    at least `images` images. All networks read the first run's data.

    Writes `evaluation_SPLIT_STEP_soupN_RECIPE.json` into the first run's directory and returns its
    content; a file about other members is kept, and the name gets `_2`. `save`: a new folder
    for the soup, which `evaluate`, `predict`, `graft.source` and `load_run` take like a run's.

    Raises UserError, also for another network (with path and shapes), for other classes or
    preprocessing, for a greedy soup without a validation split, and on several processes.
    """
    if recipe not in SOUPS:
        near = did_you_mean(recipe, SOUPS)
        raise UserError(f"--soup: expected {' or '.join(SOUPS)}, got {recipe!r}{near}")
    names = [os.fspath(run) for run in runs]
    check_members(names, 1, "--ensemble")
    if save:
        manager.check_new_folder(save)
    kitchen = _Kitchen(names, split, recipe, images, accept_changed_data, trust)
    soup = kitchen.cook()
    results, difference = kitchen.evaluate(soup, split)
    run = kitchen.first.run
    assert run is not None
    stem = f"evaluation_{split}_{run.step}_soup{len(names)}_{recipe}"
    path = choose_members_file(run.folder, stem, results["protocol"]["members"])
    files.write_json(path, results)
    kitchen.print_soup(soup, results, difference)
    print(f"written to {run.folder}: {path.name}")
    if save:
        step = max(each.step for each in kitchen.ingredients)
        print(f"saved: {save_soup(save, run.folder, soup.variables, step, results['protocol'])}")
    return results


class _Kitchen:
    """The first run's network and data, and the ingredients, one of which is in memory."""

    def __init__(
        self,
        names: Sequence[str],
        split: str,
        recipe: str,
        images: int,
        accept_changed_data: bool,
        trust: bool,
    ):
        self.names, self.recipe, self.trust = names, recipe, trust
        self.first = make_classifier_from_run(
            names[0], accept_changed_data=accept_changed_data, trust=trust
        )
        if jax.process_count() > 1:
            raise UserError("--soup: weights are averaged in one process; start one")
        run, dataset = self.first.run, self.first.dataset
        assert run is not None
        assert dataset is not None
        self.components = run.components
        check_split(dataset, split)
        self.held_out = _HELD_OUT if _HELD_OUT in dataset.splits else split
        if recipe == "greedy" and _HELD_OUT not in dataset.splits:
            raise UserError(
                f"--soup=greedy chooses by a validation split, which {dataset.name} lacks; train"
                " with data.validation, or take --soup=uniform"
            )
        self.refresh = self._make_refresh(images)
        self.ingredients: list[Ingredient] = []
        shapes = jax.eval_shape(lambda: pytree.unstack_blocks(self.first.variables))
        for number in range(len(names)):
            loaded, variables = self.load(number)
            given = (pytree.flatten(shapes), pytree.flatten(variables))
            check_same_shapes(*given, names[0], names[number])
            score = self.measure(variables)
            self.ingredients.append(
                Ingredient(names[number], loaded.step, loaded.checkpoint, score)
            )
            print(f"{number + 1}/{len(names)}: {names[number]}: {score:.2%} on {self.held_out}")

    def _make_refresh(self, images: int) -> Callable[[PyTree], PyTree]:
        modes = reestimation.find_updated_layers(self.components, self.first.variables)
        self.images = 0  # of the re-estimation
        if "train" not in modes.values():
            why = "keeps the statistics of BatchNorm" if modes else "has no BatchNorm"
            print(f"{self.names[0]} {why}: nothing is re-estimated")
            return lambda variables: variables
        if len(self.names) == 1:
            return lambda variables: variables
        reestimate, self.images = reestimation.make_reestimation(self.components, modes, images)
        print(f"BatchNorm: re-estimated on {self.images:,} training images for each average")

        def refresh(variables: PyTree) -> PyTree:
            found = reestimate(self.components.stack_if_scanned(variables))
            return pytree.unstack_blocks(found)

        return refresh

    def load(self, number: int) -> tuple[LoadedRun, PyTree]:
        """Returns an ingredient, and its variables with named blocks. Raises UserError."""
        name = self.names[number]
        loaded = load_run(name, trust=self.trust)
        _check_reading(self.names[0], self.first, name, loaded)
        return loaded, pytree.unstack_blocks(jax.device_get(loaded.variables))

    def measure(self, variables: PyTree) -> float:
        """Returns the share of the held-out images whose class, or whose labels, are right."""
        found = summarize(self.components.evaluate(variables, self.held_out))
        return found["subset_accuracy" if self.first.task == "multilabel" else "accuracy"]

    def cook(self) -> Soup:
        """Returns the soup, with named blocks."""
        if self.recipe == "uniform":
            loaded = ((name, self.load(number)[1]) for number, name in enumerate(self.names))
            return make_uniform_soup(loaded, refresh=self.refresh)

        def say(taste: Taste) -> None:
            word = "kept" if taste.kept else "left out"
            print(f"with {self.names[taste.ingredient]}: {taste.score:.2%}, {word}")

        return make_greedy_soup(
            lambda number: (self.names[number], self.load(number)[1]),
            [each.score for each in self.ingredients],
            self.measure,
            refresh=self.refresh,
            say=say,
        )

    @property
    def best(self) -> int:
        """The number of the ingredient with the highest score."""
        return max(range(len(self.names)), key=lambda i: self.ingredients[i].score)

    def evaluate(self, soup: Soup, split: str) -> tuple[dict[str, Any], PairedDifference]:
        """Returns (content of the file, difference to the best ingredient) on a split."""

        def predict(variables: PyTree) -> Any:
            placed = self.components.stack_if_scanned(variables)
            return predict_split(self.first._replace(variables=placed), split)

        found = predict(soup.variables)
        best = predict(self.load(self.best)[1])
        difference = compare_accuracy(
            uncertainty.find_correct(found), uncertainty.find_correct(best)
        )
        run = self.first.run
        assert run is not None
        tastes = {taste.ingredient: taste for taste in soup.tastes}
        members = [
            {
                "run": each.name,
                "step": each.step,
                "checkpoint": each.checkpoint,
                self.held_out: each.score,
                "kept": number in soup.kept,
                **({"with": tastes[number].score} if number in tastes else {}),
            }
            for number, each in enumerate(self.ingredients)
        ]
        results = {
            "split": split,
            "step": run.step,
            "checkpoint": run.checkpoint,
            "examples": len(found.logits),
            **measure_predictions(self.first, found),
            "difference": describe_difference(difference, self.names[self.best]),
            "protocol": {
                "soup": self.recipe,
                "members": members,
                "batchnorm_images": self.images if len(soup.kept) > 1 else 0,
            },
            **({"changed_data": run.changed_data} if run.changed_data else {}),
        }
        return results, difference

    def print_soup(self, soup: Soup, results: dict[str, Any], difference: PairedDifference) -> None:
        console = make_console(width=max(tables.MIN_WIDTH, make_console().width))
        table = Table(title=f"{self.recipe} soup of {len(soup.kept)} of {len(self.names)}")
        for column in ("run", "step", f"{self.held_out} accuracy", "in the soup"):
            table.add_column(column, justify="left" if column == "run" else "right")
        for number, each in enumerate(self.ingredients):
            kept = "yes" if number in soup.kept else "no"
            table.add_row(each.name, str(each.step), f"{each.score:.2%}", kept)
        console.print(table)
        split, count = results["split"], results["examples"]
        console.print(f"the soup on {split}, {count:,} images:")
        for name, value in results.items():
            if isinstance(value, int | float) and name not in ("step", "examples"):
                console.print(f"{name} {tables.describe_value(name, value, results['intervals'])}")
        points = format_points(difference.difference, difference.interval)
        console.print(
            f"against {self.names[self.best]}, the best on {self.held_out}: {points} points,"
            f" p {difference.p:.2g}"
        )
        if split == self.held_out and self.recipe == "greedy":
            console.print(f"note: {split} chose the soup, so its accuracy there is too good")


def _check_reading(first_name: str, first: Classifier, name: str, loaded: LoadedRun) -> None:
    """Raises UserError unless a run has the classes and the preprocessing of the first."""
    dataset = first.dataset
    assert dataset is not None
    ours, theirs = list(first.class_names), list(loaded.class_names)
    if ours != theirs:
        pair = next(((a, b) for a, b in zip(ours, theirs) if a != b), None)
        what = f"the class {pair[1]!r} where" if pair else f"{len(theirs)} classes, but"
        has = f"has {pair[0]!r}" if pair else f"has {len(ours)}"
        raise UserError(f"{name} has {what} {first_name} {has}; a soup needs the same classes")
    for what in ("image_shape", "mean", "std", "normalize"):
        one, two = getattr(dataset, what), getattr(loaded.dataset, what)
        if not np.allclose(one, two, rtol=1e-4):
            raise UserError(
                f"{name} was trained with {what} {two}, {first_name} with {one}: a soup reads"
                " images in one way"
            )


# ---------------------------------------------------------------------------- saving


def save_soup(
    folder: str | os.PathLike,
    run: pathlib.Path,
    variables: PyTree,
    step: int,
    protocol: dict[str, Any],
) -> pathlib.Path:
    """Writes variables with named blocks as a folder that is read like a run's; returns its path.

    `run`: the run whose network and data they have. The folder has its config, without averaged
    weights, its facts about the data and its own parts, one checkpoint, and `soup.json` with the
    `protocol`. It cannot be trained further, but `config.graft.source` takes it. The folder appears
    only when it is complete. Raises UserError if it exists.
    """
    out = manager.check_new_folder(folder)
    partial = out.with_name(f"{out.name[:50]}.{os.getpid()}.partial")
    try:
        manager.write_tree(partial / "checkpoints" / str(step), variables, {"soup": protocol})
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
        config["train"]["ema"] = 0.0
        files.write_json(partial / "config.json", configs.reset_inert_fields(config))
        for name in ("dataset.json", "own.json"):
            if (run / name).is_file():
                shutil.copyfile(run / name, partial / name)
        files.write_json(partial / "soup.json", protocol)
        partial.rename(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out
