"""Reads a study's folder without training anything."""

from __future__ import annotations

import os
import pathlib

from ml_collections import ConfigDict

from flax_cnns import config as configs
from flax_cnns.errors import UserError
from flax_cnns.studies.search.tuning import storage
from flax_cnns.studies.search.tuning.records import StudyRecord, read_facts


def read_study(folder: str | os.PathLike) -> StudyRecord:
    """Reads a study, also while its trials run.

    Raises UserError if there is none, if its files are damaged, or if Optuna is missing.
    """
    folder = pathlib.Path(folder)
    facts = read_facts(folder)
    if facts is None:
        raise UserError(
            f"{folder}: no study here (study.json is missing); give a --workdir of search tune"
        )
    return StudyRecord(
        folder,
        ConfigDict(configs.add_missing_fields(facts.get("given", facts["config"]))[0]),
        ConfigDict(configs.add_missing_fields(facts["config"])[0]),
        **{name: facts[name] for name in ("space", "sampler", "pruner", "metric", "mode", "seed")},
        trials=storage.read_trials(folder),
    )
