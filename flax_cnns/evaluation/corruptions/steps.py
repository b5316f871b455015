"""Prediction of corrupted images on several devices."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from flax_cnns.data.augment import is_float
from flax_cnns.errors import UserError
from flax_cnns.evaluation.corruptions.table import Corruption, corrupt
from flax_cnns.evaluation.predictions import PredictStep
from flax_cnns.types import Array, Batch, PyTree


def make_corrupted_step(
    predict_step: PredictStep, corruption: Corruption, mesh: Mesh
) -> Callable[[PyTree, int], PredictStep]:
    """Returns `at(constants, seed) -> step`: `predict_step` after the corruption with the constants
    of one severity (`table.pick_severity`).

    The network is compiled once for all corruptions, and a corruption once for all severities. The
    step raises UserError for float images: corruptions are defined for values 0 to 255.
    """
    axis = mesh.axis_names[0]
    mapped = jax.jit(
        jax.shard_map(
            functools.partial(corrupt, corruption),
            mesh=mesh,
            in_specs=(P(axis), P(axis), P(), P()),
            out_specs=P(axis),
            check_vma=False,
        )
    )

    def at(constants: PyTree, seed: int) -> PredictStep:
        def step(variables: PyTree, batch: Batch) -> Array:
            images = batch["image"]
            if is_float(images):
                raise UserError(
                    "corruptions are defined for images of 8 bits, with values 0 to 255; these are"
                    " floats; give the data as u8 arrays"
                )
            corrupted = mapped(images, batch["number"], constants, seed)
            return predict_step(variables, {**batch, "image": corrupted})

        return step

    return at
