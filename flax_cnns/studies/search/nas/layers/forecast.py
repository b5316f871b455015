"""Forecasts what a search of layers costs. Writes nothing."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict

from flax_cnns.analysis.cost import cost
from flax_cnns.models.registry import create_model
from flax_cnns.runs import child
from flax_cnns.runs.plan import dry_run
from flax_cnns.studies.ablation.forecast import time_steps
from flax_cnns.studies.ablation.plan import SweepRow
from flax_cnns.studies.search.nas.layers.children import make_child_config
from flax_cnns.studies.search.nas.layers.search import make_model_fields
from flax_cnns.studies.search.nas.layers.space import MODEL, LayersSpace
from flax_cnns.studies.search.nas.layers.trials import METHODS, read_trials
from flax_cnns.train.progress import format_duration

DRAWN = 20  # networks whose sizes are counted


def show_plan(
    config: ConfigDict,
    folder: str | os.PathLike,
    *,
    space: LayersSpace,
    method: str = "controller",
    trials: int = 64,
    child_duration: str = "",
    jobs: int | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Prints the size of the space and of its networks, and how long the trials will take.

    The time is that of the trials that are known. If there are none, a few steps of one network are
    timed. Raises UserError for everything that a child would refuse before its first step.
    """
    drawn = [space.draw_uniformly(config.seed, number) for number in range(DRAWN)]
    first = make_child_config(config, child_duration, make_model_fields(space, drawn[0]))
    components, steps = dry_run(first, {})
    shape = components.dataset.image_shape
    costs = []
    for decisions in drawn:
        fields = {"num_classes": components.num_classes, "input_size": shape}
        model = create_model(MODEL, **fields, **space.make_fields(decisions))
        costs.append(cost(model, (1, *shape), train=False))
    params, macs = ([getattr(each, name) for each in costs] for name in ("params", "macs"))
    say(
        f"{space.count_networks():.3g} networks of {space.layers} layers; {DRAWN} random ones have"
        f" {min(params):,} to {max(params):,} parameters, {np.mean(macs) / 1e6:.1f} million MACs on"
        " average"
    )
    known = {name: read_trials(folder, name) for name in METHODS}
    left = max(trials - len(known[method]), 0)
    seconds = [t.seconds for found in known.values() for t in found if t.seconds]
    slots = child.make_device_slots(jobs)
    if seconds:
        each, basis = float(np.mean(seconds)), f"from the {len(seconds)} known trials"
    else:
        per_image, rest = time_steps(SweepRow("first", {}, first), slots[0])
        images = steps * first.data.batch_size * np.mean(macs) / max(macs[0], 1)
        each = rest + per_image * float(images)
        basis = "from a few steps of one network, by MACs, without validations"
    total = format_duration(left * each / len(slots))
    say(
        f"{method}: {trials - left} of {trials} trials are known; {steps} steps each, {len(slots)}"
        f" at once; about {total} left, {each:.0f} s each ({basis}); then the final runs"
    )
