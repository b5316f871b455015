"""The run directory: who may write into it, and whether it holds what it should.

config.json        the resolved config; a resume under another one is refused
dataset.json       classes, size, mean and std: what it takes to predict without the data; the
                   fingerprint of the data, and under "accepted_changes" what it was before
own.json           the user's own parts: names, fields, digests of their source
checkpoints/STEP/  state, host counters, CRC manifest
metrics.jsonl      every logged number, once: the truth; tensorboard/ says it again
summary.json       the final numbers; its presence means that the run is complete
curves.png         learning curves
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from flax_cnns import config as configs
from flax_cnns.checkpoint import finding
from flax_cnns.checkpoint.finding import all_steps
from flax_cnns.checkpoint.locations import check_location
from flax_cnns.checkpoint.lock import DirectoryLock
from flax_cnns.data import fingerprint as fingerprints
from flax_cnns.errors import UserError
from flax_cnns.files import replace_nonfinite, write_json

RUN_FILES = (
    *("config.json", "dataset.json", "own.json", "metrics.jsonl", "summary.json", "curves.png"),
    "graft.json",
)
RUN_FOLDERS = ("checkpoints", "tensorboard")


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Raises `UserError` where the file cannot be read or is no JSON object. What is not finite is
    None: `null`, and the NaN and Infinity of older versions."""
    try:
        return replace_nonfinite(finding.read_json(path))
    except finding.DamagedError as error:
        cure = "" if path.name in finding.REPAIRS else "; put it right or remove the run"
        raise finding.DamagedError(f"{error}{cure}") from None


def split_checkpoint(workdir: str | os.PathLike, checkpoint: str = "") -> tuple[pathlib.Path, str]:
    """(run directory, checkpoint) of RUN or RUN@best and a --checkpoint. The checkpoint is best,
    latest, a step, or "". Raises `UserError` if two different ones are named."""
    run, which = finding.split_source(workdir)
    if which and checkpoint not in ("", which):
        raise UserError(
            f"{os.fspath(workdir)} and --checkpoint={checkpoint} are two checkpoints; name one"
        )
    return pathlib.Path(run), which or checkpoint


def read_config(workdir: str | os.PathLike) -> Any:
    """The config of a run directory, with the fields that were added since it was made. Raises
    `UserError` where there is none."""
    from ml_collections import ConfigDict

    path = pathlib.Path(workdir) / "config.json"
    if not os.path.isfile(path):  # also for a name that is too long
        raise UserError(f"{workdir}: no run here (config.json is missing); give a run's --workdir")
    complete, _ = _completed(path)
    _check_fields(path, complete)
    return ConfigDict(complete)


def _check_fields(path: pathlib.Path, complete: dict[str, Any]) -> None:
    if missing := sorted(configs.FIELDS.keys() - configs.flatten(complete).keys()):
        raise finding.DamagedError(
            f"{path} is damaged: the field {missing[0]!r} is missing; {finding.REPAIRS[path.name]}"
        )


def _completed(path: pathlib.Path) -> tuple[dict[str, Any], list[str]]:
    with finding.explain_damage(path, finding.REPAIRS[path.name]):
        return configs.add_missing_fields(read_json(path))


def describe_resume(workdir: pathlib.Path) -> str:
    """The end of a message: what the same command does after this run was interrupted."""
    if saved := all_steps(workdir):
        return f"the same command goes on from step {saved[-1]}"
    return "nothing of this run was saved; the same command starts it again"


def reset_inert_if_new(config: Any, workdir: pathlib.Path) -> Any:
    """The config of a run that this package derives. In a new run, fields that cannot act get their
    defaults; an older run keeps them."""
    return config if has_begun(workdir) else configs.reset_inert_fields(config)


