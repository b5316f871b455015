"""Hyper-parameter search: `tune` runs the trials of a study, `read_study` reads one's folder.

study.json      what the study is: config, space, sampler, pruner, metric, seed
journal.log     Optuna's journal: the trials with their values, states and validations
trials/N/       the run of trial N
trials/N.txt    the run's output
"""

from flax_cnns.studies.search.tuning.reading import read_study
from flax_cnns.studies.search.tuning.records import (
    StudyRecord,
    TrialRecord,
    TuningResult,
)
from flax_cnns.studies.search.tuning.tuner import tune

__all__ = ["StudyRecord", "TrialRecord", "TuningResult", "read_study", "tune"]
