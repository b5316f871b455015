"""Picture of the image patches that excite units most, and what the deconvnet finds in them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_cnns.analysis.explain.backward_rules import UndefinedRule, deconvnet
from flax_cnns.analysis.explain.gradients import gradient
from flax_cnns.analysis.explain.targets import Feature
from flax_cnns.analysis.explain.top_units import TopImages, cut_patches, find_top_images
from flax_cnns.analysis.plots import patches as plots
from flax_cnns.analysis.receptive_field import (
    ReceptiveField,
    explain_missing_fields,
    find_receptive_fields,
)
from flax_cnns.runs.subject import Subject
from flax_cnns.types import Array

COUNT = 9  # patches of a unit
_EVERY = 2000  # images between lines of progress


def draw_patches(
    subject: Subject,
    png: str | os.PathLike,
    path: str,
    units: Sequence[int],
    *,
    say: Callable[[str], None] = print,
) -> list[TopImages]:
    """Draws the patches of the nine images that excite each unit of the module `path` most.

    The images are the whole split of a run, or photos. The deconvnet's picture of each activation
    is drawn to the right; it is the gradient's if the deconvnet is not defined for the network.
    Returns the images. Raises UserError.
    """
    subject.check_images()
    labels: list[Any] = []
    with contextlib.closing(_read_batches(subject, labels, say)) as batches:
        tops = find_top_images(
            subject.model,
            subject.variables,
            batches,
            path,
            units,
            normalize=subject.normalize,
            count=COUNT,
        )
    image = subject.normalize(jnp.asarray(subject.pixels[:1]))
    given = subject.model, subject.variables, image
    field = find_receptive_fields(*given)[path]
    if field is None:
        say(f"{path} has no receptive field: {explain_missing_fields(*given)[path]}; whole images")
    else:
        say(f"{path} sees {field.size[0]}x{field.size[1]} pixels at each position")
    method, name = _choose_method(subject, _make_goal(path, tops[0], field), tops[0], say)
    rows = []
    for top in tops:
        inputs, goal = subject.normalize(jnp.asarray(top.images)), _make_goal(path, top, field)
        found = np.asarray(method(subject.model, subject.variables, inputs, goal), np.float32)
        rows.append(
            plots.UnitPatches(
                f"unit {top.unit}" + _note_dead(top),
                cut_patches(top.images, top.positions, field),
                cut_patches(found, top.positions, field, border=0.0),
            )
        )
        say(_describe(subject, top, labels))
    plots.draw_patches(rows, name, png, f"{subject.title}: {path or 'logits'}")
    return tops


def _read_batches(
    subject: Subject, labels: list[Any], say: Callable[[str], None]
) -> Generator[tuple[np.ndarray, np.ndarray]]:
    """Yields (pixels, mask), and appends the label of each image to `labels`."""
    if subject.open_split is None:
        yield subject.pixels, np.ones(len(subject.pixels))
        return
    with contextlib.closing(subject.open_split()) as batches:
        for batch in batches:
            yield batch["image"], batch["mask"]
            before = len(labels)
            labels += [label for label, mask in zip(batch["label"], batch["mask"]) if mask]
            if before // _EVERY < len(labels) // _EVERY:
                say(f"{len(labels)} images seen")


def _make_goal(path: str, top: TopImages, field: ReceptiveField | None) -> Feature:
    return Feature(path, top.unit, None if field is None else top.positions)


def _choose_method(
    subject: Subject, goal: Feature, top: TopImages, say: Callable[[str], None]
) -> tuple[Callable[..., Array], str]:
    """Returns the deconvnet and its name, or the gradient if the network has another activation."""
    images = subject.normalize(jnp.asarray(top.images))
    try:
        jax.eval_shape(lambda x: deconvnet(subject.model, subject.variables, x, goal), images)
    except UndefinedRule as error:
        say(f"{str(error).partition(':')[0]}: the gradient is drawn instead of the deconvnet")
        return gradient, "gradient"
    return deconvnet, "deconvnet"


def _describe(subject: Subject, top: TopImages, labels: Sequence[Any]) -> str:
    names = [subject.name_label(labels[n]) if labels else subject.names[n] for n in top.numbers]
    images = ", ".join(f"{n} ({name})" for n, name in zip(top.numbers, names))
    highest, lowest = top.activations[0], top.activations[-1]
    name = f"unit {top.unit}{_note_dead(top)}"
    return f"{name}: activations {highest:.4g} to {lowest:.4g}; images {images}"


def _note_dead(top: TopImages) -> str:
    """Returns a note if all images leave the unit at 0 or below: its patches mean nothing then."""
    return "" if top.activations[0] > 0 else " (never above 0)"
