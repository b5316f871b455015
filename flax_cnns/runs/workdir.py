"""The run directory: checks whether a run may write into it, and reads and updates its files.

config.json        the resolved config; a run with another config cannot resume here
dataset.json       what prediction needs without the data: classes, size, mean and std; also the
                   fingerprint of the data, and older fingerprints under "accepted_changes"
own.json           the user's own parts: names, fields, digests of their source
checkpoints/STEP/  state, host counters, CRC manifest
graft.json         which weights were grafted, if the run started from a source
metrics.jsonl      every logged number, once; tensorboard/ repeats them
summary.json       the final numbers; the run is complete if this file exists
curves.png         learning curves
profile/           traces of some steps (train --profile)
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
RUN_FOLDERS = ("checkpoints", "tensorboard", "profile")


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON object, with None for numbers that are not finite.

    JSON has `null` for them; older versions wrote NaN and Infinity. Raises UserError if the file
    cannot be read or is not a JSON object.
    """
    try:
        return replace_nonfinite(finding.read_json(path))
    except finding.DamagedError as error:
        cure = "" if path.name in finding.REPAIRS else "; repair it or remove the run"
        raise finding.DamagedError(f"{error}{cure}") from None


def split_checkpoint(workdir: str | os.PathLike, checkpoint: str = "") -> tuple[pathlib.Path, str]:
    """Returns (run directory, checkpoint) for RUN or RUN@best and the flag --checkpoint.

    The checkpoint is best, latest, a step, or "". Raises UserError if two different checkpoints are
    named.
    """
    run, which = finding.split_source(workdir)
    if which and checkpoint not in ("", which):
        raise UserError(
            f"{os.fspath(workdir)} and --checkpoint={checkpoint} name two checkpoints; name one"
        )
    return pathlib.Path(run), which or checkpoint


def read_config(workdir: str | os.PathLike) -> Any:
    """Reads the config of a run, with the defaults of fields that were added later.

    Raises UserError if there is no config.
    """
    from ml_collections import ConfigDict

    path = pathlib.Path(workdir) / "config.json"
    if not os.path.isfile(path):  # also False for a name that is too long
        raise UserError(f"{workdir}: no run here (config.json is missing); give a run's --workdir")
    complete, _ = _read_completed(path)
    _check_fields(path, complete)
    return ConfigDict(complete)


def _check_fields(path: pathlib.Path, complete: dict[str, Any]) -> None:
    if missing := sorted(configs.FIELDS.keys() - configs.flatten(complete).keys()):
        raise finding.DamagedError(
            f"{path} is damaged: the field {missing[0]!r} is missing; {finding.REPAIRS[path.name]}"
        )


def _read_completed(path: pathlib.Path) -> tuple[dict[str, Any], list[str]]:
    """Returns (config with all fields, names of the fields that the file lacks)."""
    with finding.explain_damage(path, finding.REPAIRS[path.name]):
        return configs.add_missing_fields(read_json(path))


def describe_resume(workdir: pathlib.Path) -> str:
    """Returns the end of a message: how to resume this run after it was interrupted."""
    if saved := all_steps(workdir):
        return f"run the same command again to resume from step {saved[-1]}"
    return "nothing of this run was saved; run the same command again to restart it"


def reset_inert_if_new(config: Any, workdir: pathlib.Path) -> Any:
    """Resets fields that have no effect to their defaults, if the run has not begun.

    For configs that this package derives. A run that has begun keeps its config.
    """
    return config if has_begun(workdir) else configs.reset_inert_fields(config)


