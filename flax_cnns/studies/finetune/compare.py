"""Compares strategies of transfer learning on targets near and far, with much and little data.

A strategy makes phases from a target's config. Each phase is a run (`flax_cnns.run`) in its own
directory. It starts from the previous phase; the first phase starts from the source. The lecture's
advice "never load a layer when a layer below was skipped" is tested too: `upper_only` violates it,
`lower_only` is its counterpart.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from flax_cnns import config as configs
from flax_cnns.checkpoint.graft import graft
from flax_cnns.checkpoint.graft.sources import open_source
from flax_cnns.checkpoint.locations import check_location
from flax_cnns.config.entries import Field
from flax_cnns.data import fingerprint as fingerprints
from flax_cnns.data.splits import make_batch_note
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.names import open_log
from flax_cnns.runs import workdir as workdirs
from flax_cnns.runs.train import run
from flax_cnns.runtime import output
from flax_cnns.runtime.preemption import Preempted
from flax_cnns.studies import own_parts
from flax_cnns.studies.finetune import probe
from flax_cnns.studies.finetune.strategies import COPY_OPTIONS, STRATEGIES, Phase, Task, make_task


class StrategyRecord(NamedTuple):
    """The result of one strategy for one target, fraction and seed."""

    target: str
    fraction: float
    images: int  # number of training images
    strategy: str
    seed: int
    test: float  # accuracy
    validation: float | None  # accuracy
    seconds: float  # of training, without compiling
    layers: dict[str, Any]  # {layer: metrics of the classifier on it}


class StrategyComparison(NamedTuple):
    """The results of all strategies on all targets."""

    source: str
    targets: tuple[str, ...]
    fractions: tuple[float, ...]  # ascending
    strategies: tuple[str, ...]
    seeds: int
    records: list[StrategyRecord]

    def select(self, target: str, fraction: float, strategy: str) -> list[StrategyRecord]:
        """Returns the records of all seeds."""
        wanted = target, fraction, strategy
        return [r for r in self.records if (r.target, r.fraction, r.strategy) == wanted]


def _find_run_configs(config: ConfigDict) -> dict[str, ConfigDict]:
    """Returns {path in `config`: config of a run}."""
    runs = {f"targets.{name}": target for name, target in config.targets.items()}
    return runs if config.source else runs | {"pretrain": config.pretrain}


def _check_new(config: ConfigDict, folder: pathlib.Path, say: Callable[[str], None]) -> None:
    """Calls `config.check_new_run` for each run."""
    begun = any(folder.glob("*/config.json")) or any(folder.glob("*/*/seed*"))
    notes: list[str] = []
    for name, run_config in _find_run_configs(config).items():
        run_config = ConfigDict(run_config.to_dict())
        if name != "pretrain":  # the phases set graft.source, so fields of config.graft have effect
            run_config.graft.source = config.source or "pretrain"
        try:
            own_parts.refuse_opaque(run_config, "fine-tuning starts its runs from configs")
            configs.check_new_run(run_config, folder, begun=begun, say=notes.append)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
    for note in dict.fromkeys(notes):
        say(note)


def validate_config(config: ConfigDict) -> None:
    """Raises UserError unless `config` has the form of configs/finetune/*.py."""
    wanted = {"source", "targets", "strategy"} | (set() if config.get("source") else {"pretrain"})
    for name in wanted - set(config):
        raise UserError(f"config: {name!r} is missing; start from configs/finetune")
    if not config.targets:
        raise UserError("config.targets: expected at least one target's config, got none")
    for name, run_config in _find_run_configs(config).items():
        try:
            configs.validate(run_config)
            configs.require_test(run_config, "strategies are compared on the test split")
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
    for name, field in configs.STRATEGY.fields.items():
        assert isinstance(field, Field)  # this section contains no sections
        value = config.strategy.get(name)
        if expected := field.check(value):
            raise UserError(f"config.strategy.{name}: expected {expected}, got {value!r}")


@output.safe()
def compare_strategies(
    config: ConfigDict,
    folder: str | os.PathLike,
    *,
    strategies: Sequence[str] = ("all",),
    fractions: Sequence[float] = (1.0,),
    seeds: int = 3,
    accept_changed_data: bool = False,
    say: Callable[[str], None] = print,
) -> StrategyComparison:
    """Trains each strategy on each target and fraction of its training examples, `seeds` times.

    Each seed draws the initialization, the order, the examples of the fraction, the validation
    split, and the test split if the data set has none. For one seed, these draws are the same for
    all strategies. The source must not have seen the test examples.

    If called again with the same config, skips complete runs. Runs whose data changed are renamed
    to old-data-1-STRATEGY and run again; with `accept_changed_data` they are kept. Raises
    UserError.
    """
    validate_config(config)
    chosen = select_strategies(strategies)
    fractions = tuple(sorted(set(fractions)))
    if not fractions or seeds < 1:
        raise UserError("expected at least one fraction and one seed")
    if not 0 < fractions[0] <= fractions[-1] <= 1:
        raise UserError(f"--fractions: expected numbers in (0, 1], got {list(fractions)}")
    if jax.process_count() > 1:
        raise UserError("fine-tuning by strategies needs a single process; start no others")
    check_location(folder)
    folder = pathlib.Path(folder)
    _check_new(config, folder, say)
    source = config.source or f"{folder}/pretrain"
    targets = sorted(config.targets, key=lambda name: (name != "similar", name))
    # Reports a mistake in a target or in the source before anything is trained.
    is_new = not any(folder.glob("*/*/seed*"))
    tasks = {
        name: make_task(
            config.targets[name], source, config.strategy, is_new=is_new, fraction=fractions[0]
        )
        for name in targets
    }
    for name, task in tasks.items():
        size, smallest = task.config.data.batch_size, round(fractions[0] * task.examples)
        note = make_batch_note(size, smallest) if size <= task.examples else ""
        for line in (*task.description, *([f"note: {note}"] if note else [])):
            say(f"targets.{name}: {line}")
    chosen = _drop_impossible(chosen, strategies, tasks, say)
    for name, task in tasks.items():
        for note in _make_notes(task, chosen):
            say(f"targets.{name}: note: {note}")
    if config.source:
        _check_source(source, tasks, chosen, say)
    else:
        if not (folder / "pretrain/summary.json").is_file() and any(folder.glob("*/*/seed*")):
            raise UserError(
                f"{folder} holds runs that started from a source that is gone (pretrain); remove"
                " them, or use another --workdir"
            )
        say("training the source")
        pretrain = Phase("pretrain", config.pretrain)
        summary = _train(pretrain, pathlib.Path(source), accept=accept_changed_data)
        if "test/accuracy" in summary:
            say(f"source: {summary['test/accuracy']:.2%} of its own test split")
        else:  # multilabel data have no accuracy
            say(f"source: loss {summary['test/loss']:.4g} on its own test split")
    total = len(targets) * len(fractions) * seeds * len(chosen)
    runner, records = _Runner(folder, total, say, accept_changed_data), []
    for target, task in tasks.items():
        for fraction in fractions:
            for seed in range(seeds):
                records += runner.run_strategies(target, task, fraction, seed, chosen)
                jax.clear_caches()  # dozens of programs that are not used again
    return StrategyComparison(source, tuple(targets), fractions, chosen, seeds, records)


