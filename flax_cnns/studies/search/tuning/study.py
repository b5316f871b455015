"""What a study searches: checked before anything runs, and recorded in study.json."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from ml_collections import ConfigDict

from flax_cnns import config as configs
from flax_cnns import files
from flax_cnns.config import spaces
from flax_cnns.config.spaces import Distribution
from flax_cnns.data import fingerprint as fingerprints
from flax_cnns.errors import UserError
from flax_cnns.runs.plan import RunPlan, dry_run
from flax_cnns.studies import own_parts
from flax_cnns.studies.ablation.plan import apply_overrides
from flax_cnns.studies.search.tuning.pruners import Pruner, check_pruner
from flax_cnns.studies.search.tuning.records import read_facts
from flax_cnns.studies.search.tuning.samplers import Sampler
from flax_cnns.train import schedules

# Fields of data that leave the validation images as they are. With others, trials would be compared
# on different images.
DATA_FIELDS = ("data.batch_size", "data.eval_batch_size", "data.image_size", "data.augment.")
_Result = TypeVar("_Result")
PROBES = 32  # random drawings that are checked before the first trial


class Study(NamedTuple):
    """A search that has passed its checks."""

    folder: pathlib.Path
    config: ConfigDict  # of all trials, before their values are set
    space: Mapping[str, Distribution]
    sampler: Sampler
    pruner: Pruner
    metric: str  # the validation metric, without validation/
    mode: str  # max or min
    training_images: int
    facts: dict[str, Any]  # the content of study.json

    def make_trial_config(self, fields: Mapping[str, Any]) -> ConfigDict:
        """Returns the config of a trial. Raises UserError for a field that does not exist."""
        return apply_overrides(self.config, fields)

    def count_steps(self, config: ConfigDict) -> int:
        """Returns the last step of a trial's run."""
        per_epoch = self.training_images / config.data.batch_size
        return schedules.parse_duration(config.train.duration, per_epoch, what="train.duration")


def make_study(
    config: ConfigDict,
    space: Mapping[str, Distribution],
    folder: pathlib.Path,
    *,
    sampler: str,
    pruner: str,
    metric: str,
    seed: int | None,
    first: Sequence[Mapping[str, Any]] = (),
) -> Study:
    """Checks a search: its config, its space, and a run of its first trial, from shapes alone.

    Raises UserError for everything that a run would refuse before its first step.
    """
    given = configs.to_plain(config)
    config = ConfigDict(config.to_dict())
    config.train.test_on = "never"
    if metric != "auto":
        config.train.best_by = f"validation/{metric.removeprefix('validation/')}"
    configs.validate(config)
    own_parts.refuse_opaque(config, "trials run in child processes")
    spaces.check_space(config, space)
    for path in space:
        if path.startswith("data.") and not path.startswith(DATA_FIELDS):
            raise UserError(
                f"space(): {path} cannot be searched: trials would be compared on different"
                f" validation images; of data, only {', '.join(DATA_FIELDS)}* can"
            )
    check_pruner(pruner)
    seed = config.seed if seed is None else seed
    drawer = Sampler(sampler, config, space, seed, first)
    drawer.count_points()  # raises UserError if there are too many
    random = Sampler("random", config, space, seed)
    for number in range(PROBES):
        _check_trial(config, random.draw(number).fields, _check_fields)
    components, _ = _check_trial(config, random.draw(0).fields, lambda trial: dry_run(trial, {}))
    plan = RunPlan(components)
    if not plan.has_validation:
        raise UserError(
            f"data.validation: {components.dataset.name} has no validation split, which a search"
            " compares trials on; set data.validation=0.1"
        )
    evaluate = plan.periods.evaluate
    if pruner != "none" and not evaluate:
        raise UserError(
            "--pruner: it needs validations during the run, but train.eval_every is"
            f" {config.train.eval_every!r}; set train.eval_every='1 epochs'"
        )
    training_images = len(components.dataset.splits["train"])
    per_epoch = training_images / config.data.batch_size
    steps = schedules.parse_duration(config.train.duration, per_epoch, what="train.duration")
    every = schedules.parse_duration(config.train.eval_every, per_epoch, what="train.eval_every")
    facts = {
        "given": given,
        "config": configs.to_plain(config),
        "space": spaces.describe_space(space),
        "sampler": sampler,
        "pruner": pruner,
        "metric": f"validation/{plan.best_by}",
        "mode": plan.best_mode,
        "seed": seed,
        "steps": steps,
        "data": components.dataset.snapshot.fingerprint,
    }
    if first:
        facts["first"] = configs.to_plain({"trials": [dict(values) for values in first]})["trials"]
    return Study(
        folder=folder,
        config=config,
        space=space,
        sampler=drawer,
        pruner=Pruner(pruner, plan.best_mode, steps, every),
        metric=plan.best_by,
        mode=plan.best_mode,
        training_images=training_images,
        facts=facts,
    )


def _check_fields(config: ConfigDict) -> None:
    configs.validate(config)
    configs.raise_problems(configs.find_problems(config))


def _check_trial(
    config: ConfigDict, fields: Mapping[str, Any], check: Callable[[ConfigDict], _Result]
) -> _Result:
    """Returns what `check` returns for the config of a trial with these drawn values.

    Raises its UserError with the values; without them, if the config alone is refused too.
    """
    try:
        return check(apply_overrides(config, fields))
    except UserError as error:
        check(config)
        raise UserError(
            f"space(): a trial with {spaces.format_values(fields)} would be refused: {error}; a"
            " field that only some values of another field use needs when={field: value}"
        ) from None


def record_study(study: Study, *, accept_changed_data: bool = False) -> None:
    """Writes study.json, or compares it with the study.

    Raises UserError if the folder holds another study, other files, or trials with other data; with
    `accept_changed_data`, other data are recorded instead.
    """
    folder, ours = study.folder, study.facts
    theirs = read_facts(folder)
    if theirs is None:
        others = sorted(
            p.name for p in folder.iterdir() if p.name != ".lock" and p.suffix != ".tmp"
        )
        if others:
            raise UserError(
                f"{folder} is not empty and holds no study ({', '.join(others[:5])}); use another"
                " --workdir"
            )
        files.write_json(folder / "study.json", ours)
        return
    theirs = theirs | {"config": configs.add_missing_fields(theirs["config"])[0]}
    differ = configs.list_differences(_describe(ours), _describe(theirs))
    differ = [line for line in differ if not line.startswith("config.data.dir:")]
    if differ:
        raise UserError(
            f"{folder} holds another study ({'; '.join(differ)}); use another --workdir, or the"
            " same config, space, sampler, pruner, metric and seed to go on"
        )
    if changes := fingerprints.find_differences(theirs["data"], ours["data"]):
        changed = fingerprints.join_first(changes)
        if not accept_changed_data:
            raise UserError(
                f"the data of {folder} changed since its study began: {changed}; restore the data,"
                " use another --workdir, or continue anyway with --accept-changed-data"
            )
        print(f"accepted: the data of {folder} changed: {changed}")
        files.write_json(folder / "study.json", theirs | {"data": ours["data"]})


def _describe(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what two studies must have in common, as plain data with one entry for each line of
    an error message."""
    compared = {k: v for k, v in facts.items() if k not in ("given", "data", "steps")}
    space = {path: _describe_range(each) for path, each in facts["space"].items()}
    return compared | {"space": space}


def _describe_range(described: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value!r}" for name, value in described.items())
