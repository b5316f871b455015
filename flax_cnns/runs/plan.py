"""What a run will do, known from shapes alone: nothing is written and nothing computed."""

from __future__ import annotations

import pathlib
from typing import Any

import jax

from flax_cnns import config as configs
from flax_cnns.checkpoint.graft import graft as grafting
from flax_cnns.checkpoint.graft.sources import Source, open_source
from flax_cnns.runs import workdir as workdirs
from flax_cnns.runs.build import Parts, assemble, augment_and_mix, dropout_rates
from flax_cnns.runs.train import _Run
from flax_cnns.runtime.preemption import Signals
from flax_cnns.train.writer import import_wandb


def rehearse(
    config: Any, sources: dict[Any, Source] | None = None, *, begun: bool = False
) -> tuple[Parts, int]:
    """What a run of `config` is made of, and its number of steps; shapes only, nothing is computed.

    `sources`: the opened ones of `config.graft`, to which this run's is added; None for a complete
    run, which needs none. Raises `UserError` for what the run would refuse before its first step;
    what only a new run refuses is allowed if `begun`.
    """
    configs.validate(config)
    if not begun:
        configs.refuse(configs.doubts(config))
    parts = assemble(config, begun=begun)
    rehearsed = _Run(parts, pathlib.Path(), workdirs.Opened(), Signals(), 0.0)
    if not begun:
        configs.refuse(rehearsed.doubts())
    params = rehearsed._target().params  # the rules of the optimizer too
    dropout_rates(rehearsed.parts, params)
    augment_and_mix(rehearsed.parts)
    rehearsed.check_norms()
    if sources is not None:
        _check_needs(config, rehearsed.parts, sources)
    return rehearsed.parts, rehearsed.total


def _check_needs(config: Any, parts: Parts, sources: dict[Any, Source]) -> None:
    """Raises `UserError` if wandb is missing, or if the weights of `config.graft` do not fit."""
    if config.log.wandb:
        import_wandb()
    if config.graft.source:
        options = grafting.options_of(config.graft)
        name = config.graft.source, options.averaged
        if name not in sources:
            sources[name] = open_source(config.graft.source, averaged=options.averaged)
        target = jax.eval_shape(parts.fresh_variables)
        grafting.check(sources[name], target, config.graft.rules, options)


def doubts(parts: Parts, fraction: float = 1.0) -> list[str]:
    """`config.doubts` that take the network or the data to know, of a run on so much of these."""
    one = _Run(parts, pathlib.Path(), workdirs.Opened(), Signals(), 0.0)
    one.steps_per_epoch *= fraction
    one.total = one._count(parts.config.train.duration)
    return one.doubts()
