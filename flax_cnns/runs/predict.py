"""What a network says of photographs: published weights with their own preprocessing, or a run."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from flax_cnns import config as configs
from flax_cnns import weights
from flax_cnns.analysis.plots import predictions
from flax_cnns.checkpoint import reading
from flax_cnns.data import images
from flax_cnns.data.images import Photo, open_photo
from flax_cnns.errors import UserError
from flax_cnns.models import registry
from flax_cnns.runs import workdir as workdirs
from flax_cnns.runs.load import load_run
from flax_cnns.types import Array, PyTree

Prediction = tuple[str, float]  # a class and its probability


class Predictor(NamedTuple):
    title: str
    read: Callable[[Photo], np.ndarray]  # -> [1 H W C], what `probabilities` takes
    box: Callable[[int, int], images.Box]  # what is seen of an image of that width and height
    probabilities: Callable[[np.ndarray], Array]  # -> f32 [1 K]
    class_names: Sequence[str]  # [K]


def predict(predictor: Predictor, photos: Sequence[Photo], most: int = 5) -> list[list[Prediction]]:
    """The `most` likeliest classes of each photo, the likeliest first. Raises `UserError` for a
    photo that cannot be read."""
    found = []
    for photo in photos:
        share = np.asarray(predictor.probabilities(predictor.read(photo)))[0]
        top = np.argsort(-share, kind="stable")[:most]
        found.append([(predictor.class_names[k], float(share[k])) for k in top])
    return found


def name_photos(photos: Sequence[Photo]) -> list[str]:
    """The files' names, with their folders where two are the same; numbers for arrays."""
    paths = [
        pathlib.Path(photo) if isinstance(photo, str | os.PathLike) else pathlib.Path(f"photo {i}")
        for i, photo in enumerate(photos, 1)
    ]
    names = [path.name for path in set(paths)]
    return [str(p) if names.count(p.name) > 1 else p.name for p in paths]


def make_predictor_from_weights(
    model_name: str, source: str, path: str | os.PathLike | None = None
) -> Predictor:
    """The network with `load_weights(model_name, source, path)`.

    Classes have ImageNet's names, or numbers where the file has another number of them. Raises
    `UserError`.
    """
    row = weights.preprocessing(model_name, source)
    found = weights.open_weights(model_name, source, path)
    for note in found.notes:
        print(f"note: {note}")
    head = found.tree["params"].get("head")
    row = row._replace(num_classes=0 if head is None else head["kernel"].shape[-1])
    model, row = _with_classifier(model_name, source, row, found.input_size)
    return _of_row(f"{model_name}, {source}'s weights", row, model, found.tree)


def make_predictor_from_folder(
    folder: str | os.PathLike, checkpoint: str = "", *, trust: bool = False
) -> Predictor:
    """Of a run (RUN, RUN@best, RUN@latest, RUN@1200; `checkpoint` may name it instead), or of what
    `experiments.convert` wrote. `trust`: as `from_run` has it. Raises `UserError`."""
    folder, checkpoint = workdirs.split_checkpoint(folder, checkpoint)
    if not os.path.isfile(folder / "about.json"):
        return make_predictor_from_run(folder, checkpoint, trust=trust)
    if checkpoint:
        raise UserError(
            f"{folder} holds converted weights, which are one checkpoint: leave out --checkpoint,"
            f" got {checkpoint!r}"
        )
    return make_predictor_from_converted(folder)


def make_predictor_from_converted(folder: str | os.PathLike) -> Predictor:
    """The network that `experiments.convert` wrote into a folder. Raises `UserError`."""
    folder = pathlib.Path(folder)
    about = workdirs.read_json(folder / "about.json")
    try:
        name, source = about["model"], about["source"]
        row = weights.Preprocessing.from_dict(about["preprocessing"])
        own = registry.create_model(name).input_size
        height, width, channels = about.get("input_size", own)  # that came later
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        said = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(
            f"{folder}/about.json is not as experiments.convert writes it ({said}); convert the"
            " weights again"
        ) from None
    model, row = _with_classifier(name, source, row, (height, width, channels))
    shapes = jax.eval_shape(partial(registry.init_variables, model), jax.random.key(0))
    variables = reading.read_tree(folder, shapes)
    return _of_row(f"{name}, {source}'s weights", row, model, variables)


