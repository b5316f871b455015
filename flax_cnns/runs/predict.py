"""Classifies photos with a run's network, or with published weights and their preprocessing."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from PIL import Image

from flax_cnns import config as configs
from flax_cnns import weights
from flax_cnns.analysis.plots import predictions
from flax_cnns.checkpoint import reading
from flax_cnns.data import images
from flax_cnns.data.images import Photo, open_photo
from flax_cnns.errors import UserError
from flax_cnns.evaluation.crops import PAPERS_SHARE, CropGroup, list_views
from flax_cnns.models import registry
from flax_cnns.runs import workdir as workdirs
from flax_cnns.runs.load import load_run
from flax_cnns.runs.temperature import read_temperature
from flax_cnns.train.mirror import average_mirrored
from flax_cnns.types import Array, PyTree

Prediction = tuple[str, float]  # a class and its probability
MAX_CROPS = 12  # of a photo at once; 144 is a multiple, so that one shape is compiled


class Predictor(NamedTuple):
    """A network that classifies photos."""

    title: str
    read: Callable[[Photo], np.ndarray]  # -> [V H W C], the input of `probabilities`; V crops
    box: Callable[[int, int], images.Box]  # (width, height) of an image -> the part that is used
    probabilities: Callable[[np.ndarray], Array]  # -> f32 [V K]
    class_names: Sequence[str]  # [K]
    crops: CropReading | None = None  # None: the predictor takes no crops


class CropReading(NamedTuple):
    """How a predictor reads crops of a photo."""

    size: int  # height and width that the network takes
    channels: int
    resample: Image.Resampling
    prepare: Callable[[np.ndarray], np.ndarray]  # u8 [V H W C] -> the input of `probabilities`
    decoder: str = "pillow"  # a value of `data.decoder`


def use_crops(predictor: Predictor, crops: str) -> Predictor:
    """Returns a predictor that averages the probabilities of several crops of each photo.

    `crops`: 5, 10 or 144, as in `evaluation.crops.list_views`; 1 is one central crop of the whole
    shorter side. Raises UserError.
    """
    group = CropGroup(1.0, list_views(crops, 1.0 if crops == "1" else PAPERS_SHARE))
    how = predictor.crops
    if how is None:
        raise UserError(f"{predictor.title} takes no crops")

    def read(photo: Photo) -> np.ndarray:
        with open_photo(photo) as image:
            crops = group.read(image, how.size, how.channels, how.resample, how.decoder)
            return how.prepare(crops)

    def box(width: int, height: int) -> images.Box:
        boxes = [view.box(width, height) for view in group.views]
        left, top, right, bottom = zip(*boxes)
        return min(left), min(top), max(right), max(bottom)

    count = len(group.views)
    title = f"{predictor.title}, {count} crop{'s' if count > 1 else ''}"
    return predictor._replace(title=title, read=read, box=box)


def predict(
    predictor: Predictor, photos: Sequence[Photo], max_classes: int = 5
) -> list[list[Prediction]]:
    """Returns the `max_classes` most likely classes of each photo, the most likely first.

    Raises UserError if a photo cannot be read.
    """
    results = []
    for photo in photos:
        probabilities = _average_crops(predictor, predictor.read(photo))
        top = np.argsort(-probabilities, kind="stable")[:max_classes]
        results.append([(predictor.class_names[k], float(probabilities[k])) for k in top])
    return results


def _average_crops(predictor: Predictor, crops: np.ndarray) -> np.ndarray:
    """Returns f32 [K], the mean probabilities of crops [V H W C]."""
    parts = [crops[first : first + MAX_CROPS] for first in range(0, len(crops), MAX_CROPS)]
    return np.concatenate([np.asarray(predictor.probabilities(part)) for part in parts]).mean(0)


def name_photos(photos: Sequence[Photo]) -> list[str]:
    """Returns the files' names, with folders if two names are equal; numbers for arrays."""
    paths = [
        pathlib.Path(photo) if isinstance(photo, str | os.PathLike) else pathlib.Path(f"photo {i}")
        for i, photo in enumerate(photos, 1)
    ]
    names = [path.name for path in set(paths)]
    return [str(p) if names.count(p.name) > 1 else p.name for p in paths]


