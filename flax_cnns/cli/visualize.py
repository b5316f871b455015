"""Draws what a network sees, and the loss around its weights.

saliency: maps of the pixels that matter for a class. quality: how good such maps are. features:
channels of a module's output. filters: those of the first convolution. patches: the image patches
that excite a channel most. units: images that make a channel or a logit large. dream: DeepDream.
activations: histograms and gradient norms by layer. initialization: the lectures' experiment on
initial weights. landscape, line, trajectory: the loss on a plane, between two runs, around a run's
path. curvature: a table of Hessian eigenvalues. docs/visualize.md has pictures and commands.

flax-cnns visualize saliency --workdir=runs/digits --methods=gradient,grad_cam --images=6
flax-cnns visualize saliency --model=tf_efficientnet_lite0 --weights=efficientnet_lite cat.jpg
flax-cnns visualize quality --workdir=runs/digits --methods=gradient,grad_cam --images=50
flax-cnns visualize features --workdir=runs/digits --path=conv1
flax-cnns visualize filters --workdir=runs/digits
flax-cnns visualize patches --workdir=runs/fashion --path=conv3 --units=0,1,2,3
flax-cnns visualize units --workdir=runs/digits --units=0,1,2,3
flax-cnns visualize units --model=tf_efficientnet_lite0 --weights=efficientnet_lite \\
    --units=goldfish,toucan --parameters=maco --size=384
flax-cnns visualize dream --model=tf_efficientnet_lite0 --weights=efficientnet_lite \\
    --path=stage5 cat.jpg
flax-cnns visualize activations --workdir=runs/digits
flax-cnns visualize activations --config=digits_resnet20 --config.model.init=lsuv
flax-cnns visualize activations --model=vgg16 --init=xavier
flax-cnns visualize initialization
flax-cnns visualize landscape --workdir=runs/digits --beside=runs/other --surface
flax-cnns visualize line --workdir=runs/digits --to=runs/other@best
flax-cnns visualize trajectory --workdir=runs/digits
flax-cnns visualize curvature --workdir=runs/digits --eigenvalues=3

Photos are prepared as `predict` does. Without photos, a run shows the first images of its test
split. --path is a module's path, as `inspect` lists it without params/.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags

from flax_cnns.cli import visualize_layers, visualize_units
from flax_cnns.cli import visualize_losses as losses
from flax_cnns.cli.flags import (
    choose_picture_path,
    define_accept,
    define_arguments,
    define_commands,
    define_config,
    define_trust,
)
from flax_cnns.cli.network_flags import check_network_flags
from flax_cnns.data.images import check_photos
from flax_cnns.errors import UserError

if TYPE_CHECKING:
    from flax_cnns.runs.subject import Subject

_MODEL = flags.DEFINE_string("model", "", "The network whose published weights are used.")
_WEIGHTS = flags.DEFINE_string("weights", "", "The published weights: SOURCE or SOURCE=FILE.")
_WORKDIR = flags.DEFINE_string(
    "workdir", "", "A run's directory: RUN, RUN@best, RUN@latest or RUN@STEP."
)
_SPLIT = flags.DEFINE_string(
    "split",
    "test",
    "The split of a run whose images are used. landscape, trajectory and curvature take train by"
    " default, line takes train,test.",
)
_IMAGES = flags.DEFINE_integer(
    "images",
    6,
    "Number of images of that split. landscape, line, trajectory and curvature take 512 by default,"
    " activations all.",
    lower_bound=1,
)
_METHODS = flags.DEFINE_list(
    "methods",
    ["gradient", "smooth_grad", "integrated_gradients", "grad_cam", "layer_cam"],
    "saliency, quality: gradient, gradient_times_input, smooth_grad, integrated_gradients, cam,"
    " grad_cam, grad_cam_plus_plus, layer_cam, occlusion, rise, guided_backprop, deconvnet.",
)
_CLASS = flags.DEFINE_integer(
    "class",
    -1,
    "saliency, quality: the class to explain; -1: the one that the network predicts.",
    lower_bound=-1,
)
_PATH = flags.DEFINE_string(
    "path",
    "",
    "The module to look at; patches and dream need it. units and activations also take several:"
    " PATH,PATH,...",
)
flags.DEFINE_list(
    "units",
    ["0", "1", "2", "3"],
    "units, patches: channels of the module. units: names of classes too, for logits.",
)
flags.DEFINE_string(
    "objective",
    "channel",
    "units: channel (the mean over a map), or neuron (the middle of the map).",
)
flags.DEFINE_string(
    "direction", "", "units: a .npy file, [C] or [K C]: directions in place of units."
)
flags.DEFINE_string("parameters", "fourier", "units: what is optimized: fourier, pixels, or maco.")
flags.DEFINE_integer("count", 1, "units: images of each unit.", lower_bound=1)
flags.DEFINE_float(
    "diverse", 0.0, "units: weight with which the --count images are made to differ."
)
flags.DEFINE_integer("crops", 32, "units: maco's crops in each step.", lower_bound=1)
flags.DEFINE_integer(
    "crop-size", 0, "units: side of maco's crops in pixels; 0: the network's.", lower_bound=0
)
flags.DEFINE_integer(
    "steps",
    0,
    "Steps of gradient ascent; 0: 512 for units, 256 with maco, 10 in each octave of dream.",
    lower_bound=0,
)
flags.DEFINE_float(
    "rate", 0.0, "Size of a step; 0: 0.05 for units, 1 with maco, 0.01 for dream.", lower_bound=0.0
)
flags.DEFINE_integer("size", 0, "units: side of the images in pixels; 0: the network's.")
flags.DEFINE_integer(
    "octaves",
    0,
    "dream: number of sizes of the photo; 0: 3, or fewer if the photo is too small.",
    lower_bound=0,
)
flags.DEFINE_integer(
    "unit", -1, "dream: the channel to enlarge; -1: the whole output.", lower_bound=-1
)
flags.DEFINE_integer("tile", 224, "dream: side of a tile in pixels.", lower_bound=1)
_SEED = flags.DEFINE_integer(
    "seed", 0, "The seed of random numbers: equal seeds give equal pictures."
)
flags.DEFINE_integer("layers", 6, "initialization: number of dense layers.", lower_bound=1)
flags.DEFINE_integer("width", 4096, "initialization: units of a layer.", lower_bound=1)
flags.DEFINE_bool(
    "as-printed",
    False,
    "initialization: add rows with the weights that the decks' wrong code gives.",
)
flags.DEFINE_integer(
    "grid", 25, "landscape, line, trajectory: points along each axis.", lower_bound=2
)
flags.DEFINE_float("span", 1.0, "landscape: the axes go from minus this to this.", lower_bound=1e-6)
flags.DEFINE_list(
    "beside",
    [],
    "landscape, curvature: other runs, which are drawn next to this one, or added to the table.",
)
flags.DEFINE_bool("surface", False, "landscape: draw surfaces, too.")
flags.DEFINE_string(
    "to", "", "line: the run at the other end: RUN, RUN@best, RUN@latest or RUN@STEP."
)
flags.DEFINE_string(
    "batchnorm",
    "running",
    "landscape, line, trajectory, curvature, activations: the statistics that BatchNorm uses."
    " running: those of the checkpoint, which are interpolated on a line. batch: those of each"
    " batch, the default of activations that show an initialization. reestimate (only line): those"
    " of training batches, computed at each point.",
)
flags.DEFINE_integer(
    "eigenvalues", 1, "curvature: number of eigenvalues of the Hessian.", lower_bound=1
)
flags.DEFINE_float(
    "rho", 0.05, "curvature: length of the step of SAM's sharpness.", lower_bound=1e-9
)
flags.DEFINE_string(
    "init", "", "activations: initializer of a --model without weights, such as he or lsuv."
)
define_config("")
_TRUST = define_trust()
_ACCEPT = define_accept()
_OUT = flags.DEFINE_string(
    "out",
    "",
    "The picture to write; curvature writes a CSV file. The default is KIND.png, or KIND-2.png if"
    " that file exists, and so on: then no file is replaced.",
)


def _draw_saliency(subject: Subject, out: str, photos: list[str]) -> None:
    from flax_cnns.runs.visualize.saliency import draw_saliency

    classes = None if _CLASS.value < 0 else _CLASS.value
    explained = draw_saliency(
        subject,
        out,
        methods=_METHODS.value,
        classes=classes,
        path=_PATH.value or None,
        seed=_SEED.value,
    )
    for name, label in zip(subject.names, explained):
        print(f"{name}: explained as {label}")


def _draw_quality(subject: Subject, out: str, photos: list[str]) -> None:
    from flax_cnns.names import make_console
    from flax_cnns.runs.visualize import quality

    table = quality.draw_quality(
        subject,
        out,
        methods=_METHODS.value,
        classes=None if _CLASS.value < 0 else _CLASS.value,
        path=_PATH.value or None,
        seed=_SEED.value,
    )
    width = None if sys.stdout.isatty() else 200  # lines of a log need no wrapping
    make_console(width=width).print(quality.make_rich_table(table))


def _draw_features(subject: Subject, out: str, photos: list[str]) -> None:
    from flax_cnns.runs.visualize.channels import draw_features

    if len(photos) > 1:
        raise UserError(f"features draws the channels of one image, got {len(photos)} photos")
    print(f"output of {draw_features(subject, out, _PATH.value or None)}")


def _draw_filters(subject: Subject, out: str, photos: list[str]) -> None:
    from flax_cnns.runs.visualize.channels import draw_filters

    print(f"kernel {draw_filters(subject, out)}")


class Kind(NamedTuple):
    """What `visualize KIND` does."""

    # (subject, picture's path, photos); the subject is None if the kind takes none
    draw: Callable[[Any, str, list[str]], None]
    flags: tuple[str, ...]  # the flags that this kind takes besides those of every kind
    required: tuple[str, ...] = ()  # of these, the flags that it needs
    # Whether it looks at one network with some images. Other kinds read their flags themselves.
    subject: bool = True
    photos: bool = False  # whether a kind without a subject takes photos
    suffix: str = ".png"  # of the file without --out


_LOSS = ("workdir", "split", "images", "batchnorm", "seed", "trust", "accept-changed-data")
# Every kind takes --out, and every kind with a subject these flags.
_COMMON = ("model", "weights", "workdir", "split", "trust", "accept-changed-data")
KINDS = {
    "saliency": Kind(_draw_saliency, ("images", "methods", "class", "path", "seed")),
    "quality": Kind(_draw_quality, ("images", "methods", "class", "path", "seed")),
    "features": Kind(_draw_features, ("path",)),
    "filters": Kind(_draw_filters, ()),
    "patches": Kind(visualize_layers.draw_patches, ("path", "units"), required=("path",)),
    "units": Kind(
        visualize_units.draw_units,
        (
            *("path", "units", "objective", "direction", "parameters", "count", "diverse"),
            *("crops", "crop-size", "images", "steps", "rate", "size", "seed"),
        ),
    ),
    "dream": Kind(
        visualize_units.draw_dream,
        ("path", "unit", "octaves", "tile", "steps", "rate", "seed"),
        required=("path",),
    ),
    "activations": Kind(
        visualize_layers.draw_activations,
        (*_COMMON, "config", "init", "images", "path", "batchnorm", "seed"),
        subject=False,
        photos=True,
    ),
    "initialization": Kind(
        visualize_layers.draw_initialization,
        ("layers", "width", "as-printed", "seed"),
        subject=False,
    ),
    "landscape": Kind(
        losses.draw_landscape,
        (*_LOSS, "grid", "span", "beside", "surface"),
        required=("workdir",),
        subject=False,
    ),
    "line": Kind(
        losses.draw_line, (*_LOSS, "grid", "to"), required=("workdir", "to"), subject=False
    ),
    "trajectory": Kind(
        losses.draw_trajectory, (*_LOSS, "grid"), required=("workdir",), subject=False
    ),
    "curvature": Kind(
        losses.tabulate_curvature,
        (*_LOSS, "beside", "eigenvalues", "rho"),
        required=("workdir",),
        subject=False,
        suffix=".csv",
    ),
}
define_commands(*KINDS)
define_arguments("photos (files)", "[PHOTO...]", least=0)


def visualize(argv: list[str]) -> None:
    name, photos = argv[1], argv[2:]
    kind = KINDS[name]
    _check_flags(name, kind)
    out, description = choose_picture_path(_OUT, photos, default=f"{name}{kind.suffix}")
    if kind.suffix == ".png" and name != "dream":  # dream writes a photo, not a figure
        from flax_cnns.analysis.plots.style import check_suffix

        check_suffix(out)
    subject = None
    if kind.subject:
        subject = _make_subject(photos)
        print(subject.title)
    elif photos and not kind.photos:
        raise UserError(f"{name} takes no photos, got {photos[0]!r}")
    kind.draw(subject, out, photos)
    print(f"written to {description}")


def _make_subject(photos: list[str]) -> Subject:
    """Returns the network that the flags name, with its images. Raises UserError."""
    check_network_flags(_WORKDIR.value, _MODEL.value, _WEIGHTS.value)
    if photos:
        check_photos(photos)
        for flag_name in ("images", "split"):
            if flags.FLAGS[flag_name].present:
                raise UserError(
                    f"--{flag_name} selects images of a run's data, but photos are given"
                )
    from flax_cnns.runs import subject as subjects

    if _WORKDIR.value:
        return subjects.make_subject_from_run(
            _WORKDIR.value,
            photos=photos,
            split=_SPLIT.value,
            count=_IMAGES.value,
            trust=_TRUST.value,
            accept_changed_data=_ACCEPT.value,
        )
    source, _, file = _WEIGHTS.value.partition("=")
    return subjects.make_subject_from_weights(_MODEL.value, source, file or None, photos=photos)


def _check_flags(name: str, kind: Kind) -> None:
    """Raises UserError for a flag that this kind does not take, and for one that it lacks."""
    known = [*flags.FLAGS.flags_by_module_dict()[__name__], flags.FLAGS["config"]]
    for flag in known:
        if flag.present and flag.name not in ("out", *_flags(kind)):
            takers = [other for other, each in KINDS.items() if flag.name in _flags(each)]
            raise UserError(f"{name} takes no --{flag.name}; {', '.join(takers)} would")
    for flag_name in kind.required:
        if not flags.FLAGS[flag_name].value:
            raise UserError(f"{name}: expected --{flag_name}")


def _flags(kind: Kind) -> tuple[str, ...]:
    return (*_COMMON, *kind.flags) if kind.subject else kind.flags
