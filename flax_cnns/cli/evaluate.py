"""Exact metrics of a run: loss, accuracy, per class, and the confusion matrix as table and picture.

flax-cnns evaluate --workdir=runs/digits
flax-cnns evaluate --workdir=runs/digits@best --split=validation

Writes evaluation_SPLIT_STEP.json and .png into the directory of the run. It refuses if the data
changed since the run began; --accept-changed-data evaluates on the changed data.
"""

from __future__ import annotations

from absl import flags

from flax_cnns.cli.flags import define_accept, define_trust

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "The run's directory: RUN, RUN@best, RUN@latest or RUN@STEP.", required=True
)
_SPLIT = flags.DEFINE_string("split", "test", "train, validation or test.")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    "",
    "best, latest or a step. Without this flag: the one that was tested for the run's summary.json;"
    " in an unfinished run, the latest.",
)
_ACCEPT = define_accept()
_TRUST = define_trust()


def evaluate(argv: list[str]) -> None:
    from flax_cnns.runs.evaluate import evaluate_run

    del argv
    evaluate_run(
        _WORKDIR.value,
        split=_SPLIT.value,
        checkpoint=_CHECKPOINT.value,
        accept_changed_data=_ACCEPT.value,
        trust=_TRUST.value,
    )