def make_predictor_from_weights(
    model_name: str, source: str, path: str | os.PathLike | None = None
) -> Predictor:
    """Makes a predictor with the weights of `load_weights(model_name, source, path)`.

    Classes have ImageNet's names, or numbers if the file has another number of classes. Raises
    UserError.
    """
    transform = weights.preprocessing(model_name, source)
    opened = weights.open_weights(model_name, source, path)
    for note in opened.notes:
        print(f"note: {note}")
    head = opened.tree["params"].get("head")
    transform = transform._replace(num_classes=0 if head is None else head["kernel"].shape[-1])
    model, transform = _make_classifier(model_name, source, transform, opened.input_size)
    title = f"{model_name}, {source}'s weights"
    return _make_predictor(title, transform, model, opened.tree)


def make_predictor_from_folder(
    folder: str | os.PathLike,
    checkpoint: str = "",
    *,
    trust: bool = False,
    calibrated: bool = False,
) -> Predictor:
    """Makes a predictor from a run, or from a folder that `experiments.convert` wrote.

    A run is RUN, RUN@best, RUN@latest or RUN@1200; `checkpoint` may name the checkpoint instead.
    `trust`, `calibrated`: see `make_predictor_from_run`. Raises UserError.
    """
    folder, checkpoint = workdirs.split_checkpoint(folder, checkpoint)
    if not os.path.isfile(folder / "about.json"):
        return make_predictor_from_run(folder, checkpoint, trust=trust, calibrated=calibrated)
    if calibrated:
        raise UserError(
            f"{folder} holds converted weights, which have no temperature; remove --calibrated, or"
            " name a run"
        )
    if checkpoint:
        raise UserError(
            f"{folder} holds converted weights, which have no checkpoints; remove"
            f" --checkpoint={checkpoint}"
        )
    return make_predictor_from_converted(folder)


def make_predictor_from_converted(folder: str | os.PathLike) -> Predictor:
    """Makes a predictor from a folder that `experiments.convert` wrote. Raises UserError."""
    folder = pathlib.Path(folder)
    about = workdirs.read_json(folder / "about.json")
    try:
        name, source = about["model"], about["source"]
        transform = weights.Preprocessing.from_dict(about["preprocessing"])
        default_size = registry.create_model(name).input_size
        height, width, channels = about.get("input_size", default_size)  # absent in old folders
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problem = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(
            f"{folder}/about.json is not as experiments.convert writes it ({problem}); convert"
            " the weights again"
        ) from None
    model, transform = _make_classifier(name, source, transform, (height, width, channels))
    shapes = jax.eval_shape(partial(registry.init_variables, model), jax.random.key(0))
    variables = reading.read_tree(folder, shapes)
    return _make_predictor(f"{name}, {source}'s weights", transform, model, variables)


def _make_classifier(
    model_name: str, source: str, transform: weights.Preprocessing, input_size: tuple[int, ...]
) -> tuple[nn.Module, weights.Preprocessing]:
    """Returns the network for images of `input_size`, and their preprocessing.

    The preprocessing uses the same fraction of a photo as `transform`, scaled to `input_size`.
    """
    if not transform.num_classes:
        raise UserError(f"{model_name} from {source}: these weights have no classifier")
    default_size = registry.create_model(model_name).input_size
    height, width, channels = input_size
    if channels != 3 or height != width:
        raise UserError(
            f"{model_name} from {source}: these weights take images {list(input_size)}, but photos"
            " are prepared as squares of 3 channels; graft them into a run (config.graft.source)"
        )
    fields: dict[str, Any] = {}
    if input_size != default_size:
        transform = transform._replace(
            size=height, resize=round(transform.resize * height / transform.size)
        )
        fields["input_size"] = input_size
    return registry.create_model(model_name, num_classes=transform.num_classes, **fields), transform


