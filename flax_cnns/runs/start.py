"""How a run starts: restored, grafted or fresh."""

from __future__ import annotations

import contextlib
import itertools
import pathlib
from collections.abc import Collection

import jax
import jax.numpy as jnp
import numpy as np

from flax_cnns import files, layers
from flax_cnns import tree as pytree
from flax_cnns.analysis import activations
from flax_cnns.checkpoint.graft.graft import graft_from_config
from flax_cnns.checkpoint.graft.report import GraftReport
from flax_cnns.checkpoint.manager import Checkpoints
from flax_cnns.data import augment, pipeline
from flax_cnns.errors import UserError
from flax_cnns.runs.build import RunComponents
from flax_cnns.runs.network import LSUV
from flax_cnns.runs.plan import RunPlan
from flax_cnns.train import loop, parallel
from flax_cnns.train.state import TrainState
from flax_cnns.types import PyTree


def make_initial_state(
    plan: RunPlan, checkpoints: Checkpoints, workdir: pathlib.Path
) -> tuple[TrainState, loop.HostState, int, list[str]]:
    """Returns (state, host state, step, digests) that a session starts with.

    The state is the first available of:

    1. Restore: this run's newest intact checkpoint, all of it.
    2. Graft: the weights that `config.graft` takes from its source.
    3. Fresh: the network's initial values, from the seed alone; with `model.init = "lsuv"` and
       `model.whiten` from the seed and the run's first batches.

    A graft may leave some weights fresh. The optimizer's state and the averaged weights are created
    after the graft, so they start from the grafted weights. The digests, one for each process,
    identify the batch of that step; the list is empty unless the data are `Dataset.from_batches`.
    Raises UserError.
    """
    components, config = plan.components, plan.config
    # 1. Restore.
    if checkpoints.latest_step() is not None:
        restored = checkpoints.restore(plan.make_abstract_state())
        if restored is not None:
            state, saved, step = restored
            digests = saved.pop("next_batch", [])
            return state, loop.HostState(**saved), step, digests
    # 2. and 3. Initialize, then graft over the fresh values.
    variables, grafted = make_initial_variables(plan)
    if grafted is not None and jax.process_index() == 0:
        print(grafted)
        files.write_json(workdir / "graft.json", grafted.as_dict())
    # The optimizer's state and the averaged weights.
    variables = components.stack_if_scanned(variables)
    opt_state = plan.make_optimizer(variables).init(variables["params"])
    state = TrainState.create(variables, opt_state, ema=config.train.ema > 0)
    return parallel.replicate(state, components.mesh), loop.HostState(), 0, []


def make_initial_variables(plan: RunPlan) -> tuple[PyTree, GraftReport | None]:
    """Returns (the variables, with named blocks, that a new run of this plan starts with, the
    report of the graft if there is one).

    Every process and any number of devices compute the same values. Raises UserError.
    """
    components, config = plan.components, plan.config
    variables, grafted = components.init_variables(), None
    if config.graft.source:
        variables, grafted = graft_from_config(config.graft, variables, plan.layer_order)
    if config.model.whiten:
        variables = _whiten(components, variables, grafted.grafted if grafted else ())
    if config.model.init == LSUV:
        variables = _scale_by_lsuv(components, variables, grafted.grafted if grafted else ())
    return variables, grafted


MAX_LSUV_IMAGES = 256
MAX_WHITEN_IMAGES = 5000
WHITEN = "whiten/kernel"


def _read_first_images(components: RunComponents, count: int, field: str) -> jax.Array:
    """Returns the first images of a run, f32 [N H W C], normalized as in training but not augmented
    on the device."""
    config, dataset = components.config, components.dataset
    if dataset.is_stream:
        raise UserError(
            f"{field} reads the first batches before training, which {dataset.name}, made by"
            " Dataset.from_batches, does not allow"
        )
    # All rows of the global batches, also on each of several processes.
    batches = pipeline.train_batches(dataset, config.data, seed=config.seed)
    with contextlib.closing(batches):
        number = -(-count // config.data.batch_size)
        images = np.concatenate([batch["image"] for batch in itertools.islice(batches, number)])
    normalize = augment.make_normalize(config.data.augment, mean=dataset.mean, std=dataset.std)
    return normalize(jnp.asarray(images[:count]))


def _whiten(components: RunComponents, variables: PyTree, grafted: Collection[str]) -> PyTree:
    """Fills the kernel of the layer "whiten" with `layers.make_whitening_kernel` of the run's first
    `MAX_WHITEN_IMAGES` images, unless the kernel is grafted."""
    params = pytree.flatten(variables["params"])
    if WHITEN not in params:
        raise UserError(
            f"model.whiten: {components.config.model.name} has no layer named whiten; airbench94"
            " has one"
        )
    if f"params/{WHITEN}" in grafted:
        return variables
    kernel = params[WHITEN]
    count = min(MAX_WHITEN_IMAGES, len(components.dataset.splits["train"]))
    images = _read_first_images(components, count, "model.whiten")
    filters = layers.make_whitening_kernel(np.asarray(images), kernel.shape[0])
    if filters.shape != kernel.shape:
        raise UserError(
            f"model.whiten: {WHITEN} is {list(kernel.shape)}, but whitening filters are"
            f" {list(filters.shape)}: each filter and its negative"
        )
    params[WHITEN] = jnp.asarray(filters, kernel.dtype)
    return {**variables, "params": pytree.unflatten(params)}


def _scale_by_lsuv(
    components: RunComponents, variables: PyTree, grafted: Collection[str]
) -> PyTree:
    """Applies `activations.lsuv` to the layers that have no grafted weights.

    The images are the run's first batch, at most its first `MAX_LSUV_IMAGES`, normalized as in
    training but not augmented on the device. BatchNorm uses the statistics of the batch, as in
    training.
    """
    config = components.config
    images = _read_first_images(
        components, min(MAX_LSUV_IMAGES, config.data.batch_size), "model.init: lsuv"
    )
    kept = {path.removeprefix("params/").rpartition("/")[0] for path in grafted}
    params = pytree.flatten(variables["params"])
    layers = {path.rpartition("/")[0] for path in params} - kept
    key = jax.random.fold_in(jax.random.key(config.seed), 2)
    try:
        return activations.lsuv(components.model, variables, images, key=key, layers=layers)
    except UserError as error:
        raise UserError(f"model.init: {error}, or choose another initializer, such as he") from None
