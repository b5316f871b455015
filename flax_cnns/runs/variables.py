"""The variables with which a run is evaluated, and the names of its logits."""

from __future__ import annotations

import os

import jax

from flax_cnns.checkpoint import finding, reading
from flax_cnns.data.types import Dataset
from flax_cnns.runs.build import RunComponents
from flax_cnns.types import PyTree


def list_class_names(dataset: Dataset, width: int) -> list[str]:
    """Returns the names of all logits: a head may have more classes than the data set."""
    return [*dataset.class_names, *map(str, range(len(dataset.class_names), width))]


def load_variables(
    components: RunComponents, workdir: str | os.PathLike, checkpoint: str = ""
) -> tuple[PyTree, finding.StepChoice]:
    """Returns (the variables with which the run is evaluated, the chosen checkpoint).

    The variables have named blocks, and are the averaged weights if the run has them. `checkpoint`:
    best, latest, a step, or "" (see `finding.choose_step`). Reads only the needed arrays. Raises
    UserError.
    """
    source = finding.find_step_arrays(workdir, checkpoint)
    sharding = jax.sharding.NamedSharding(components.mesh, jax.sharding.PartitionSpec())
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(components.init_variables),
    )
    if components.config.train.ema > 0:
        variables = reading.read_tree(source, {"ema": target})["ema"]
    else:
        variables = reading.read_tree(source, target)
    return variables, finding.choose_step(workdir, checkpoint)
