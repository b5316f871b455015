"""The strategies of transfer learning, each as runs, and what they reach with much data and little,
near the source and far from it.

A strategy makes phases of a target's config: each phase is a run (`flax_cnns.run`) in a directory
of its own that starts from the phase before it, the first from the source. "Never load a layer
when a layer below was skipped" is shown too: `upper_only` does, `lower_only` is its counterpart.
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
    """What one strategy reached once."""

    target: str
    fraction: float
    images: int  # that it was trained on
    strategy: str
    seed: int
    test: float  # accuracies
    validation: float | None
    seconds: float  # of its trainings, without compiling
    layers: dict[str, Any]  # of classifiers on several layers


class StrategyComparison(NamedTuple):
    source: str
    targets: tuple[str, ...]
    fractions: tuple[float, ...]  # rising
    strategies: tuple[str, ...]
    seeds: int
    records: list[StrategyRecord]

    def select(self, target: str, fraction: float, strategy: str) -> list[StrategyRecord]:
        wanted = target, fraction, strategy
        return [r for r in self.records if (r.target, r.fraction, r.strategy) == wanted]


def _runs(config: ConfigDict) -> dict[str, ConfigDict]:
    """The configs of runs in `config`, by their paths."""
    runs = {f"targets.{name}": target for name, target in config.targets.items()}
    return runs if config.source else runs | {"pretrain": config.pretrain}


def _check_new(config: ConfigDict, folder: pathlib.Path, say: Callable[[str], None]) -> None:
    """Calls `config.check_new_run` for each run."""
    begun, notes = any(folder.glob("*/config.json")) or any(folder.glob("*/*/seed*")), []
    for name, one in _runs(config).items():
        one = ConfigDict(one.to_dict())
        if name != "pretrain":  # its phases set it, and the fields that belong to it act
            one.graft.source = config.source or "pretrain"
        try:
            own_parts.refuse_opaque(one, "fine-tuning starts its runs from configs")
            configs.check_new_run(one, folder, begun=begun, say=notes.append)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
    for note in dict.fromkeys(notes):
        say(note)


def validate_config(config: ConfigDict) -> None:
    """Raises `UserError` where `config` is not as configs/finetune/*.py make it."""
    wanted = {"source", "targets", "strategy"} | (set() if config.get("source") else {"pretrain"})
    for name in wanted - set(config):
        raise UserError(f"config: {name!r} is missing; start from configs/finetune")
    if not config.targets:
        raise UserError("config.targets: expected a run's config or more by name, got none")
    for name, one in _runs(config).items():
        try:
            configs.validate(one)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
    for name, field in configs.STRATEGY.fields.items():
        given = config.strategy.get(name)
        if expected := field.check(given):
            raise UserError(f"config.strategy.{name}: expected {expected}, got {given!r}")


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
    """Every strategy on every target with every fraction of its training examples, `seeds` times.

    Each seed draws initialization, order, the examples of the fraction, and the validation split,
    and the test split of a data set that has none; all strategies of a seed see the same. The
    source must not have seen the test examples. Started again with the same config it repeats no
    complete run, except those whose data changed: these are renamed to old-data-1-STRATEGY and run
    again. With `accept_changed_data` they are kept. Raises `UserError`.
    """
    validate_config(config)
    chosen = select_strategies(strategies)
    fractions = tuple(sorted(set(fractions)))
    if not fractions or seeds < 1:
        raise UserError("expected one fraction and one seed at least")
    if not 0 < fractions[0] <= fractions[-1] <= 1:
        raise UserError(f"--fractions: expected numbers above 0 to 1, got {list(fractions)}")
    if jax.process_count() > 1:
        raise UserError("fine-tuning by strategies runs in one process; start it without others")
    check_location(folder)
    folder = pathlib.Path(folder)
    _check_new(config, folder, say)
    source = config.source or f"{folder}/pretrain"
    targets = sorted(config.targets, key=lambda name: (name != "similar", name))
    # Before anything is trained: a mistake in a target, or in the source, is told at once.
    new = not any(folder.glob("*/*/seed*"))
    tasks = {
        name: make_task(
            config.targets[name], source, config.strategy, new=new, fraction=fractions[0]
        )
        for name in targets
    }
    for name, task in tasks.items():
        size, smallest = task.config.data.batch_size, round(fractions[0] * task.examples)
        note = make_batch_note(size, smallest) if size <= task.examples else ""
        for line in (*task.description, *([f"note: {note}"] if note else [])):
            say(f"targets.{name}: {line}")
    chosen = _possible(chosen, strategies, tasks, say)
    for name, task in tasks.items():
        for note in _notes(task, chosen):
            say(f"targets.{name}: note: {note}")
    if config.source:
        _check_source(source, tasks, chosen, say)
    else:
        if not (folder / "pretrain/summary.json").is_file() and any(folder.glob("*/*/seed*")):
            raise UserError(
                f"{folder} holds runs that started from a source that is gone (pretrain); remove"
                " them, or take another --workdir"
            )
        say("training the source")
        pretrain = Phase("pretrain", config.pretrain)
        summary = _train(pretrain, pathlib.Path(source), accept=accept_changed_data)
        if "test/accuracy" in summary:
            say(f"source: {summary['test/accuracy']:.2%} of its own test split")
        else:  # of several labels an image
            say(f"source: loss {summary['test/loss']:.4g} on its own test split")
    total = len(targets) * len(fractions) * seeds * len(chosen)
    runner, records = _Runner(folder, total, say, accept_changed_data), []
    for target, task in tasks.items():
        for fraction in fractions:
            for seed in range(seeds):
                records += runner.cell(target, task, fraction, seed, chosen)
                jax.clear_caches()  # dozens of programs, none of which comes again
    return StrategyComparison(source, tuple(targets), fractions, chosen, seeds, records)