def _with_classifier(
    model_name: str, source: str, row: weights.Preprocessing, input_size: tuple[int, ...]
) -> tuple[nn.Module, weights.Preprocessing]:
    """The network for images of `input_size`, and how these are prepared: the same share of a
    photo, at their size."""
    if not row.num_classes:
        raise UserError(f"{model_name} from {source}: these weights have no classifier")
    own = registry.create_model(model_name).input_size
    height, width, channels = input_size
    if channels != 3 or height != width:
        raise UserError(
            f"{model_name} from {source}: these weights take images {list(input_size)}, and photos"
            " are prepared as squares of 3 channels; graft them into a run (config.graft.source)"
        )
    if input_size != own:
        row = row._replace(size=height, resize=round(row.resize * height / row.size))
    fields = {} if input_size == own else {"input_size": input_size}
    return registry.create_model(model_name, num_classes=row.num_classes, **fields), row


def _of_row(
    title: str, row: weights.Preprocessing, model: nn.Module, variables: PyTree
) -> Predictor:
    names = row.class_names() or tuple(map(str, range(row.num_classes)))
    return Predictor(title, row, row.box, _probabilities(model, variables), names)


def make_predictor_from_run(
    workdir: str | os.PathLike, checkpoint: str = "", *, trust: bool = False
) -> Predictor:
    """The network of a run, as it evaluates; photos are read as its own images were.

    The data set need not be there. `checkpoint`: best, latest, a step, or "" for what RUN
    alone means (`finding.choose_step`). `trust` allows to import an own network. Raises
    `UserError`.
    """
    loaded = load_run(workdir, checkpoint, trust=trust)
    config, dataset, model = loaded.config, loaded.dataset, loaded.network
    variables, step, why = loaded.variables, loaded.step, loaded.checkpoint
    workdir, _ = workdirs.split_checkpoint(workdir, checkpoint)
    if found := configs.find_problems(config):
        print(configs.format_note(workdir, found))
    if dataset.task != "classes":
        raise UserError(f"{workdir}: a run on {dataset.task} data has no likeliest class")
    if not dataset.normalize:
        raise UserError(f"{workdir}: its images were floats of another range than photos have")
    height, size, channels = dataset.image_shape
    if height != size:
        raise UserError(
            f"{workdir}: its images are {height}x{size}, and photos are prepared as squares"
        )
    box = partial(images.center_box, share=dataset.eval_share)

    def read(photo: Photo) -> np.ndarray:
        with open_photo(photo) as image:
            return images.read_box(image, box, size, channels)[None]

    normalize = loaded.preprocessing
    return Predictor(
        f"{workdir.name}, step {step} ({why}): {config.model.name} on {dataset.name}",
        read,
        box,
        _probabilities(model, variables, normalize),
        loaded.class_names,
    )


def draw_photos(
    predictor: Predictor,
    photos: Sequence[Photo],
    guesses: Sequence[Sequence[Prediction]],
    png: str | os.PathLike,
) -> int:
    """What `predict` found, as a picture of each photo beside its classes; how many of the photos,
    the first `predictions.MAX_PHOTOS` at most, are in it. Raises `UserError`."""
    shown = []
    for name, photo in zip(name_photos(photos), photos[: predictions.MAX_PHOTOS]):
        with open_photo(photo) as image:
            whole = images.load_upright(image, 3).copy()
            shown.append((name, whole, predictor.box(*whole.size)))
    predictions.draw_predictions(shown, guesses, png, predictor.title)
    return len(shown)


def _probabilities(
    model: nn.Module, variables: PyTree, normalize: Callable[[Array], Array] = lambda x: x
) -> Callable[[Any], Array]:
    @jax.jit
    def softmax(variables: PyTree, images: Array) -> Array:
        return jax.nn.softmax(model.apply(variables, normalize(images), train=False))

    return partial(softmax, jax.device_put(variables))
