"""A study's trials in Optuna's journal file, which optuna-dashboard opens.

A trial is created with all its values in one record of the journal, so a process that is killed
leaves no trial without values. The record of its end is the last that is written for a trial; what
comes before it can be written twice without effect. Only the process that has locked the folder
writes.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from flax_cnns.config.spaces import Distribution
from flax_cnns.errors import UserError
from flax_cnns.studies.search.tuning.records import TrialRecord, make_trial_record

STUDY_NAME = "search"  # in the journal


def import_optuna() -> Any:
    """Returns the module optuna. Raises UserError if it is not installed."""
    try:
        import optuna
    except ImportError:
        raise UserError(
            'a search needs optuna, which is not installed: pip install "flax_cnns[tune]"'
        ) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def make_optuna_distribution(distribution: Distribution) -> Any:
    """Returns Optuna's distribution. The choices of a `choice` are its labels."""
    optuna = import_optuna()
    if distribution.kind == "choice":
        return optuna.distributions.CategoricalDistribution(distribution.labels)
    low, high, log = distribution.low, distribution.high, distribution.log
    if distribution.kind == "integer":
        return optuna.distributions.IntDistribution(int(low), int(high), log=log)
    return optuna.distributions.FloatDistribution(float(low), float(high), log=log)


class Journal:
    """The journal of a study's trials. Use it as the only writer."""

    def __init__(self, folder: pathlib.Path, mode: str, space: Mapping[str, Distribution]):
        optuna = import_optuna()
        self.folder = folder
        self.distributions = {path: make_optuna_distribution(d) for path, d in space.items()}
        _repair(folder / "journal.log")
        with _explain_damage(folder):
            self.storage = _open_storage(folder)
            direction = {"max": "maximize", "min": "minimize"}[mode]
            study = optuna.create_study(
                study_name=STUDY_NAME,
                storage=self.storage,
                direction=direction,
                load_if_exists=True,
            )
        self._study_id = study._study_id

    def load_study(self) -> Any:
        """Returns the optuna.Study. A new object, because a study keeps a copy of its trials."""
        return import_optuna().load_study(study_name=STUDY_NAME, storage=self.storage)

    def read(self) -> list[TrialRecord]:
        """Returns the trials, by number."""
        trials = self.storage.get_all_trials(self._study_id, deepcopy=False)
        return [make_trial_record(self.folder, trial) for trial in trials]

    def create(
        self, params: Mapping[str, Any], values: Mapping[str, Any], fields: Mapping[str, Any]
    ) -> TrialRecord:
        """Creates a running trial. `params`: the drawn values as Optuna knows them, with labels for
        choices."""
        optuna = import_optuna()
        trial = optuna.trial.FrozenTrial(
            number=-1,  # the storage counts
            trial_id=-1,
            state=optuna.trial.TrialState.RUNNING,
            value=None,
            datetime_start=datetime.datetime.now(),
            datetime_complete=None,
            params=dict(params),
            distributions={path: self.distributions[path] for path in params},
            user_attrs={"values": dict(values), "fields": dict(fields)},
            system_attrs={},
            intermediate_values={},
        )
        trial_id = self.storage.create_new_trial(self._study_id, template_trial=trial)
        return make_trial_record(self.folder, self.storage.get_trial(trial_id))

    def report(self, number: int, curve: tuple[tuple[int, float], ...]) -> None:
        """Adds validations to a running trial; those that it has are not written again."""
        trial_id = self._find_id(number)
        known = self.storage.get_trial(trial_id).intermediate_values
        for step, value in curve:
            if step not in known:
                self.storage.set_trial_intermediate_value(trial_id, step, value)

    def finish(self, trial: TrialRecord) -> None:
        """Writes the end of a trial: its curve, steps and error, then its state and value."""
        optuna = import_optuna()
        self.report(trial.number, trial.curve)
        trial_id = self._find_id(trial.number)
        for name in ("steps", "error", "rungs"):
            if value := getattr(trial, name):
                self.storage.set_trial_user_attr(trial_id, name, value)
        states = optuna.trial.TrialState
        state = {"complete": states.COMPLETE, "pruned": states.PRUNED, "failed": states.FAIL}
        values = None if trial.state == "failed" or trial.value is None else [trial.value]
        self.storage.set_trial_state_values(trial_id, state[trial.state], values)

    def _find_id(self, number: int) -> int:
        return self.storage.get_trial_id_from_study_id_trial_number(self._study_id, number)


def read_trials(folder: pathlib.Path) -> list[TrialRecord]:
    """Reads the trials of a study, by number; [] if none was created. Writes nothing."""
    if not (folder / "journal.log").is_file():
        return []
    import_optuna()
    with _explain_damage(folder):
        storage = _open_storage(folder)
        studies = [s for s in storage.get_all_studies() if s.study_name == STUDY_NAME]
        if not studies:
            return []
        trials = storage.get_all_trials(studies[0]._study_id, deepcopy=False)
        return [make_trial_record(folder, trial) for trial in trials]


def _open_storage(folder: pathlib.Path) -> Any:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    return JournalStorage(JournalFileBackend(str(folder / "journal.log")))


def _repair(path: pathlib.Path) -> None:
    """Removes what a killed process left: its lock on the journal, and an incomplete last line.

    Optuna would wait 30 seconds for the lock, and would append to the incomplete line.
    """
    for lock in path.parent.glob(f"{path.name}.lock*"):
        with contextlib.suppress(OSError):
            lock.unlink()
    with contextlib.suppress(FileNotFoundError), path.open("r+b") as file:
        file.seek(0, os.SEEK_END)
        content_end = size = file.tell()
        while content_end:
            file.seek(content_end - 1)
            if file.read(1) == b"\n":
                break
            content_end -= 1
        if content_end < size:
            file.truncate(content_end)


@contextlib.contextmanager
def _explain_damage(folder: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot open {folder / 'journal.log'}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise UserError(
            f"{folder / 'journal.log'} is damaged ({type(error).__name__}: {error}); remove it:"
            " the same command makes it again from the trials' runs"
        ) from None
