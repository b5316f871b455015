"""The result of a study whose trials have ended."""

from __future__ import annotations

from collections.abc import Sequence

from flax_cnns.errors import UserError
from flax_cnns.studies.search.tuning.records import TrialRecord, TuningResult, find_best
from flax_cnns.studies.search.tuning.study import Study


def make_result(study: Study, records: Sequence[TrialRecord]) -> TuningResult:
    """Returns the result of a study. Raises UserError if no trial is complete."""
    best = find_best(records, study.mode)
    if best is None:
        failed = [record for record in records if record.state == "failed"]
        diverged = sum(record.error.startswith("diverged") for record in failed)
        if not failed:
            raise UserError(
                f"{study.folder}: no trial of {len(records)} is complete: all were pruned; give"
                " more --trials, or another --pruner in another --workdir"
            )
        fix = "correct this"
        if diverged:
            fix = "lower the ends of the space's ranges, or set optimizer.clip_norm"
        raise UserError(
            f"{study.folder}: no trial of {len(records)} is complete: {len(failed)} failed,"
            f" {diverged} of them diverged; the first, trial {failed[0].number}:"
            f" {failed[0].error}; {fix}, in another --workdir"
        )
    return TuningResult(list(records), best)