def _make_predictor(
    title: str, transform: weights.Preprocessing, model: nn.Module, variables: PyTree
) -> Predictor:
    names = transform.class_names() or tuple(map(str, range(transform.num_classes)))
    return Predictor(
        title,
        transform.__call__,
        transform.box,
        _make_probabilities(model, variables),
        names,
        CropReading(
            transform.size,
            3,
            Image.Resampling[transform.interpolation.upper()],
            transform.normalize,
        ),
    )


def make_predictor_from_run(
    workdir: str | os.PathLike,
    checkpoint: str = "",
    *,
    trust: bool = False,
    calibrated: bool = False,
) -> Predictor:
    """Makes a predictor with a run's network, which prepares photos like the run's own images.

    The data set is not needed. `checkpoint`: best, latest, a step, or "" for what RUN alone means
    (see `finding.choose_step`). `trust` allows importing a network of the user's own. `calibrated`:
    whether logits are divided by the temperature in the run's `calibration.json`. Raises UserError,
    also if that file is missing or of another step.
    """
    loaded = load_run(workdir, checkpoint, trust=trust)
    config, dataset, model = loaded.config, loaded.dataset, loaded.network
    variables, step, why = loaded.variables, loaded.step, loaded.checkpoint
    workdir, _ = workdirs.split_checkpoint(workdir, checkpoint)
    temperature = read_temperature(workdir, step) if calibrated else 1.0
    scaled = f", temperature {temperature:.4g}" if calibrated else ""
    if problems := configs.find_problems(config):
        print(configs.format_note(workdir, problems))
    if dataset.task != "classes":
        raise UserError(f"{workdir}: a run on {dataset.task} data has no most likely class")
    if not dataset.normalize:
        raise UserError(
            f"{workdir}: the run was trained with normalize=False, so photos cannot be prepared"
            " like its images"
        )
    height, size, channels = dataset.image_shape
    if height != size:
        raise UserError(
            f"{workdir}: its images are {height}x{size}, but photos are prepared as squares"
        )
    box, decoder = partial(images.center_box, share=dataset.eval_share), config.data.decoder

    def read(photo: Photo) -> np.ndarray:
        with open_photo(photo) as image:
            return images.read_box(image, box, size, channels, decoder)[None]

    normalize = loaded.preprocessing
    return Predictor(
        f"{workdir.name}, step {step} ({why}): {config.model.name} on {dataset.name}{scaled}",
        read,
        box,
        _make_probabilities(model, variables, normalize, temperature, config.train.eval_flip),
        loaded.class_names,
        CropReading(size, channels, Image.Resampling.BILINEAR, lambda pixels: pixels, decoder),
    )


def draw_photos(
    predictor: Predictor,
    photos: Sequence[Photo],
    guesses: Sequence[Sequence[Prediction]],
    png: str | os.PathLike,
) -> int:
    """Draws each photo beside its predicted classes into a PNG file.

    Returns the number of photos drawn, at most `predictions.MAX_PHOTOS`. Raises UserError.
    """
    shown = []
    for name, photo in zip(name_photos(photos), photos[: predictions.MAX_PHOTOS]):
        with open_photo(photo) as image:
            whole = images.load_upright(image, 3).copy()
            shown.append((name, whole, predictor.box(*whole.size)))
    predictions.draw_predictions(shown, guesses, png, predictor.title)
    return len(shown)


def _make_probabilities(
    model: nn.Module,
    variables: PyTree,
    normalize: Callable[[Array], Array] = lambda x: x,
    temperature: float = 1.0,
    flip: bool = False,
) -> Callable[[Any], Array]:
    apply = average_mirrored(model.apply) if flip else model.apply

    @jax.jit
    def softmax(variables: PyTree, images: Array) -> Array:
        logits: Any = apply(variables, normalize(images), train=False)
        return jax.nn.softmax(logits / temperature)

    return partial(softmax, jax.device_put(variables))