def select_strategies(names: Sequence[str]) -> tuple[str, ...]:
    """Names of strategies in the table's order; "all" is every one. Raises `UserError`."""
    for name in names:
        if name not in STRATEGIES and name != "all":
            near = did_you_mean(name, ["all", *STRATEGIES])
            raise UserError(f"--strategies: there is no {name!r}{near}")
    return tuple(name for name in STRATEGIES if name in names or "all" in names)


def _possible(
    chosen: tuple[str, ...],
    named: Sequence[str],
    tasks: Mapping[str, Task],
    say: Callable[[str], None],
) -> tuple[str, ...]:
    """Without the classifiers on features where these cannot be: of "all" they are left out, with
    a line. Raises `UserError` where one was asked for by name."""
    target = next((name for name, task in tasks.items() if task.why_no_features), None)
    if target is None:
        return chosen
    task = tasks[target]
    out = _on_features(chosen, task)
    why = task.why_no_features.format(target=f"targets.{target}")
    if asked := [name for name in out if name in named]:
        raise UserError(f"--strategies: leave out {', '.join(asked)}: {why}")
    if out:
        say(f"left out: {', '.join(out)}: {why}")
    return tuple(name for name in chosen if name not in out)


def _notes(task: Task, strategies: Sequence[str]) -> list[str]:
    """What an own part of a target does not do here."""
    config, notes = task.config.train, []
    if config.callbacks and (silent := _on_features(strategies, task)):
        notes.append(f"{', '.join(silent)} call no train.callbacks")
    if config.best_by not in ("auto", "validation/accuracy"):
        notes.append(
            "no strategy is called the best by validation accuracy, as train.best_by is"
            f" {config.best_by}"
        )
    return notes


def _on_features(strategies: Sequence[str], task: Task) -> list[str]:
    return [name for name in strategies if any(phase.layers for phase in STRATEGIES[name](task))]


def _check_source(
    source: str,
    tasks: Mapping[str, Task],
    strategies: Sequence[str],
    say: Callable[[str], None],
) -> None:
    """Raises `UserError` where there is no such source, or it lacks what a strategy takes of it."""
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
        found = opened[options.averaged]
        try:
            graft.check_graft(found, task.shapes, phase.config.graft.rules, options)
        except UserError as error:
            raise UserError(f"targets.{name}: {error}") from None
    for found in opened.values():
        for note in (found.preprocessing_note, *found.notes):
            if note:
                say(f"note: {note}")


