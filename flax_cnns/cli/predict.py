"""What a network says of photographs: the likeliest classes as a table and as a picture.

flax-cnns predict --model=tf_efficientnet_lite0 --weights=efficientnet_lite cat.jpg
flax-cnns predict --model=resnet50 --weights=torchvision=resnet50.pth cat.jpg dog.png
flax-cnns predict --workdir=runs/flowers@best mine.jpg
flax-cnns predict --workdir=weights/resnet50 cat.jpg

Published weights go with the preprocessing that they were evaluated with, also those that
convert made a checkpoint of; a run with its own.
--weights names whose they are (torchvision, timm, keras, efficientnet_lite) and, behind a =, the
file; without one they are downloaded once.
"""

from __future__ import annotations

from absl import flags

from flax_cnns.cli.flags import choose_picture_path, define_arguments, define_trust
from flax_cnns.data.images import check_photos
from flax_cnns.errors import UserError

_MODEL = flags.DEFINE_string("model", "", "The network whose published weights are taken.")
_WEIGHTS = flags.DEFINE_string("weights", "", "SOURCE or SOURCE=FILE.")
_WORKDIR = flags.DEFINE_string(
    "workdir",
    "",
    "A run's directory (RUN, RUN@best, RUN@latest, RUN@STEP), or what convert wrote, in"
    " place of these two.",
)
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    "",
    "Of a run: best, latest or a step. Without this flag: the one that was tested for its"
    " summary.json; in an unfinished run, the latest.",
)
_TOP = flags.DEFINE_integer("top", 5, "How many classes are shown.", lower_bound=1)
_TRUST = define_trust()
_OUT = flags.DEFINE_string(
    "out",
    "predictions.png",
    'The picture; "" for none. Without this flag no file is replaced: predictions-2.png is next.',
)
define_arguments("the files of one or more photos", "PHOTO...")


def predict(argv: list[str]) -> None:
    if bool(_WORKDIR.value) == bool(_MODEL.value or _WEIGHTS.value):
        raise UserError("expected --model=NAME --weights=SOURCE, or --workdir=RUN")
    if bool(_MODEL.value) != bool(_WEIGHTS.value):
        raise UserError("--model=NAME and --weights=SOURCE go together")
    if _CHECKPOINT.value and not _WORKDIR.value:
        raise UserError("--checkpoint is one of a run's: it goes with --workdir=RUN")
    photos = argv[1:]
    check_photos(photos)
    out, told = choose_picture_path(_OUT, photos) if _OUT.value else ("", "")
    from flax_cnns.runs import predict as prediction
    from flax_cnns.runs import tables

    if _WORKDIR.value:
        predictor = prediction.make_predictor_from_folder(
            _WORKDIR.value, _CHECKPOINT.value, trust=_TRUST.value
        )
    else:
        source, _, file = _WEIGHTS.value.partition("=")
        predictor = prediction.make_predictor_from_weights(_MODEL.value, source, file or None)
    guesses = prediction.predict(predictor, photos, _TOP.value)
    tables.print_predictions(predictor.title, prediction.name_photos(photos), guesses)
    if out:
        drawn = prediction.draw_photos(predictor, photos, guesses, out)
        part = f": the first {drawn} of {len(photos)} photos" if drawn < len(photos) else ""
        print(f"written to {told}{part}")