def check_workdir(
    workdir: pathlib.Path, config: dict[str, Any], *, accept_changed_data: bool = False
) -> None:
    """Raises `UserError` where `workdir` holds another experiment, or things that are no run; says
    so where the run was made by an older version and lacks fields that change nothing.

    Another `data.dir` is allowed if `check_data` can tell whether the data are the same.
    """
    if (workdir / "config.json").is_file():
        there, newer = _completed(workdir / "config.json")
        begun = has_begun(workdir)
        if begun:
            _check_fields(workdir / "config.json", there)
        fields = configs.list_differences(config, configs.reset_inert_fields_like(config, there))
        if accept_changed_data or "fingerprint" in read_dataset_facts(workdir):
            fields = [field for field in fields if not field.startswith("data.dir:")]
        if begun and fields:
            moved = all(field.startswith("data.dir:") for field in fields)
            cure = ", or --accept-changed-data if the data only moved" if moved else ""
            raise UserError(
                f"{workdir} holds a run with another config ({'; '.join(fields)}); "
                f"take another --workdir, or the same config to go on{cure}"
            )
        if begun and newer:
            print(
                f"{workdir} was made by an older version that lacks the fields"
                f" {', '.join(newer)}: it goes on with their defaults, which change nothing"
            )
        # Versions without this field grouped layers in another way.
        if begun and "graft.adapt_stem" in newer and there["optimizer"].get("layer_decay"):
            print(
                f"note: {workdir} has optimizer.layer_decay of an older version: from here on its"
                " layers' rates are grouped as BEiT and timm do, see CHANGELOG.md"
            )
        for name in (*RUN_FILES, *RUN_FOLDERS):
            path = workdir / name
            if os.path.lexists(path) and not (
                path.is_dir() if name in RUN_FOLDERS else path.is_file()
            ):
                kind = "folder" if name in RUN_FOLDERS else "file"
                raise UserError(
                    f"{path} is not a {kind}, and the run writes a {kind} of this name;"
                    " move it away or take another --workdir"
                )
    elif others := sorted(
        p.name for p in workdir.iterdir() if p.name != ".lock" and p.suffix != ".tmp"
    ):
        raise UserError(
            f"{workdir} is not empty and holds no run ({', '.join(others[:5])}); "
            "take another --workdir"
        )


def has_begun(workdir: pathlib.Path) -> bool:
    """Whether the run has taken a step."""
    return bool(all_steps(workdir)) or (workdir / "metrics.jsonl").is_file()


# ---------------------------------------------------------------------------- the run's data


class ChangedData(UserError):
    """The data are not those with which a run began; `differs` says how, without a cure."""

    def __init__(self, workdir: pathlib.Path, differs: str):
        self.differs = f"the data of {workdir} changed since it began: {differs}"
        super().__init__(
            f"{self.differs}; put the data back, take another --workdir, or go on all the same"
            " with --accept-changed-data"
        )


def read_dataset_facts(workdir: pathlib.Path) -> dict[str, Any]:
    """What `dataset.json` holds; {} where a run of an older version has none."""
    path = workdir / "dataset.json"
    return read_json(path) if path.is_file() else {}


def write_dataset_facts(workdir: pathlib.Path, facts: Mapping[str, Any]) -> None:
    """Writes `dataset.json`; the changes of the data that were accepted stay in it."""
    kept = {k: v for k, v in read_dataset_facts(workdir).items() if k == "accepted_changes"}
    write_json(workdir / "dataset.json", {**facts, **kept})


def find_data_differences(workdir: pathlib.Path, seen: fingerprints.DataSnapshot) -> list[str]:
    """What differs between the data that a run began with and those of now, in words. For a run
    of an older version: class names, the mean if it was computed, and counts if it is complete."""
    facts = read_dataset_facts(workdir)
    if "fingerprint" in facts:
        with finding.explain_damage(workdir / "dataset.json", finding.REPAIRS["dataset.json"]):
            return fingerprints.find_differences(facts["fingerprint"], seen.fingerprint)
    found = []
    if seen.fingerprint and "class_names" in facts:
        with finding.explain_damage(workdir / "dataset.json", finding.REPAIRS["dataset.json"]):
            found += fingerprints.find_class_differences(
                facts["class_names"], seen.fingerprint["classes"]
            )
            if not found and seen.mean and facts["normalized_by"] == "training images":
                found += fingerprints.find_mean_differences(facts["mean"], seen.mean)
    if (workdir / "summary.json").is_file():
        size = read_config(workdir).data.batch_size
        summary = read_json(workdir / "summary.json")
        with finding.explain_damage(workdir / "summary.json", finding.REPAIRS["summary.json"]):
            found += fingerprints.find_count_differences(summary, size, seen.counts)
    return found


