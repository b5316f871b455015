"""Draws what a network sees: saliency, features, filters, what its units want, DeepDream.

flax-cnns visualize saliency --workdir=runs/digits --methods=gradient,grad_cam --images=6
flax-cnns visualize saliency --model=tf_efficientnet_lite0 --weights=efficientnet_lite cat.jpg
flax-cnns visualize features --workdir=runs/digits --path=conv1
flax-cnns visualize filters --workdir=runs/digits
flax-cnns visualize units --workdir=runs/digits --units=0,1,2,3
flax-cnns visualize dream --model=tf_efficientnet_lite0 --weights=efficientnet_lite \
    --path=stage5 cat.jpg

Photos are prepared as `predict` does. Without photos, a run shows the first images of its test
split. --path is a module's path, as `inspect` lists it without params/.
"""

from __future__ import annotations

from absl import flags

from flax_cnns.cli.flags import (
    choose_picture_path,
    define_arguments,
    define_commands,
    define_trust,
)
from flax_cnns.data.images import check_photos
from flax_cnns.errors import UserError

KINDS = ("saliency", "features", "filters", "units", "dream")

_MODEL = flags.DEFINE_string("model", "", "The network whose published weights are used.")
_WEIGHTS = flags.DEFINE_string("weights", "", "The published weights: SOURCE or SOURCE=FILE.")
_WORKDIR = flags.DEFINE_string(
    "workdir", "", "A run's directory: RUN, RUN@best, RUN@latest or RUN@STEP."
)
_SPLIT = flags.DEFINE_string("split", "test", "The split of a run whose images are shown.")
_IMAGES = flags.DEFINE_integer("images", 6, "Number of images of that split.", lower_bound=1)
_METHODS = flags.DEFINE_list(
    "methods",
    ["gradient", "smooth_grad", "integrated_gradients", "grad_cam", "layer_cam"],
    "saliency: gradient, gradient_times_input, smooth_grad, integrated_gradients, cam, grad_cam,"
    " grad_cam_plus_plus, layer_cam, occlusion, rise, guided_backprop, deconvnet.",
)
_CLASS = flags.DEFINE_integer(
    "class", -1, "saliency: the class to explain; -1: the one that the network predicts."
)
_PATH = flags.DEFINE_string("path", "", "The module to look at; dream needs it.")
_UNITS = flags.DEFINE_list("units", ["0", "1", "2", "3"], "units: channels of the module.")
_STEPS = flags.DEFINE_integer("steps", 256, "units: steps of gradient ascent.", lower_bound=1)
_SIZE = flags.DEFINE_integer("size", 0, "units: side of the images in pixels; 0: the network's.")
_SEED = flags.DEFINE_integer("seed", 0, "Of random numbers: equal seeds give equal pictures.")
_TRUST = define_trust()
_OUT = flags.DEFINE_string(
    "out",
    "",
    "The picture to write. Without this flag it is saliency.png and so on, and no file is"
    " replaced: if saliency.png exists, saliency-2.png is written.",
)
define_commands(*KINDS)
define_arguments("photos (files)", "[PHOTO...]", least=0)


def visualize(argv: list[str]) -> None:
    kind, photos = argv[1], argv[2:]
    if bool(_WORKDIR.value) == bool(_MODEL.value or _WEIGHTS.value):
        raise UserError("expected --model=NAME --weights=SOURCE, or --workdir=RUN")
    if bool(_MODEL.value) != bool(_WEIGHTS.value):
        raise UserError("expected both --model=NAME and --weights=SOURCE, got one of them")
    if photos:
        check_photos(photos)
    try:
        units = [int(unit) for unit in _UNITS.value]
    except ValueError:
        raise UserError(f"--units: expected whole numbers, got {_UNITS.value}") from None
    from flax_cnns.runs import subject as subjects
    from flax_cnns.runs import visualize as pictures

    if _WORKDIR.value:
        subject = subjects.make_subject_from_run(
            _WORKDIR.value,
            photos=photos,
            split=_SPLIT.value,
            count=_IMAGES.value,
            trust=_TRUST.value,
        )
    else:
        source, _, file = _WEIGHTS.value.partition("=")
        subject = subjects.make_subject_from_weights(
            _MODEL.value, source, file or None, photos=photos
        )
    print(subject.title)
    out, description = choose_picture_path(_OUT, photos, default=f"{kind}.png")
    path = _PATH.value or None
    if kind == "saliency":
        classes = None if _CLASS.value < 0 else _CLASS.value
        explained = pictures.draw_saliency(
            subject, out, methods=_METHODS.value, classes=classes, path=path, seed=_SEED.value
        )
        for name, label in zip(subject.names, explained):
            print(f"{name}: explained as {label}")
    elif kind == "features":
        print(f"output of {pictures.draw_features(subject, out, path)}")
    elif kind == "filters":
        print(f"kernel {pictures.draw_filters(subject, out)}")
    elif kind == "units":
        pictures.draw_units(
            subject,
            out,
            _PATH.value,
            units,
            steps=_STEPS.value,
            size=_SIZE.value,
            seed=_SEED.value,
        )
    else:
        if path is None:
            raise UserError("dream: expected --path, the module whose output is made larger")
        photo = photos[0] if photos else None
        pictures.draw_dream(subject, out, path, photo=photo, seed=_SEED.value)
    print(f"written to {description}")
