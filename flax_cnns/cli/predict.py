"""Classifies photos and shows the most likely classes as a table and as a picture.

flax-cnns predict --model=tf_efficientnet_lite0 --weights=efficientnet_lite cat.jpg
flax-cnns predict --model=tf_efficientnet_lite0 --weights=efficientnet_lite --crops=144 cat.jpg
flax-cnns predict --model=resnet50 --weights=torchvision=resnet50.pth cat.jpg dog.png
flax-cnns predict --workdir=runs/flowers@best mine.jpg
flax-cnns predict --workdir=weights/resnet50 cat.jpg
flax-cnns predict --workdir=runs/flowers@best --calibrated mine.jpg

Published weights use the preprocessing that they were evaluated with, also after `convert`; a run
uses its own. --weights is SOURCE (torchvision, timm, keras or efficientnet_lite) or SOURCE=FILE.
Without FILE, the weights are downloaded once.
"""

from __future__ import annotations

from absl import flags

from flax_cnns.cli.flags import (
    choose_picture_path,
    define_arguments,
    define_trust,
)
from flax_cnns.cli.network_flags import check_network_flags
from flax_cnns.data.images import check_photos
from flax_cnns.errors import UserError

_MODEL = flags.DEFINE_string("model", "", "The network whose published weights are used.")
_WEIGHTS = flags.DEFINE_string("weights", "", "The published weights: SOURCE or SOURCE=FILE.")
_WORKDIR = flags.DEFINE_string(
    "workdir",
    "",
    "A run's directory (RUN, RUN@best, RUN@latest, RUN@STEP) or a folder that convert wrote. Used"
    " instead of --model and --weights.",
)
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    "",
    "The checkpoint of a run: best, latest or a step. Without this flag: the checkpoint that was"
    " tested for summary.json; in an unfinished run, the latest.",
)
_CALIBRATED = flags.DEFINE_bool(
    "calibrated",
    False,
    "Divide the logits by the temperature of the run, which `evaluate --calibrate` fitted.",
)
_CROPS = flags.DEFINE_string(
    "crops",
    "",
    "Average the probabilities of crops of each photo: 1: the central square; 5: corners and"
    " center; 10: and their mirror images; 144: GoogLeNet's.",
)
_TOP = flags.DEFINE_integer("top", 5, "Number of classes to show.", lower_bound=1)
_TRUST = define_trust()
_OUT = flags.DEFINE_string(
    "out",
    "predictions.png",
    'The picture to write; "": none. Without this flag, no file is replaced: if predictions.png'
    " exists, predictions-2.png is written.",
)
define_arguments("one or more photos (files)", "PHOTO...")


def predict(argv: list[str]) -> None:
    check_network_flags(_WORKDIR.value, _MODEL.value, _WEIGHTS.value)
    if _CHECKPOINT.value and not _WORKDIR.value:
        raise UserError("--checkpoint chooses a checkpoint of a run; also give --workdir=RUN")
    if _CALIBRATED.value and not _WORKDIR.value:
        raise UserError(
            "--calibrated takes the temperature of a run, and published weights have none; remove"
            " it, or give --workdir=RUN"
        )
    photos = argv[1:]
    check_photos(photos)
    out, description = choose_picture_path(_OUT, photos) if _OUT.value else ("", "")
    from flax_cnns.runs import predict as prediction
    from flax_cnns.runs import tables

    if _WORKDIR.value:
        predictor = prediction.make_predictor_from_folder(
            _WORKDIR.value,
            _CHECKPOINT.value,
            trust=_TRUST.value,
            calibrated=_CALIBRATED.value,
        )
    else:
        source, _, file = _WEIGHTS.value.partition("=")
        predictor = prediction.make_predictor_from_weights(_MODEL.value, source, file or None)
    if _CROPS.value:
        predictor = prediction.use_crops(predictor, _CROPS.value)
    guesses = prediction.predict(predictor, photos, _TOP.value)
    tables.print_predictions(predictor.title, prediction.name_photos(photos), guesses)
    if out:
        drawn = prediction.draw_photos(predictor, photos, guesses, out)
        part = f": the first {drawn} of {len(photos)} photos" if drawn < len(photos) else ""
        print(f"written to {description}{part}")