def check_workdir(
    workdir: pathlib.Path, config: dict[str, Any], *, accept_changed_data: bool = False
) -> None:
    """Raises UserError if `workdir` holds a run with another config, or files that are not a run.

    Another `data.dir` is allowed if `check_data` can compare the data. Prints a line if an older
    version made the run.
    """
    if (workdir / "config.json").is_file():
        saved, newer = _read_completed(workdir / "config.json")
        begun = has_begun(workdir)
        if begun:
            _check_fields(workdir / "config.json", saved)
        fields = configs.list_differences(config, configs.reset_inert_fields_like(config, saved))
        if accept_changed_data or "fingerprint" in read_dataset_facts(workdir):
            fields = [field for field in fields if not field.startswith("data.dir:")]
        if begun and fields:
            moved = all(field.startswith("data.dir:") for field in fields)
            cure = ", or --accept-changed-data if the data only moved" if moved else ""
            raise UserError(
                f"{workdir} holds a run with another config ({'; '.join(fields)}); "
                f"use another --workdir, or the same config to resume{cure}"
            )
        if begun and newer:
            print(
                f"{workdir} was made by an older version that lacks the fields"
                f" {', '.join(newer)}: it resumes with their defaults, which change nothing"
            )
        # Versions without this field grouped layers differently.
        if begun and "graft.adapt_stem" in newer and saved["optimizer"].get("layer_decay"):
            print(
                f"note: an older version began {workdir} with optimizer.layer_decay: from here on"
                " its layers' rates are grouped as in BEiT and timm, see CHANGELOG.md"
            )
        for name in (*RUN_FILES, *RUN_FOLDERS):
            path = workdir / name
            fits = path.is_dir() if name in RUN_FOLDERS else path.is_file()
            if os.path.lexists(path) and not fits:
                kind = "folder" if name in RUN_FOLDERS else "file"
                raise UserError(
                    f"{path} is not a {kind}, but the run writes a {kind} of this name;"
                    " move it away or use another --workdir"
                )
    elif others := sorted(
        p.name for p in workdir.iterdir() if p.name != ".lock" and p.suffix != ".tmp"
    ):
        raise UserError(
            f"{workdir} is not empty and holds no run ({', '.join(others[:5])}); "
            "use another --workdir"
        )


def has_begun(workdir: pathlib.Path) -> bool:
    """Whether the run has taken a step."""
    return bool(all_steps(workdir)) or (workdir / "metrics.jsonl").is_file()


# ---------------------------------------------------------------------------- the run's data


class ChangedData(UserError):
    """The data differ from those with which the run began. `differs` says how."""

    def __init__(self, workdir: pathlib.Path, differs: str):
        self.differs = f"the data of {workdir} changed since it began: {differs}"
        super().__init__(
            f"{self.differs}; restore the data, use another --workdir, or continue anyway with"
            " --accept-changed-data"
        )


def read_dataset_facts(workdir: pathlib.Path) -> dict[str, Any]:
    """Returns the content of `dataset.json`; {} if the version that made the run wrote none."""
    path = workdir / "dataset.json"
    return read_json(path) if path.is_file() else {}


def write_dataset_facts(workdir: pathlib.Path, facts: Mapping[str, Any]) -> None:
    """Writes `dataset.json` and keeps the accepted changes that are in the file."""
    kept = {k: v for k, v in read_dataset_facts(workdir).items() if k == "accepted_changes"}
    write_json(workdir / "dataset.json", {**facts, **kept})


def find_data_differences(workdir: pathlib.Path, seen: fingerprints.DataSnapshot) -> list[str]:
    """Returns the differences between the data at the beginning of the run and now, in words.

    If the run was made by a version without fingerprints, compares the class names, the mean if the
    run computed it, and the counts if the run is complete.
    """
    facts = read_dataset_facts(workdir)
    if "fingerprint" in facts:
        with finding.explain_damage(workdir / "dataset.json", finding.REPAIRS["dataset.json"]):
            return fingerprints.find_differences(facts["fingerprint"], seen.fingerprint)
    differences = []
    if seen.fingerprint and "class_names" in facts:
        with finding.explain_damage(workdir / "dataset.json", finding.REPAIRS["dataset.json"]):
            differences += fingerprints.find_class_differences(
                facts["class_names"], seen.fingerprint["classes"]
            )
            if not differences and seen.mean and facts["normalized_by"] == "training images":
                differences += fingerprints.find_mean_differences(facts["mean"], seen.mean)
    if (workdir / "summary.json").is_file():
        size = read_config(workdir).data.batch_size
        summary = read_json(workdir / "summary.json")
        with finding.explain_damage(workdir / "summary.json", finding.REPAIRS["summary.json"]):
            differences += fingerprints.find_count_differences(summary, size, seen.counts)
    return differences


