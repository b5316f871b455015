"""`flax-cnns search nas`, by its flags: a search of architectures in the space --space."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

from absl import flags

from flax_cnns.errors import UserError, did_you_mean

FLAGS = flags.FLAGS


def search_nas(config: Any) -> int:
    """Searches the space that --space names."""
    if FLAGS.space not in SPACES:
        near = did_you_mean(FLAGS.space, SPACES) if FLAGS.space else f": {', '.join(SPACES)}"
        raise UserError(f"nas: expected --space, got {FLAGS.space!r}{near}")
    space = SPACES[FLAGS.space]
    for flag in NAS_FLAGS:
        if FLAGS[flag].present and flag not in space.flags:
            takers = [name for name, each in SPACES.items() if flag in each.flags]
            raise UserError(
                f"nas: --space={FLAGS.space} takes no --{flag}; {', '.join(takers)} would"
            )
    for flag in space.required:
        if not FLAGS[flag].value:
            raise UserError(f"nas: expected --{flag} with --space={FLAGS.space}")
    return space.search(config)


def search_layers(config: Any) -> int:
    """Searches filters and skips of each layer, as in Zoph & Le 2016."""
    from flax_cnns.studies.search.nas.layers import forecast, report
    from flax_cnns.studies.search.nas.layers.search import ControllerSettings, search_layers
    from flax_cnns.studies.search.nas.layers.space import LayersSpace

    folder = pathlib.Path(FLAGS.workdir)
    given: dict[str, Any] = {
        name: FLAGS[name].value
        for name in (
            *("controller-rate", "update-every", "child-duration", "dry-run"),
            "accept-changed-data",
        )
    }
    settings = ControllerSettings(
        learning_rate=given["controller-rate"],
        batch_size=given["update-every"],
        entropy=FLAGS.entropy,
    )
    shared: dict[str, Any] = dict(
        space=LayersSpace(FLAGS.layers, FLAGS.skips, FLAGS.strides),
        method=FLAGS.method,
        trials=64 if FLAGS.trials is None else FLAGS.trials,
        child_duration=given["child-duration"],
        jobs=FLAGS.jobs,
    )
    if given["dry-run"]:
        forecast.show_plan(config, folder, **shared)
        return 0
    accept = given["accept-changed-data"]
    seeds = FLAGS.seeds or 3
    search_layers(
        config, folder, **shared, settings=settings, seeds=seeds, accept_changed_data=accept
    )
    print(f"written to {folder}: {', '.join(report.write(folder))}")
    return 0


def search_cells(config: Any) -> int:
    """Searches the table of all cells of NAS-Bench-201's kind, or makes the table."""
    from flax_cnns.studies.search.nas.cells import regret, report, table

    folder = pathlib.Path(FLAGS.workdir)
    if FLAGS.table:
        if not FLAGS["data-dir"].value:
            raise UserError("nas: expected --data-dir, the folder of Fashion-MNIST, with --table")
        path = table.make_table(folder, pathlib.Path(FLAGS["data-dir"].value))
        print(f"written to {path}")
        return 0
    if FLAGS["data-dir"].present:
        raise UserError("nas: --data-dir is for --table; a search of cells reads the table")
    own = folder / "table.json"
    cells = table.read_table(own if own.exists() else None)
    comparison = regret.compare_searchers(
        cells,
        folder,
        evaluations=50 if FLAGS.trials is None else FLAGS.trials,
        seeds=FLAGS.seeds or 20,
    )
    names = report.write_report(comparison, folder)
    print((folder / "cells.md").read_text())
    print(f"written to {folder}: {', '.join(names)}")
    return 0


class NasSpace(NamedTuple):
    """A space of architectures."""

    search: Callable[[Any], int]  # takes the config; returns the exit code
    flags: tuple[str, ...]  # that it takes, besides workdir and space
    required: tuple[str, ...] = ()


SPACES: dict[str, NasSpace] = {
    "layers": NasSpace(
        search_layers,
        (
            *("config", "method", "trials", "seeds", "jobs", "layers", "skips", "strides"),
            *("child-duration", "controller-rate", "update-every", "entropy", "dry-run"),
            "accept-changed-data",
        ),
        required=("config",),
    ),
    "cells": NasSpace(search_cells, ("table", "data-dir", "trials", "seeds")),
}
NAS_FLAGS = tuple(dict.fromkeys(flag for space in SPACES.values() for flag in space.flags))
