"""The search of Zoph & Le 2016 in small, and random search with equally many networks.

https://arxiv.org/abs/1611.01578. Each proposed network is trained for a short time. Its reward is
the cube of the best of its last five validation accuracies (section 4.1). Networks are proposed in
batches; after each batch, the controller takes one step of REINFORCE.

The paper's controller saw 12,800 networks of 50 epochs each. Its networks began with 6 layers and
grew by two after every 1,600; here their number is fixed. There 100 copies of the controller sent
gradients asynchronously; here there is one, so that a search can be repeated.

layers.json                 the config, the space, and how long a network trains
METHOD/settings.json        the settings of the controller
METHOD/trials.jsonl         one line for each trial, in order
children/NAME/              the run of a network, named by its decisions; both methods share it
final/                      an ablation: the config as given, and each method's best network
report.md, trials.csv, rewards.png, network-METHOD.png

The controller's state is not saved. It is a function of the seed and of the decisions and rewards
in trials.jsonl, from which it is computed again. All children have the config's seed, so that a
network proposed twice has the same reward; it is trained once. A network whose training diverges
has the reward 0. The final runs use other seeds than the search, and only they read the test split.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from flax_cnns import config as configs
from flax_cnns import files
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.runs import child
from flax_cnns.runs import workdir as workdirs
from flax_cnns.runs.build import initialize_jax
from flax_cnns.runtime import cluster, output
from flax_cnns.studies import own_parts
from flax_cnns.studies.ablation.ablate import ablate
from flax_cnns.studies.search.nas.controller import Controller
from flax_cnns.studies.search.nas.layers.children import (
    ChildNetwork,
    ChildScore,
    ChildTrainer,
    make_child_config,
)
from flax_cnns.studies.search.nas.layers.space import MODEL, LayersSpace
from flax_cnns.studies.search.nas.layers.trials import (
    METHODS,
    LayersTrial,
    find_best,
    read_trials,
    write_trials,
)
from flax_cnns.train.progress import format_duration

_ONE_PROCESS = (
    "a search of networks is one process; start one, as with srun --ntasks=1; of a TPU pod, give it"
    " one host"
)


class ControllerSettings(NamedTuple):
    """How the controller learns. Its file also says how many trials share an update."""

    learning_rate: float = 6e-4  # the paper's
    batch_size: int = 8  # trials of an update; the paper's
    baseline_decay: float = 0.9
    entropy: float = 0.0


@output.safe()
def search_layers(
    config: ConfigDict,
    folder: str | os.PathLike,
    *,
    space: LayersSpace,
    method: str = "controller",
    trials: int = 64,
    settings: ControllerSettings | None = None,
    child_duration: str = "",
    seeds: int = 3,
    jobs: int | None = None,
    accept_changed_data: bool = False,
    say: Callable[[str], None] = print,
) -> list[LayersTrial]:
    """Searches, trains the best networks with `seeds` other seeds, and tests them.

    config: of the runs. Its own network is the baseline of the final comparison. A child has its
        `model.name` and `model.table` replaced.
    method: "controller", or "random" for uniform draws.
    trials: number of proposed networks. A later call may ask for more.
    child_duration: `train.duration` of the children; "": the config's.
    seeds: of the final runs; 0 makes none.
    jobs: networks trained at once, as in `child.make_device_slots`.

    When it is called again with the same arguments, it goes on where it was stopped, and proposes
    the same networks as without the stop. Raises UserError for a folder of another search, and for
    what a run refuses.
    """
    if method not in METHODS:
        raise UserError(f"--method: unknown method {method!r}{did_you_mean(method, METHODS)}")
    if space.layers < 1 or trials < 1:
        raise UserError(f"expected layers and trials above 0, got {space.layers} and {trials}")
    settings = settings or ControllerSettings()
    if settings.batch_size < 1 or settings.learning_rate <= 0:
        raise UserError(f"expected batch_size and learning_rate above 0, got {settings}")
    if cluster.is_one_of_several(os.environ):
        raise UserError(_ONE_PROCESS)
    workdirs.check_location(folder)
    folder = pathlib.Path(folder)
    configs.validate(config)
    own_parts.refuse_opaque(config, "the search starts its runs from configs")
    maker = _ChildMaker(config, folder, space, child_duration)
    first = maker.make(space.draw_uniformly(config.seed, 0)).config
    configs.validate(first)
    configs.check_new_run(first, folder, begun=(folder / "layers.json").is_file(), say=say)
    _check_folder(folder, config, space, child_duration)
    if method == "controller":
        _check_recorded(folder / method / "settings.json", settings._asdict())

    slots = child.make_device_slots(jobs)
    if len(slots) == 1:  # the networks train in this process, which opens the devices
        initialize_jax(first)
        if jax.process_count() > 1:  # a TPU pod need not show in the environment
            raise UserError(_ONE_PROCESS)
    board = _Board(folder, method, trials, len(slots), say)
    trainer = ChildTrainer(slots, say, board.report, accept_changed_data=accept_changed_data)
    proposer = _Proposer(method, space, settings, config.seed)
    done = board.trials
    for start in range(0, trials, settings.batch_size):
        end = start + settings.batch_size
        if new := range(max(start, len(done)), min(end, trials)):
            # Always whole batches, so that one compiled program serves all.
            batch = proposer.propose(range(start, end))
            chosen = [batch[number - start] for number in new]
            scores = trainer.train([maker.make(decisions) for decisions in chosen])
            done += [
                _make_trial(number, decisions, space, score)
                for number, decisions, score in zip(new, chosen, scores)
            ]
            write_trials(folder, method, done)
            board.new = 0
        if len(done) >= end:
            proposer.learn(done[start:end])
    best = find_best(done)
    say(f"best of {len(done)}: {best.name}, reward {best.reward:.4f}, {best.params:,} parameters")
    if seeds:
        accept = accept_changed_data
        compare_winners(config, folder, space, seeds=seeds, jobs=jobs, accept_changed_data=accept)
    return done


def compare_winners(
    config: ConfigDict,
    folder: pathlib.Path,
    space: LayersSpace,
    *,
    seeds: int,
    jobs: int | None = None,
    accept_changed_data: bool = False,
) -> None:
    """Trains and tests the config as given and the best network of each method, with other seeds
    than the search."""
    config = ConfigDict(config.to_dict())
    config.seed += 1
    rows: list[tuple[str, dict[str, Any]]] = [("given", {})]
    for method in METHODS:
        if found := read_trials(folder, method):
            best = find_best(found)
            # A row's name says which trial it is: a longer search may find another one.
            model = {f"model.{k}": v for k, v in make_model_fields(space, best.decisions).items()}
            rows.append((f"{method}-trial{best.number}", model))
    final = folder / "final"
    ablate(config, rows, final, seeds=seeds, jobs=jobs, accept_changed_data=accept_changed_data)


def make_model_fields(space: LayersSpace, decisions: Sequence[int]) -> dict[str, Any]:
    """Returns the fields `config.model.*` of a network, as plain lists."""
    return configs.to_plain({"name": MODEL, **space.make_fields(decisions)})


class _ChildMaker:
    """Makes the jobs of proposed networks."""

    def __init__(self, config: ConfigDict, folder: pathlib.Path, space: LayersSpace, duration: str):
        self.config, self.space, self.duration = config, space, duration
        self.folder = folder / "children"

    def make(self, decisions: Sequence[int]) -> ChildNetwork:
        model = make_model_fields(self.space, decisions)
        config = make_child_config(self.config, self.duration, model)
        return ChildNetwork(self.space.name(decisions), self.folder, config)


class _Proposer:
    """Proposes networks: the controller, which learns, or random draws."""

    def __init__(self, method: str, space: LayersSpace, settings: ControllerSettings, seed: int):
        self.space, self.seed, self.controller = space, seed, None
        if method == "controller":
            self.controller = Controller(
                space.decisions,
                learning_rate=settings.learning_rate,
                baseline_decay=settings.baseline_decay,
                entropy=settings.entropy,
            )
            self.state = self.controller.init(seed)

    def propose(self, numbers: Sequence[int]) -> list[tuple[int, ...]]:
        if self.controller is None:
            return [self.space.draw_uniformly(self.seed, number) for number in numbers]
        return self.controller.sample_trials(self.state, self.seed, numbers)

    def learn(self, trials: Sequence[LayersTrial]) -> None:
        if self.controller is not None:
            decisions, rewards = [t.decisions for t in trials], [t.reward for t in trials]
            self.state = self.controller.update(self.state, decisions, rewards)


class _Board:
    """Prints a line for each network that was trained, with the time left."""

    def __init__(
        self,
        folder: pathlib.Path,
        method: str,
        total: int,
        at_once: int,
        say: Callable[[str], None],
    ):
        self.trials, self.total, self.say = read_trials(folder, method), total, say
        self.at_once = at_once  # networks that train at the same time
        self.new = 0  # trained, but not yet among the trials
        self.seconds = [trial.seconds for trial in self.trials if trial.seconds]
        self.best = max((trial.reward for trial in self.trials), default=0.0)
        line = f"{method}: {len(self.trials)} of {total} networks are known"
        if self.seconds and len(self.trials) < total:
            line += self._eta()
        elif not self.seconds:
            line += "; the first one tells how long all will take"
        say(line)

    def _eta(self) -> str:
        """Says how long the rest will take; "" if no network's time is known."""
        if not self.seconds:
            return ""
        left = max(self.total - len(self.trials) - self.new, 0)
        seconds = left * sum(self.seconds) / len(self.seconds) / self.at_once
        return f", about {format_duration(seconds)} left"

    def report(self, job: ChildNetwork, score: ChildScore) -> None:
        self.new += 1
        self.seconds += [score.seconds] if score.seconds else []  # 0: unknown
        how = score.error or f"{max(score.accuracies, default=0):.2%} validation"
        self.best = max(self.best, score.reward)
        self.say(
            f"{len(self.trials) + self.new}/{self.total} {job.name}: {how}, reward"
            f" {score.reward:.4f} (best {self.best:.4f}), {score.params:,} parameters,"
            f" {score.seconds:.0f} s{self._eta()}"
        )


def _make_trial(
    number: int, decisions: tuple[int, ...], space: LayersSpace, score: ChildScore
) -> LayersTrial:
    name = space.name(decisions)
    found = score.accuracies, score.reward, score.params, score.seconds, score.error
    return LayersTrial(number, decisions, name, *found)


def _check_folder(
    folder: pathlib.Path, config: ConfigDict, space: LayersSpace, duration: str
) -> None:
    ours = {
        "space": space._asdict(),
        "child_duration": duration or config.train.duration,
        "config": configs.to_plain(config),
    }
    _check_recorded(folder / "layers.json", ours)


def _check_recorded(path: pathlib.Path, ours: dict[str, Any]) -> None:
    """Writes what a search is, or raises UserError if the folder's search differs."""
    if path.is_file():
        differences = configs.list_differences(ours, workdirs.read_json(path))
        if differences:
            raise UserError(
                f"{path.parent} holds another search ({'; '.join(differences)}); use another"
                " --workdir, or the same flags to resume"
            )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, ours)