def select_strategies(names: Sequence[str]) -> tuple[str, ...]:
    """Returns the named strategies in the table's order; "all" means every strategy."""
    for name in names:
        if name not in STRATEGIES and name != "all":
            near = did_you_mean(name, ["all", *STRATEGIES])
            raise UserError(f"--strategies: no strategy is called {name!r}{near}")
    return tuple(name for name in STRATEGIES if name in names or "all" in names)


def _drop_impossible(
    chosen: tuple[str, ...],
    named: Sequence[str],
    tasks: Mapping[str, Task],
    say: Callable[[str], None],
) -> tuple[str, ...]:
    """Drops the strategies that train classifiers on features if a target does not allow them, and
    says so.

    Raises UserError if such a strategy was named itself, not only included by "all".
    """
    target = next((name for name, task in tasks.items() if task.why_no_features), None)
    if target is None:
        return chosen
    task = tasks[target]
    impossible = _find_probing(chosen, task)
    why = task.why_no_features.format(target=f"targets.{target}")
    if conflicting := [name for name in impossible if name in named]:
        raise UserError(f"--strategies: remove {', '.join(conflicting)}: {why}")
    if impossible:
        say(f"left out: {', '.join(impossible)}: {why}")
    return tuple(name for name in chosen if name not in impossible)