class _Runner:
    def __init__(self, folder: pathlib.Path, total: int, say: Callable[[str], None], accept: bool):
        self.folder, self.total, self.say, self.accept = folder, total, say, accept
        self.done, self.seconds = 0, []

    def cell(
        self, target: str, task: Task, fraction: float, seed: int, strategies: Sequence[str]
    ) -> list[StrategyRecord]:
        """All strategies on the same examples."""
        config = ConfigDict(task.config.to_dict())
        config.data.fraction = float(fraction)
        config.data.split_seed += seed
        config.seed += seed
        task = task._replace(config=config)
        folder = self.folder / target / f"{fraction:g}" / f"seed{seed}"
        return [self._strategy(target, task, fraction, seed, name, folder) for name in strategies]

    def _strategy(
        self, target: str, task: Task, fraction: float, seed: int, name: str, folder: pathlib.Path
    ) -> StrategyRecord:
        at = f"{target}, {fraction:g} of the examples, seed {seed}, {name}"
        began = time.perf_counter()
        try:
            summary, seconds, new = self._phases(task, name, folder)
        except workdirs.ChangedData as error:
            beside = workdirs.set_aside(folder / name)
            self.say(f"{at}: {error.differs}; it is renamed to {beside} and runs again")
            summary, seconds, new = self._phases(task, name, folder)
        self.done += 1
        said = f"{self.done}/{self.total} {at}: {summary['test/accuracy']:.2%} test"
        if new:
            self.seconds.append(time.perf_counter() - began)
            left = np.mean(self.seconds) * (self.total - self.done) / 60
            said += f", about {left:.0f} min left"
        if self.accept:
            seen = fingerprints.DataSnapshot(task.fingerprint)
            runs = {path.parent for path in (folder / name).rglob("dataset.json")}
            if any(workdirs.find_data_differences(one, seen) for one in runs):
                said += "; trained on the data before they changed"
        self.say(said)
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

    def _phases(
        self, task: Task, name: str, folder: pathlib.Path
    ) -> tuple[dict[str, Any], float, bool]:
        """(the last phase's summary, seconds of all, whether anything ran). Raises `ChangedData`
        if the data of one of these runs changed."""
        previous, seconds, new = "", 0.0, False
        for phase in STRATEGIES[name](task):
            workdir = folder / name / phase.name
            new |= not (workdir / "summary.json").is_file()
            if previous:
                everything = ((r"(.*)", r"\1"),)
                phase.config.graft.update(source=previous, rules=everything, **COPY_OPTIONS)
            kept = (*task.parts, probe.LAST_LAYER)
            summary = _train(phase, workdir, kept, self.accept, task.fingerprint)
            seconds += _training_seconds(summary, phase.config)
            previous = f"{workdir}@latest"
        return summary, seconds, new


def _train(
    phase: Phase,
    workdir: pathlib.Path,
    kept: Sequence[str] = (),
    accept: bool = False,
    fingerprint: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The phase's summary. Beside its directory are what it printed, `.txt`, and the features."""
    phase = phase._replace(config=workdirs.reset_inert_if_new(phase.config, workdir))
    workdir.parent.mkdir(parents=True, exist_ok=True)
    data = dict(accept_changed_data=accept, fingerprint=fingerprint)
    layers, cache = phase.layers, workdir.parent / "features.npz"
    try:
        with open_log(workdir.with_suffix(".txt")) as log, contextlib.redirect_stdout(log):
            if layers:
                summary = probe.run_probe(
                    phase.config, workdir, layers, every_layer=kept, cache=cache, **data
                )
            else:
                summary = run(phase.config, workdir, **data)
    except Preempted as left:
        print(f"{workdir}: saved at step {left.step}; the same command goes on", flush=True)
        raise
    if (
        summary.get("test/accuracy") is None and "test/label_accuracy" not in summary
    ):  # an older version took splits without an image
        raise UserError(f"{workdir}/summary.json has no test accuracy; remove {workdir}")
    return summary


def _training_seconds(summary: dict[str, Any], config: ConfigDict) -> float:
    """Of a phase, without compiling, evaluating and saving."""
    if "features_seconds" in summary:
        return summary["features_seconds"] + summary["training_seconds"]
    if not summary["images_per_second"]:  # too few steps to tell
        return summary["seconds"]
    return summary["step"] * config.data.batch_size / summary["images_per_second"]
