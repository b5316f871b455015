"""`flax-cnns search nas`, by its flags: a search of architectures in the space --space."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

from absl import flags

from flax_cnns.errors import UserError, did_you_mean

FLAGS = flags.FLAGS


def search_nas(config: Any) -> int:
    """Searches the space that --space names."""
    if FLAGS.space not in SPACES:
        near = did_you_mean(FLAGS.space, SPACES) if FLAGS.space else f": {', '.join(SPACES)}"
        raise UserError(f"nas: expected --space, got {FLAGS.space!r}{near}")
    return SPACES[FLAGS.space](config)


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


SPACES: dict[str, Callable[[Any], int]] = {"layers": search_layers}