def _make_notes(task: Task, strategies: Sequence[str]) -> list[str]:
    """Returns notes on config fields of a target that have no effect in this comparison."""

    config, notes = task.config.train, []
    if config.callbacks and (probing := _find_probing(strategies, task)):
        notes.append(f"{', '.join(probing)} call no train.callbacks")
    if config.best_by not in ("auto", "validation/accuracy"):
        notes.append(
            f"train.best_by is {config.best_by}, so the report names no best strategy by validation"
            " accuracy"
        )
    return notes


def _find_probing(strategies: Sequence[str], task: Task) -> list[str]:
    """Returns the strategies that train classifiers on features."""
    return [name for name in strategies if any(phase.layers for phase in STRATEGIES[name](task))]


def _check_source(
    source: str,
    tasks: Mapping[str, Task],
    strategies: Sequence[str],
    say: Callable[[str], None],
) -> None:
    """Raises UserError if the source does not exist or lacks weights that a strategy loads."""
    loading = [
        (name, task, phase)
        for name, task in tasks.items()
        for strategy in strategies
        for phase in STRATEGIES[strategy](task)
        if phase.config.graft.source
    ]
    opened = {}
    for name, task, phase in loading:
        options = graft.read_options(phase.config.graft)
        if options.averaged not in opened:
            opened[options.averaged] = open_source(source, averaged=options.averaged)
        opened_source = opened[options.averaged]
        try:
            graft.check_graft(opened_source, task.shapes, phase.config.graft.rules, options)
        except UserError as error:
            raise UserError(f"targets.{name}: {error}") from None
    for opened_source in opened.values():
        for note in (opened_source.preprocessing_note, *opened_source.notes):
            if note:
                say(f"note: {note}")


