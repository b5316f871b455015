"""Evaluates a run or published weights exactly: loss, accuracy, metrics of each class, confusion
matrix.

flax-cnns evaluate --workdir=runs/digits
flax-cnns evaluate --workdir=runs/digits@best --split=validation
flax-cnns evaluate --workdir=runs/digits --errors
flax-cnns evaluate --workdir=runs/digits --calibrate
flax-cnns evaluate --workdir=runs/digits --crops=10
flax-cnns evaluate --workdir=runs/photos --crops=10 --scales=1,1.15,1.3
flax-cnns evaluate --workdir=runs/photos --size=288 --crop-share=0.95
flax-cnns evaluate --workdir=runs/cifar10 --set=cifar10_c --set-dir=CIFAR-10-C
flax-cnns evaluate --model=resnet50 --weights=timm --set=folder --set-dir=photos --crops=10
flax-cnns evaluate --workdir=runs/digits --corruptions=all --baseline=runs/plain --sheet=0
flax-cnns evaluate --ensemble=runs/a,runs/b,runs/c@best
flax-cnns evaluate --ensemble=runs/a,runs/b,runs/c --grid --crops=1,10
flax-cnns evaluate --ensemble=runs/a@200,runs/a@400,runs/a@600 --soup=greedy --save=runs/soup

Writes evaluation_SPLIT_STEP.json and .png into the directory of the run. If the data changed since
the run began, the command ends with an error; with --accept-changed-data it evaluates on the
changed data.

--calibrate fits a temperature on the validation split, shows ECE, adaptive ECE, Brier score, NLL
and AURC of --split before and after it, and writes calibration.json, which `predict --calibrated`
uses.

--set evaluates a run or published weights on a set in the folder --set-dir: folder (images in one
folder per class, named by class name, by number or by ImageNet's id), or a set as it is published:
imagenet_v2, imagenet_real, imagenet_sketch, imagenet_a, imagenet_r, imagenet_c, cifar10_1,
cifar10_1_v4, cifar10_c, cifar100_c. A run gets evaluation_SET_STEP.json; a set of corruptions also
gets a .csv file, and goes on where it was stopped.

--corruptions evaluates on corrupted images: ImageNet-C's fifteen corruptions at five severities,
with CIFAR-C's constants for sides up to 64 pixels. It writes evaluation_SPLIT_STEP_corruptions with
.json, .md, .csv and .png, and reads what was evaluated before from the folder of this name.

--ensemble averages the predictions of several runs or checkpoints. --grid also evaluates the first
1, 2, ... of them with each number of --crops. --soup averages their weights instead. Files go into
the directory of the first run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from absl import flags

from flax_cnns.cli.flags import define_accept, define_trust
from flax_cnns.cli.network_flags import check_network_flags
from flax_cnns.errors import UserError

if TYPE_CHECKING:
    from flax_cnns.runs.crops import CropOptions

_WORKDIR = flags.DEFINE_string(
    "workdir", "", "The run's directory: RUN, RUN@best, RUN@latest or RUN@STEP."
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
_CROPS = flags.DEFINE_string(
    "crops",
    "1",
    "Crops of each image whose probabilities are averaged: 1; 5: corners and center; 10: and their"
    " mirror images; 144: GoogLeNet's. With --grid several numbers, 1,10 by default.",
)
_SHARE = flags.DEFINE_float(
    "crop-share",
    0.0,
    "The share of the shorter side that a crop sees. Without this flag: 0.875 for 5 and 10 crops,"
    " and for one crop that of the run's evaluation.",
)
_SCALES = flags.DEFINE_list(
    "scales", [], "Factors of the run's image size at which the crops are read."
)
_IMAGE_SIZE = flags.DEFINE_integer(
    "size", 0, "Side of the images in pixels; 0: as in training. --scales gives several sizes."
)
_FLIP = flags.DEFINE_bool("flip", False, "Also average over the mirror images of --crops=1 or 5.")
_DENSE = flags.DEFINE_bool(
    "dense",
    False,
    "Let the dense layers of AlexNet, ZFNet and VGG slide over the whole image, as in the VGG"
    " paper; with a larger --size or --scales.",
)
_SET = flags.DEFINE_string("set", "", "The set to evaluate on, in place of the run's own data.")
_SET_DIR = flags.DEFINE_string("set-dir", "", "With --set: the folder of the set.")
_MODEL = flags.DEFINE_string(
    "model", "", "With --set: the network whose published weights are used, in place of --workdir."
)
_WEIGHTS = flags.DEFINE_string(
    "weights", "", "With --model: the published weights, SOURCE or SOURCE=FILE."
)
_SKIP_DAMAGED = flags.DEFINE_bool(
    "skip-damaged", False, "With --set: leave out images that cannot be decoded, and count them."
)
_OUT = flags.DEFINE_string(
    "out", "", "With --set: the .json file to write. Without it, published weights write none."
)
_CORRUPTIONS = flags.DEFINE_list(
    "corruptions",
    None,
    "Evaluate on corrupted images: all (the fifteen of ImageNet-C), the groups noise, blur,"
    " weather, digital and extra, or names such as gaussian_noise,fog.",
)
_SEVERITIES = flags.DEFINE_list(
    "severities", ["1", "2", "3", "4", "5"], "With --corruptions: the severities, 1 to 5."
)
_BASELINE = flags.DEFINE_string(
    "baseline",
    "",
    "With --corruptions: the run whose errors divide this run's (mCE); or alexnet, the published"
    " errors for ImageNet's 1000 classes.",
)
_IMAGES = flags.DEFINE_integer(
    "images",
    0,
    "With --corruptions: evaluate so many evenly spaced images of the split; 0: all.",
    lower_bound=0,
)
_SHEET = flags.DEFINE_integer(
    "sheet",
    None,
    "With --corruptions: also draw the corruptions of this image of the split, counted from 0, into"
    " corruptions_SPLIT_N.png.",
    lower_bound=0,
)
_ENSEMBLE = flags.DEFINE_list(
    "ensemble",
    [],
    "Several runs of the same data, RUN,RUN@best,RUN@STEP,... in place of --workdir.",
)
_AVERAGE = flags.DEFINE_enum(
    "average",
    "probabilities",
    ["probabilities", "logits"],
    "With --ensemble: what is averaged.",
)
_GRID = flags.DEFINE_bool(
    "grid",
    False,
    "With --ensemble: a table of models and crops, as GoogLeNet's. A stopped command goes on.",
)
_SOUP = flags.DEFINE_enum(
    "soup",
    None,
    ["uniform", "greedy"],
    "With --ensemble: average the weights of checkpoints of one network: of all, or greedily of"
    " those that do not lower the validation accuracy.",
)
_SAVE = flags.DEFINE_string(
    "save", "", "With --soup: the new folder for the soup, which commands take like a run's."
)
_ACCEPT = define_accept()
_TRUST = define_trust()


_CROP_FLAGS = ("crops", "crop-share", "scales", "size", "flip", "dense")
# The flag of each kind of evaluation, and the flags that it takes besides those of every kind. The
# plain evaluation is "".
_COMMON = ("split", "accept-changed-data", "trust")
_OF_ONE = ("workdir", "checkpoint")
KINDS: dict[str, tuple[str, ...]] = {
    "": (*_OF_ONE, "errors", *_CROP_FLAGS),
    "calibrate": (*_OF_ONE, "bins"),
    "corruptions": (*_OF_ONE, "severities", "baseline", "images", "sheet"),
    "set": (*_OF_ONE, "set-dir", "model", "weights", "skip-damaged", "out", *_CROP_FLAGS),
    "ensemble": ("average", *_CROP_FLAGS),
    "grid": ("ensemble", "crops"),
    "soup": ("ensemble", "save"),
}


def evaluate(argv: list[str]) -> None:
    del argv
    if _CALIBRATE.value and (_MODEL.value or _WEIGHTS.value):
        raise UserError(
            "--calibrate fits a temperature on a run's validation split, and published weights have"
            " no such split; give --workdir=RUN"
        )
    kind = _choose_kind()
    if kind == "set":
        _evaluate_set()
        return
    if kind in ("ensemble", "grid", "soup"):
        _evaluate_several(kind)
        return
    if not _WORKDIR.value:
        raise UserError("expected --workdir=RUN, or several runs: --ensemble=RUN,RUN,...")
    if kind == "corruptions":
        _evaluate_corruptions(_CORRUPTIONS.value or [])
        return
    if kind == "calibrate":
        _calibrate()
        return
    from flax_cnns.runs.evaluate import evaluate_run

    evaluate_run(
        _WORKDIR.value,
        split=_SPLIT.value,
        checkpoint=_CHECKPOINT.value,
        accept_changed_data=_ACCEPT.value,
        trust=_TRUST.value,
        errors=_ERRORS.value,
        crops=_read_crops(),
    )


def _choose_kind() -> str:
    """Returns the kind that the flags ask for. Raises UserError for two kinds, and for a flag that
    the kind does not take."""
    for name in ("corruptions", "set", "ensemble"):
        if flags.FLAGS[name].present and flags.FLAGS[name].value in ("", []):
            raise UserError(f"--{name}: expected a value after --{name}=, got none")
    chosen = [kind for kind in KINDS if kind and flags.FLAGS[kind].value]
    # --ensemble is a kind, and also a flag of the other kinds of several runs.
    chosen = [kind for kind in chosen if not any(kind in KINDS[other] for other in chosen)]
    if len(chosen) > 1:
        raise UserError(f"--{chosen[0]} and --{chosen[1]}: give one of them")
    kind = chosen[0] if chosen else ""
    for flag in flags.FLAGS.flags_by_module_dict()[__name__]:
        is_off = flag.value is False or (flag.name == "errors" and flag.value == 0)
        if flag.present and not is_off and flag.name not in (*_COMMON, kind, *KINDS[kind]):
            takers = [f"--{name}" for name, taken in KINDS.items() if name and flag.name in taken]
            without = f"without --{kind}" if kind else f"with {' or '.join(takers)}"
            cure = ""
            if flag.name in _OF_ONE:
                cure = "; name all runs, and their checkpoints, as --ensemble=RUN,RUN@STEP,..."
            raise UserError(f"--{flag.name} has an effect only {without}{cure}")
    return kind


def _calibrate() -> None:
    from flax_cnns.runs.evaluate_calibration import calibrate_run

    calibrate_run(
        _WORKDIR.value,
        split=_SPLIT.value,
        checkpoint=_CHECKPOINT.value,
        bins=_BINS.value,
        accept_changed_data=_ACCEPT.value,
        trust=_TRUST.value,
    )


def _evaluate_several(kind: str) -> None:
    if not _ENSEMBLE.value:
        raise UserError(f"--{kind} is for several runs: --ensemble=RUN,RUN,...")
    options: dict[str, Any] = dict(
        split=_SPLIT.value, accept_changed_data=_ACCEPT.value, trust=_TRUST.value
    )
    if kind == "soup":
        from flax_cnns.runs.evaluate_soup import evaluate_soup

        evaluate_soup(_ENSEMBLE.value, str(_SOUP.value), save=_SAVE.value, **options)
        return
    from flax_cnns.runs.evaluate_ensemble import evaluate_ensemble, evaluate_grid

    if kind == "grid":
        crops = _CROPS.value.split(",") if flags.FLAGS["crops"].present else ["1", "10"]
        evaluate_grid(_ENSEMBLE.value, crops, **options)
        return
    evaluate_ensemble(_ENSEMBLE.value, crops=_read_crops(), average=_AVERAGE.value, **options)


def _evaluate_set() -> None:
    _check_set_flags()
    from flax_cnns.evaluation.shifted.opening import check_folder
    from flax_cnns.runs import classifier as classifiers
    from flax_cnns.runs.evaluate_set import evaluate_set

    check_folder(_SET.value, _SET_DIR.value)
    if _WORKDIR.value:
        classifier = classifiers.make_classifier_from_run(
            _WORKDIR.value,
            _CHECKPOINT.value,
            accept_changed_data=_ACCEPT.value,
            trust=_TRUST.value,
        )
    else:
        source, _, file = _WEIGHTS.value.partition("=")
        classifier = classifiers.make_classifier_from_weights(_MODEL.value, source, file or None)
    evaluate_set(
        classifier,
        _SET.value,
        _SET_DIR.value,
        crops=_read_crops(),
        skip_damaged=_SKIP_DAMAGED.value,
        out=_OUT.value,
    )


def _check_set_flags() -> None:
    if flags.FLAGS["split"].present:
        raise UserError("--split is of the run's own data, and --set is other data: give one")
    if not _SET_DIR.value:
        raise UserError(f"--set={_SET.value}: also give --set-dir=FOLDER, where the set is")
    check_network_flags(_WORKDIR.value, _MODEL.value, _WEIGHTS.value, "--set: ")
    for name in ("checkpoint", "accept-changed-data", "trust") if _MODEL.value else ():
        if flags.FLAGS[name].present:
            raise UserError(f"--{name} is for a run; published weights have none")


def _read_crops() -> CropOptions | None:
    """Returns what the flags say about crops; None for the plain evaluation."""
    from flax_cnns.runs.crops import CropOptions

    if not any(flags.FLAGS[name].present for name in _CROP_FLAGS):
        return None
    try:
        scales = [float(scale) for scale in _SCALES.value]
    except ValueError:
        raise UserError(f"--scales: expected numbers, got {','.join(_SCALES.value)}") from None
    share = _SHARE.value if flags.FLAGS["crop-share"].present else None
    return CropOptions(_CROPS.value, share, scales, _IMAGE_SIZE.value, _FLIP.value, _DENSE.value)


def _evaluate_corruptions(corruptions: list[str]) -> None:
    from flax_cnns.runs.evaluate_corruptions import evaluate_corruptions

    try:
        severities = [int(severity) for severity in _SEVERITIES.value]
    except ValueError:
        given = ",".join(_SEVERITIES.value)
        raise UserError(f"--severities: expected some of 1,2,3,4,5; got {given}") from None
    evaluate_corruptions(
        _WORKDIR.value,
        corruptions=corruptions,
        severities=severities,
        baseline=_BASELINE.value,
        split=_SPLIT.value,
        checkpoint=_CHECKPOINT.value,
        images=_IMAGES.value,
        sheet=_SHEET.value,
        accept_changed_data=_ACCEPT.value,
        trust=_TRUST.value,
    )