def check_data(
    workdir: pathlib.Path,
    seen: fingerprints.DataSnapshot,
    *,
    accept: bool = False,
    quiet: bool = False,
) -> dict[str, Any] | None:
    """Compares the data with those that a run began with. Returns the change if there is one and
    it is accepted: {"differs": [words], "was", "is": fingerprints}, and prints it unless `quiet`.

    Raises `ChangedData` where it is not accepted.
    """
    if not has_begun(workdir):
        return None
    facts = read_dataset_facts(workdir)
    differs = find_data_differences(workdir, seen)
    if differs and not accept:
        raise ChangedData(workdir, fingerprints.join_first(differs))
    if differs:
        if not quiet:
            print(f"accepted: the data of {workdir} changed: {fingerprints.join_first(differs)}")
        was = facts.get("fingerprint", {"classes": facts.get("class_names", [])})
        return {"differs": differs, "was": was, "is": seen.fingerprint}
    if "fingerprint" not in facts and not quiet:
        compared = "its class names and counts" if facts else "nothing"
        if facts and not (workdir / "summary.json").is_file():
            compared = "its class names"
        print(
            f"{workdir} was made by an older version that kept no fingerprint of its data:"
            f" {compared} could be compared; the fingerprint of the data as it is now is added"
        )
    return None


def add_fingerprint(workdir: pathlib.Path, facts: Mapping[str, Any]) -> None:
    """Adds what a run of an older version lacks; `facts`: what `dataset.json` would hold now."""
    there = read_dataset_facts(workdir)
    if "fingerprint" not in there:
        write_json(workdir / "dataset.json", {**facts, **there})


def record_moved_data(workdir: pathlib.Path, directory: str) -> None:
    """Writes into `config.json` where the data of a run are now."""
    config = read_json(workdir / "config.json")
    if config["data"].get("dir", "") != directory:
        config["data"]["dir"] = directory
        write_json(workdir / "config.json", config)
        print(f"{workdir}: its data are the same, now at data.dir={directory}")


def record_accepted_change(workdir: pathlib.Path, change: Mapping[str, Any]) -> None:
    """Records an accepted change in `dataset.json`, once, with the step at which the run was."""
    facts = read_dataset_facts(workdir)
    known = facts.get("accepted_changes", [])
    if change not in [{k: v for k, v in one.items() if k != "step"} for one in known]:
        facts["accepted_changes"] = [*known, {"step": max(all_steps(workdir), default=0), **change}]
        write_json(workdir / "dataset.json", facts)


def set_aside(workdir: pathlib.Path) -> pathlib.Path:
    """Renames a directory, so that its place is free for a new run: `old-data-1-NAME`."""
    names = (workdir.with_name(f"old-data-{i}-{workdir.name}") for i in itertools.count(1))
    beside = next(path for path in names if not path.exists())
    try:
        os.replace(workdir, beside)
    except OSError as error:
        raise UserError(f"cannot rename {workdir} to {beside}: {error.strerror}") from None
    return beside


# ---------------------------------------------------------------------------- the lock


class WorkdirHandle:
    """A run directory that this process may write into; `begun` once a step was taken."""

    begun = False


@contextlib.contextmanager
def open_workdir(workdir: pathlib.Path, *, primary: bool) -> Iterator[WorkdirHandle]:
    """Makes and locks the run directory; a mistake before the first step leaves nothing behind.

    With several processes the primary one does it for all. Raises `UserError` where the directory
    is in use or cannot be written.
    """
    check_location(workdir)
    opened = WorkdirHandle()
    if not primary:
        yield opened
        return
    made = [p for p in (workdir, *workdir.parents) if not p.exists()]
    locked_before = (workdir / ".lock").exists()
    with DirectoryLock(workdir):
        try:
            yield opened
        except BaseException:
            if made and not opened.begun:
                shutil.rmtree(workdir, ignore_errors=True)
                with contextlib.suppress(OSError):  # not empty: another run began beside us
                    for path in made[1:]:
                        path.rmdir()
            elif not locked_before and not (workdir / "config.json").exists():
                (workdir / ".lock").unlink(missing_ok=True)
            raise
