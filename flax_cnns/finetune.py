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
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from flax_cnns import config as configs
from flax_cnns import output, probe, pytree, registry
from flax_cnns import workdir as workdirs
from flax_cnns.analysis.cost import cost
from flax_cnns.checkpoint import graft
from flax_cnns.checkpoint.place import check_place
from flax_cnns.checkpoint.sources import open_source
from flax_cnns.data import fingerprint as fingerprints
from flax_cnns.data.splits import batch_note
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.experiment import assemble, doubts, run
from flax_cnns.names import open_log
from flax_cnns.preemption import Preempted

COPY = graft.Options()._asdict()  # fields of config.graft: leaves are taken as they are

# ---------------------------------------------------------------------------- strategies


class Phase(NamedTuple):
    """A whole run; with `layers` in its place a linear classifier on each of these, fixed."""

    name: str
    config: ConfigDict
    layers: tuple[str, ...] = ()


class Task(NamedTuple):
    """A network to fine-tune: what every strategy starts from."""

    config: ConfigDict  # of the run from scratch
    source: str  # as `graft` takes it
    parts: tuple[str, ...]  # the network's own, from the images up: stem, stage1 ...
    classifier: tuple[str, ...]  # the layers whose shape depends on the number of classes
    shapes: Any  # of the network's variables
    examples: int  # of the whole training split
    held: tuple[str, ...]  # what its data set holds, as lines
    knobs: Any  # `strategy` of the config: last, rate, head_share, layer_decay
    fingerprint: dict[str, Any] = {}  # noqa: RUF012 (never changed) of its data

    @property
    def is_dense(self) -> bool:
        """Whether the classifier is one dense layer; auxiliary heads stand aside."""
        layers = [layer for layer in self.classifier if not layer.startswith("aux")]
        leaves = pytree.flatten(self.shapes["params"])
        own = {path: x for path, x in leaves.items() if path.rpartition("/")[0] in layers}
        return probe.dense_kernel(own) is not None

    def phase(
        self,
        name: str = "",
        *,
        load: Sequence[str] | None = None,
        train: Sequence[str] | None = None,
        rate: float = 1.0,
        share: float = 1.0,
        layers: Sequence[str] = (),
    ) -> Phase:
        """`load`: the parts that come from the source, `train`: those that learn, beside the
        classifier, which is fresh and always learns; None: all. `rate` is a factor on the learning
        rate, `share` one on the duration."""
        config = ConfigDict(self.config.to_dict())
        load, train = (self.parts if p is None else tuple(p) for p in (load, train))
        if not load:
            config.graft.update(**COPY)
        else:
            config.graft.source = self.source
            fresh = [part for part in self.parts if part not in load]
            named = [f"(params|batch_stats)/{_any(of)}/.*" for of in (self.classifier, fresh) if of]
            config.graft.rules = (*((regex, None) for regex in named), (r"(.*)", r"\1"))
        if train != self.parts:
            # Classifiers on features know no auxiliary heads.
            heads = [name for name in self.classifier if not (layers and name.startswith("aux"))]
            learning = f"params/{_any((*heads, *train))}/.*"
            config.optimizer.trainable = ((learning, True), (".*", False))
        config.schedule.learning_rate *= rate
        config.schedule.end = min(config.schedule.end, config.schedule.learning_rate)
        for section, field in (("train", "duration"), ("schedule", "warmup")):
            config[section][field] = _scaled(config[section][field], share)
        boundaries = config.schedule.boundaries
        config.schedule.boundaries = tuple(_scaled(at, share) for at in boundaries)
        return Phase(name, config, tuple(layers))


def scratch(task: Task) -> list[Phase]:
    """Nothing is loaded."""
    return [task.phase(load=())]


def linear(task: Task) -> list[Phase]:
    """A linear classifier on the top of the frozen network."""
    return [task.phase(train=())]


