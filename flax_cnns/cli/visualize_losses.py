"""The kinds of `visualize` that look at the loss around a run's weights, by its flags."""

from __future__ import annotations

from typing import Any

from absl import flags

FLAGS = flags.FLAGS


def _make_settings() -> Any:
    from flax_cnns.runs.visualize.loss import Settings

    return Settings(
        split=FLAGS.split if FLAGS["split"].present else "train",
        images=FLAGS.images if FLAGS["images"].present else 512,
        grid=FLAGS.grid,
        batchnorm=FLAGS.batchnorm,
        seed=FLAGS.seed,
        trust=FLAGS.trust,
        accept=bool(FLAGS["accept-changed-data"].value),
    )


def draw_landscape(subject: None, out: str, photos: list[str]) -> None:
    """Draws the loss on planes around the runs' weights."""
    from flax_cnns.runs.visualize.landscape import draw_landscape

    runs = [FLAGS.workdir, *FLAGS.beside]
    draw_landscape(runs, out, _make_settings(), span=FLAGS.span, surface=FLAGS.surface)


def draw_line(subject: None, out: str, photos: list[str]) -> None:
    """Draws the loss on the line between two runs."""
    from flax_cnns.runs.visualize.landscape import draw_line

    splits = FLAGS.split.split(",") if FLAGS["split"].present else ()
    draw_line(FLAGS.workdir, FLAGS.to, out, _make_settings(), splits=splits)


def draw_trajectory(subject: None, out: str, photos: list[str]) -> None:
    """Draws a run's path over the loss."""
    from flax_cnns.runs.visualize.landscape import draw_trajectory

    draw_trajectory(FLAGS.workdir, out, _make_settings())


def tabulate_curvature(subject: None, out: str, photos: list[str]) -> None:
    """Writes the table of eigenvalues and sharpness."""
    from flax_cnns.runs.visualize.landscape import tabulate_curvature

    runs = [FLAGS.workdir, *FLAGS.beside]
    tabulate_curvature(runs, out, _make_settings(), count=FLAGS.eigenvalues, rho=FLAGS.rho)