def check_data(
    workdir: pathlib.Path,
    seen: fingerprints.DataSnapshot,
    *,
    accept: bool = False,
    quiet: bool = False,
) -> dict[str, Any] | None:
    """Compares the data with those at the beginning of the run.

    Returns the change if there is one and `accept` is set: {"differs": [words], "was": fingerprint,
    "is": fingerprint}; otherwise None. Prints the change unless `quiet`. Raises `ChangedData` if
    the data changed and `accept` is not set.
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
        compared = "its class names and counts were compared" if facts else "nothing was compared"
        if facts and not (workdir / "summary.json").is_file():
            compared = "its class names were compared"
        print(
            f"{workdir} was made by an older version without a fingerprint of its data:"
            f" {compared}, and the data's present fingerprint is added"
        )
    return None


def add_fingerprint(workdir: pathlib.Path, facts: Mapping[str, Any]) -> None:
    """Adds the fingerprint that a run of an older version lacks.

    `facts`: what `dataset.json` would hold now.
    """
    saved = read_dataset_facts(workdir)
    if "fingerprint" not in saved:
        write_json(workdir / "dataset.json", {**facts, **saved})


def record_moved_data(workdir: pathlib.Path, directory: str) -> None:
    """Writes the new place of a run's data into `config.json`."""
    config = read_json(workdir / "config.json")
    if config["data"].get("dir", "") != directory:
        config["data"]["dir"] = directory
        write_json(workdir / "config.json", config)
        print(f"{workdir}: its data are the same, now in data.dir={directory}")


def record_accepted_change(workdir: pathlib.Path, change: Mapping[str, Any]) -> None:
    """Records an accepted change in `dataset.json` once, with the run's step."""
    facts = read_dataset_facts(workdir)
    known = facts.get("accepted_changes", [])
    if change not in [{k: v for k, v in old.items() if k != "step"} for old in known]:
        facts["accepted_changes"] = [*known, {"step": max(all_steps(workdir), default=0), **change}]
        write_json(workdir / "dataset.json", facts)


def set_aside(workdir: pathlib.Path) -> pathlib.Path:
    """Renames a directory to `old-data-1-NAME`, which frees its name for a new run."""
    names = (workdir.with_name(f"old-data-{i}-{workdir.name}") for i in itertools.count(1))
    target = next(path for path in names if not path.exists())
    try:
        os.replace(workdir, target)
    except OSError as error:
        raise UserError(f"cannot rename {workdir} to {target}: {error.strerror}") from None
    return target


# ---------------------------------------------------------------------------- the lock


class WorkdirHandle:
    """A run directory that this process may write into. `begun`: whether the run took a step."""

    begun = False


@contextlib.contextmanager
def open_workdir(workdir: pathlib.Path, *, primary: bool) -> Iterator[WorkdirHandle]:
    """Creates and locks the run directory. An error before the first step leaves nothing behind.

    With several processes, only the primary process does this. Raises UserError if the directory is
    in use or cannot be written.
    """
    check_location(workdir)
    handle = WorkdirHandle()
    if not primary:
        yield handle
        return
    made = [p for p in (workdir, *workdir.parents) if not p.exists()]
    locked_before = (workdir / ".lock").exists()
    with DirectoryLock(workdir):
        try:
            yield handle
        except BaseException:
            if made and not handle.begun:
                shutil.rmtree(workdir, ignore_errors=True)
                with contextlib.suppress(OSError):  # not empty: another run began there
                    for path in made[1:]:
                        path.rmdir()
            elif not locked_before and not (workdir / "config.json").exists():
                (workdir / ".lock").unlink(missing_ok=True)
            raise
