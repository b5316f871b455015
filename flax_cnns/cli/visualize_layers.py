"""Reads the flags of the kinds `activations`, `initialization` and `patches` of `visualize`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from absl import flags

from flax_cnns.errors import UserError

if TYPE_CHECKING:
    from flax_cnns.runs.subject import Subject


def draw_activations(subject: None, out: str, photos: list[str]) -> None:
    from flax_cnns.runs.visualize import activations

    given = flags.FLAGS
    specimen = activations.make_specimen(
        workdir=given.workdir,
        config=given.config,
        model=given.model,
        weights=given.weights,
        init=given.init,
        photos=photos,
        split=given.split,
        count=given.images if given["images"].present else None,
        trust=given.trust,
        accept=bool(given["accept-changed-data"].value),
        seed=given.seed,
    )
    paths = given.path.split(",") if given.path else None
    mode: Any = given.batchnorm if given["batchnorm"].present else None
    table = activations.draw_activations(specimen, out, paths=paths, batchnorm=mode)
    print(f"all numbers: {table}")


def draw_initialization(subject: None, out: str, photos: list[str]) -> None:
    from flax_cnns.runs.visualize.initialization import draw_initialization

    given = flags.FLAGS
    draw_initialization(
        out,
        layers=given.layers,
        width=given.width,
        as_printed=bool(given["as-printed"].value),
        seed=given.seed,
    )


def draw_patches(subject: Subject, out: str, photos: list[str]) -> None:
    from flax_cnns.runs.visualize.patches import draw_patches

    try:
        units = [int(unit) for unit in flags.FLAGS.units]
    except ValueError:
        raise UserError(f"--units: expected whole numbers, got {flags.FLAGS.units}") from None
    draw_patches(subject, out, flags.FLAGS.path, units)