def features(task: Task) -> list[Phase]:
    """The same on features that are computed once: fast, but without augmentation."""
    return [task.phase(train=(), layers=(probe.LAST,))]


def linear_stages(task: Task) -> list[Phase]:
    """A linear classifier on each part's pooled features; the best by validation counts."""
    return [task.phase(train=(), layers=task.parts)]


def last_k(task: Task) -> list[Phase]:
    """The last parts learn, slowly, and the classifier."""
    last = task.parts[-task.knobs.last :]
    return [task.phase(train=last, rate=task.knobs.rate)]


def all_slowly(task: Task) -> list[Phase]:
    """The whole network learns, at a tenth of the rate."""
    return [task.phase(rate=task.knobs.rate)]


def head_then_all(task: Task) -> list[Phase]:
    """The classifier first, so that its first gradients spoil nothing; then all, slowly."""
    share = task.knobs.head_share
    return [
        task.phase("1-head", train=(), share=share),
        task.phase("2-all", rate=task.knobs.rate, share=1 - share),
    ]


def gradual(task: Task) -> list[Phase]:
    """The classifier first, then part by part from the top."""
    number = len(task.parts) + 1
    phases = [task.phase("1-head", train=(), share=1 / number)]
    for i in range(1, number):
        name = f"{i + 1}-{task.parts[-i]}"
        train = task.parts[-i:]
        phases.append(task.phase(name, train=train, rate=task.knobs.rate, share=1 / number))
    return phases


def layer_decay(task: Task) -> list[Phase]:
    """The whole network learns, the slower the lower a layer."""
    phase = task.phase()
    phase.config.optimizer.layer_decay = task.knobs.layer_decay
    return [phase]


