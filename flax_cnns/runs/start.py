"""How a run starts: restored, grafted or fresh."""

from __future__ import annotations

import pathlib

import jax

from flax_cnns import files
from flax_cnns.checkpoint.graft.graft import graft_from_config
from flax_cnns.checkpoint.manager import Checkpoints
from flax_cnns.runs.plan import RunPlan
from flax_cnns.train import loop, parallel
from flax_cnns.train.state import TrainState


def make_initial_state(
    plan: RunPlan, checkpoints: Checkpoints, workdir: pathlib.Path
) -> tuple[TrainState, loop.HostState, int, list[str]]:
    """Returns (state, host state, step, digests) that a session starts with.

    The state is the first available of:

    1. Restore: this run's newest intact checkpoint, all of it.
    2. Graft: the weights that `config.graft` takes from its source.
    3. Fresh: the network's initial values, from the seed alone.

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
    variables = components.init_variables()
    if config.graft.source:
        variables, grafted = graft_from_config(config.graft, variables, plan.layer_order)
        if jax.process_index() == 0:
            print(grafted)
            files.write_json(workdir / "graft.json", grafted.as_dict())
    # The optimizer's state and the averaged weights.
    variables = components.stack_if_scanned(variables)
    opt_state = plan.make_optimizer(variables).init(variables["params"])
    state = TrainState.create(variables, opt_state, ema=config.train.ema > 0)
    return parallel.replicate(state, components.mesh), loop.HostState(), 0, []