class _Runner:
    """Runs strategies one after the other and prints the progress."""

    def __init__(self, folder: pathlib.Path, total: int, say: Callable[[str], None], accept: bool):
        self.folder, self.total, self.say, self.accept = folder, total, say, accept
        self.done = 0
        self.seconds: list[float] = []

    def run_strategies(
        self, target: str, task: Task, fraction: float, seed: int, strategies: Sequence[str]
    ) -> list[StrategyRecord]:
        """Runs all strategies on the same examples."""
        config = ConfigDict(task.config.to_dict())
        config.data.fraction = float(fraction)
        config.data.split_seed += seed
        config.seed += seed
        task = task._replace(config=config)
        folder = self.folder / target / f"{fraction:g}" / f"seed{seed}"
        return [
            self._run_strategy(target, task, fraction, seed, name, folder) for name in strategies
        ]

    def _run_strategy(
        self, target: str, task: Task, fraction: float, seed: int, name: str, folder: pathlib.Path
    ) -> StrategyRecord:
        place = f"{target}, {fraction:g} of the examples, seed {seed}, {name}"
        start_time = time.perf_counter()
        try:
            summary, seconds, is_new = self._run_phases(task, name, folder)
        except workdirs.ChangedData as error:
            renamed = workdirs.set_aside(folder / name)
            self.say(f"{place}: {error.differs}; it is renamed to {renamed} and runs again")
            summary, seconds, is_new = self._run_phases(task, name, folder)
        self.done += 1
        line = f"{self.done}/{self.total} {place}: {summary['test/accuracy']:.2%} test"
        if is_new:
            self.seconds.append(time.perf_counter() - start_time)
            minutes_left = np.mean(self.seconds) * (self.total - self.done) / 60
            line += f", about {minutes_left:.0f} min left"
        if self.accept:
            seen = fingerprints.DataSnapshot(task.fingerprint)
            runs = {path.parent for path in (folder / name).rglob("dataset.json")}
            if any(workdirs.find_data_differences(run_folder, seen) for run_folder in runs):
                line += "; trained on the data before they changed"
        self.say(line)
        return StrategyRecord(
            target=target,
            fraction=fraction,
            images=round(fraction * task.examples),
            strategy=name,
            seed=seed,
            test=summary["test/accuracy"],
            validation=summary["validation/best_accuracy"],
            seconds=seconds,
            layers=summary.get("layers", {}),
        )

    def _run_phases(
        self, task: Task, name: str, folder: pathlib.Path
    ) -> tuple[dict[str, Any], float, bool]:
        """Returns (the last phase's summary, seconds of all phases, whether anything ran).

        Raises `ChangedData` if the data of one of these runs changed.
        """
        previous, seconds, is_new = "", 0.0, False
        for phase in STRATEGIES[name](task):
            workdir = folder / name / phase.name
            is_new |= not (workdir / "summary.json").is_file()
            if previous:
                everything = ((r"(.*)", r"\1"),)
                phase.config.graft.update(source=previous, rules=everything, **COPY_OPTIONS)
            cached_layers = (*task.parts, probe.LAST_LAYER)
            summary = _train(phase, workdir, cached_layers, self.accept, task.fingerprint)
            seconds += _training_seconds(summary, phase.config)
            previous = f"{workdir}@latest"
        return summary, seconds, is_new


def _train(
    phase: Phase,
    workdir: pathlib.Path,
    cached_layers: Sequence[str] = (),
    accept: bool = False,
    fingerprint: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Runs a phase and returns its summary.

    The output goes into a text file next to `workdir`, and features go into features.npz next to
    it.
    """
    phase = phase._replace(config=workdirs.reset_inert_if_new(phase.config, workdir))
    workdir.parent.mkdir(parents=True, exist_ok=True)
    layers, cache = phase.layers, workdir.parent / "features.npz"
    try:
        with open_log(workdir.with_suffix(".txt")) as log, contextlib.redirect_stdout(log):
            if layers:
                summary = probe.run_probe(
                    phase.config,
                    workdir,
                    layers,
                    cached_layers=cached_layers,
                    cache=cache,
                    accept_changed_data=accept,
                    fingerprint=fingerprint,
                )
            else:
                summary = run(
                    phase.config, workdir, accept_changed_data=accept, fingerprint=fingerprint
                )
    except Preempted as preempted:
        resume = "run the same command again to resume"
        print(f"{workdir}: saved at step {preempted.step}; {resume}", flush=True)
        raise
    # Older versions accepted test splits without an image.
    if summary.get("test/accuracy") is None and "test/label_accuracy" not in summary:
        raise UserError(f"{workdir}/summary.json has no test accuracy; remove {workdir}")
    return summary


def _training_seconds(summary: dict[str, Any], config: ConfigDict) -> float:
    """Returns the seconds of a phase without compiling, evaluating and saving."""
    if "features_seconds" in summary:
        return summary["features_seconds"] + summary["training_seconds"]
    if not summary["images_per_second"]:  # too few steps to measure
        return summary["seconds"]
    return summary["step"] * config.data.batch_size / summary["images_per_second"]