def upper_only(task: Task) -> list[Phase]:
    """The upper half of the parts is loaded, the lower is not: no better than from scratch?"""
    return [task.phase(load=task.parts[(len(task.parts) + 1) // 2 :])]


def lower_only(task: Task) -> list[Phase]:
    """The lower half is loaded, the upper is not."""
    return [task.phase(load=task.parts[: (len(task.parts) + 1) // 2])]


STRATEGIES: dict[str, Callable[[Task], list[Phase]]] = {
    "scratch": scratch,
    "linear": linear,
    "features": features,
    "linear_stages": linear_stages,
    "last_k": last_k,
    "all_slowly": all_slowly,
    "head_then_all": head_then_all,
    "gradual": gradual,
    "layer_decay": layer_decay,
    "upper_only": upper_only,
    "lower_only": lower_only,
}


def _any(layers: Sequence[str]) -> str:
    return f"({'|'.join(map(re.escape, layers))})"


def _scaled(duration: str, share: float) -> str:
    number, unit = re.fullmatch(r"\s*([\d.]+)\s*(\w+)\s*", duration).groups()
    return f"{round(float(number) * share, 4)} {unit}" if share != 1 else duration


def make_task(
    config: ConfigDict, source: str, knobs: Any, *, new: bool = False, fraction: float = 1.0
) -> Task:
    """Looks at the shapes of the target's network; nothing is computed. Raises `UserError`; `new`:
    also for what no new run of this network may have on these data, or on a `fraction` of them."""
    parts = assemble(config)
    if new:
        configs.refuse(doubts(parts))
        if found := doubts(parts, fraction):  # durations in epochs are fewer steps
            raise UserError(f"with --fractions={fraction:g}: {' | '.join(found)}")
    shape = (1, *parts.dataset.image_shape)

    def shapes(model: Any) -> Any:
        return jax.eval_shape(lambda: registry.init_variables(model, jax.random.key(0), shape))

    def params(variables: Any) -> dict[str, tuple[int, ...]]:
        return {path: leaf.shape for path, leaf in pytree.flatten(variables["params"]).items()}

    model = parts.model
    variables = shapes(model)
    here, wider = params(variables), params(shapes(model.clone(num_classes=model.num_classes + 1)))
    classifier = {path.rpartition("/")[0] for path in here if here[path] != wider[path]}
    ran = [layer.path for layer in cost(model, shape).layers]
    owners = {path.split("/")[0] for path in here if path.rpartition("/")[0] not in classifier}
    order = list(dict.fromkeys(path.split("/")[0] for path in ran))
    own = tuple(name for name in order if name in owners and not name.startswith("aux"))
    examples, held = len(parts.dataset.splits["train"]), tuple(parts.dataset.describe())
    classifier, data = tuple(sorted(classifier)), parts.dataset.fingerprint
    return Task(config, source, own, classifier, variables, examples, held, knobs, data)


# ---------------------------------------------------------------------------- the comparison


class Record(NamedTuple):
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


class Result(NamedTuple):
    source: str
    targets: tuple[str, ...]
    fractions: tuple[float, ...]  # rising
    strategies: tuple[str, ...]
    seeds: int
    records: list[Record]

    def at(self, target: str, fraction: float, strategy: str) -> list[Record]:
        wanted = target, fraction, strategy
        return [r for r in self.records if (r.target, r.fraction, r.strategy) == wanted]


def _runs(config: ConfigDict) -> dict[str, ConfigDict]:
    """The configs of runs in `config`, by their paths."""
    runs = {f"targets.{name}": target for name, target in config.targets.items()}
    return runs if config.source else runs | {"pretrain": config.pretrain}


def _check_new(config: ConfigDict, folder: pathlib.Path, say: Callable[[str], None]) -> None:
    """Calls `config.check_new` for each run."""
    begun, notes = any(folder.glob("*/config.json")) or any(folder.glob("*/*/seed*")), []
    for name, one in _runs(config).items():
        one = ConfigDict(one.to_dict())
        if name != "pretrain":  # its phases set it, and the fields that belong to it act
            one.graft.source = config.source or "pretrain"
        try:
            configs.check_new(one, folder, begun=begun, say=notes.append)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
    for note in dict.fromkeys(notes):
        say(note)


def validate(config: ConfigDict) -> None:
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
    knobs = config.strategy
    for field, check in {
        "last": configs.integer(1),
        "rate": configs.number(above=True),
        "head_share": configs.number(0.01, 0.99),
        "layer_decay": configs.number(0, 1, above=True),
    }.items():
        if expected := check(knobs.get(field)):
            raise UserError(
                f"config.strategy.{field}: expected {expected}, got {knobs.get(field)!r}"
            )


@output.safe()
def compare(
    config: ConfigDict,
    folder: str | os.PathLike,
    *,
    strategies: Sequence[str] = ("all",),
    fractions: Sequence[float] = (1.0,),
    seeds: int = 3,
    accept_changed_data: bool = False,
    say: Callable[[str], None] = print,
) -> Result:
    """Every strategy on every target with every fraction of its training examples, `seeds` times.

    Each seed draws initialisation, order, the examples of the fraction, and the validation split,
    and the test split of a data set that has none; all strategies of a seed see the same. The
    source must not have seen the test examples. Started again with the same config it repeats no
    complete run, except those whose data changed: these are renamed to old-data-1-STRATEGY and run
    again. With `accept_changed_data` they are kept. Raises `UserError`.
    """
    validate(config)
    chosen = choose(strategies)
    fractions = tuple(sorted(set(fractions)))
    if not fractions or seeds < 1:
        raise UserError("expected one fraction and one seed at least")
    if not 0 < fractions[0] <= fractions[-1] <= 1:
        raise UserError(f"--fractions: expected numbers above 0 to 1, got {list(fractions)}")
    if jax.process_count() > 1:
        raise UserError("fine-tuning by strategies runs in one process; start it without others")
    check_place(folder)
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
        note = batch_note(size, smallest) if size <= task.examples else ""
        for line in (*task.held, *([f"note: {note}"] if note else [])):
            say(f"targets.{name}: {line}")
    chosen = _possible(chosen, strategies, tasks, say)
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
        say(f"source: {summary['test/accuracy']:.2%} of its own test split")
    total = len(targets) * len(fractions) * seeds * len(chosen)
    runner, records = _Runner(folder, total, say, accept_changed_data), []
    for target, task in tasks.items():
        for fraction in fractions:
            for seed in range(seeds):
                records += runner.cell(target, task, fraction, seed, chosen)
                jax.clear_caches()  # dozens of programs, none of which comes again
    return Result(source, tuple(targets), fractions, chosen, seeds, records)


def choose(names: Sequence[str]) -> tuple[str, ...]:
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
    """Without what no classifier but a dense layer can do: of "all" it is left out, with a line.
    Raises `UserError` where it was asked for by name."""
    target = next((name for name, task in tasks.items() if not task.is_dense), None)
    if target is None:
        return chosen
    task = tasks[target]
    out = [name for name in chosen if any(phase.layers for phase in STRATEGIES[name](task))]
    why = (
        f"the classifier of targets.{target} ({task.config.model.name}:"
        f" {', '.join(task.classifier)}) is no dense layer on features"
    )
    if asked := [name for name in out if name in named]:
        raise UserError(f"--strategies: leave out {', '.join(asked)}: {why}")
    if out:
        say(f"left out: {', '.join(out)}: {why}")
    return tuple(name for name in chosen if name not in out)


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
        options = graft.options_of(phase.config.graft)
        if options.averaged not in opened:
            opened[options.averaged] = open_source(source, averaged=options.averaged)
        found = opened[options.averaged]
        try:
            graft.check(found, task.shapes, phase.config.graft.rules, options)
        except UserError as error:
            raise UserError(f"targets.{name}: {error}") from None
    for found in opened.values():
        for note in (found.note, *found.notes):
            if note:
                say(f"note: {note}")


class _Runner:
    def __init__(self, folder: pathlib.Path, total: int, say: Callable[[str], None], accept: bool):
        self.folder, self.total, self.say, self.accept = folder, total, say, accept
        self.done, self.seconds = 0, []

    def cell(
        self, target: str, task: Task, fraction: float, seed: int, strategies: Sequence[str]
    ) -> list[Record]:
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
    ) -> Record:
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
            seen = fingerprints.Seen(task.fingerprint)
            runs = {path.parent for path in (folder / name).rglob("dataset.json")}
            if any(workdirs.data_differences(one, seen) for one in runs):
                said += "; trained on the data before they changed"
        self.say(said)
        return Record(
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
                phase.config.graft.update(source=previous, rules=everything, **COPY)
            kept = (*task.parts, probe.LAST)
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
    phase = phase._replace(config=workdirs.reset_if_new(phase.config, workdir))
    workdir.parent.mkdir(parents=True, exist_ok=True)
    data = dict(accept_changed_data=accept, fingerprint=fingerprint)
    layers, cache = phase.layers, workdir.parent / "features.npz"
    try:
        with open_log(workdir.with_suffix(".txt")) as log, contextlib.redirect_stdout(log):
            if layers:
                summary = probe.probe(
                    phase.config, workdir, layers, every_layer=kept, cache=cache, **data
                )
            else:
                summary = run(phase.config, workdir, **data)
    except Preempted as left:
        print(f"{workdir}: saved at step {left.step}; the same command goes on", flush=True)
        raise
    if summary.get("test/accuracy") is None:  # an older version took splits without an image
        raise UserError(f"{workdir}/summary.json has no test accuracy; remove {workdir}")
    return summary


def _training_seconds(summary: dict[str, Any], config: ConfigDict) -> float:
    """Of a phase, without compiling, evaluating and saving."""
    if "features_seconds" in summary:
        return summary["features_seconds"] + summary["training_seconds"]
    if not summary["images_per_second"]:  # too few steps to tell
        return summary["seconds"]
    return summary["step"] * config.data.batch_size / summary["images_per_second"]
