"""Evaluates a run exactly: loss, accuracy, metrics of each class, confusion matrix.

flax-cnns evaluate --workdir=runs/digits
flax-cnns evaluate --workdir=runs/digits@best --split=validation
flax-cnns evaluate --workdir=runs/digits --errors
flax-cnns evaluate --workdir=runs/digits --calibrate

Writes evaluation_SPLIT_STEP.json and .png into the directory of the run. If the data changed since
the run began, the command ends with an error; with --accept-changed-data it evaluates on the
changed data.

--calibrate fits a temperature on the validation split, shows ECE, adaptive ECE, Brier score, NLL
and AURC of --split before and after it, and writes calibration.json, which `predict --calibrated`
uses.
"""

from __future__ import annotations

from absl import flags

from flax_cnns.cli.flags import define_accept, define_trust
from flax_cnns.errors import UserError

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "The run's directory: RUN, RUN@best, RUN@latest or RUN@STEP.", required=True
)
_SPLIT = flags.DEFINE_string(
    "split", "test", "The split to evaluate on: train, validation or test."
)
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    "",
    "The checkpoint to evaluate: best, latest or a step. Without this flag: the checkpoint that was"
    " tested for summary.json; in an unfinished run, the latest.",
)


class _CountParser(flags.ArgumentParser):
    """Parses --errors (`DEFAULT_ERRORS`), --errors=N and --no-errors (0)."""

    def parse(self, argument: str | int) -> int:
        known = {"true": DEFAULT_ERRORS, "false": 0}
        try:
            return known[str(argument)] if str(argument) in known else int(argument)
        except ValueError:
            raise ValueError(f"expected a whole number, got {argument!r}") from None


DEFAULT_ERRORS = 100
_ERRORS = flags.DEFINE_flag(
    flags.Flag(
        _CountParser(),
        None,
        "errors",
        0,
        "Also write the worst mistakes with saliency maps into errors_SPLIT_STEP.html, a page"
        f" without external parts. --errors: at most {DEFAULT_ERRORS} of them; --errors=N: at most"
        " N.",
        boolean=True,
    )
)
_CALIBRATE = flags.DEFINE_bool(
    "calibrate",
    False,
    "Fit a temperature on the validation split, and evaluate the calibration before and after it.",
)
_BINS = flags.DEFINE_integer(
    "bins", 15, "With --calibrate: the number of bins of ECE and adaptive ECE.", lower_bound=1
)
_ACCEPT = define_accept()
_TRUST = define_trust()


def evaluate(argv: list[str]) -> None:
    del argv
    if _CALIBRATE.value:
        _calibrate()
        return
    if flags.FLAGS["bins"].present:
        raise UserError("--bins is for --calibrate; also give --calibrate, or remove --bins")
    from flax_cnns.runs.evaluate import evaluate_run

    evaluate_run(
        _WORKDIR.value,
        split=_SPLIT.value,
        checkpoint=_CHECKPOINT.value,
        accept_changed_data=_ACCEPT.value,
        trust=_TRUST.value,
        errors=_ERRORS.value,
    )


def _calibrate() -> None:
    if _ERRORS.value:
        raise UserError("--calibrate writes no page of mistakes; remove --errors, or --calibrate")
    from flax_cnns.runs.evaluate_calibration import calibrate_run

    calibrate_run(
        _WORKDIR.value,
        split=_SPLIT.value,
        checkpoint=_CHECKPOINT.value,
        bins=_BINS.value,
        accept_changed_data=_ACCEPT.value,
        trust=_TRUST.value,
    )
