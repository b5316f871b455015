"""Strategies of fine-tuning: each one makes phases from a target's config."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from flax_cnns import config as configs
from flax_cnns import tree as pytree
from flax_cnns.analysis.cost import cost
from flax_cnns.checkpoint.graft import graft
from flax_cnns.errors import UserError
from flax_cnns.models import registry
from flax_cnns.runs.build import RunComponents, build_components
from flax_cnns.runs.plan import find_problems
from flax_cnns.studies.finetune import probe

COPY_OPTIONS = graft.GraftOptions()._asdict()  # fields of config.graft for a plain copy


class Phase(NamedTuple):
    """A run, or if `layers` is not empty, linear classifiers on the fixed features of these
    layers."""

    name: str
    config: ConfigDict
    layers: tuple[str, ...] = ()


class Task(NamedTuple):
    """A network to fine-tune: what every strategy starts from."""

    config: ConfigDict  # of a run from scratch
    source: str  # as in `config.graft.source`
    parts: tuple[str, ...]  # of the network, from the images up: stem, stage1 ...
    classifier: tuple[str, ...]  # the layers whose shape depends on the number of classes
    shapes: Any  # of the network's variables
    examples: int  # in the whole training split
    description: tuple[str, ...]  # lines about the data set
    hyperparameters: Any  # `strategy` of the config: last, rate, head_share, layer_decay
    fingerprint: dict[str, Any] = {}  # noqa: RUF012 (never changed) of the data
    why_no_features: str = ""  # why no classifier can be trained on features; "" if one can

    def make_phase(
        self,
        name: str = "",
        *,
        load: Sequence[str] | None = None,
        train: Sequence[str] | None = None,
        rate_factor: float = 1.0,
        duration_factor: float = 1.0,
        layers: Sequence[str] = (),
    ) -> Phase:
        """Makes a phase that loads and trains some of the network's parts.

        `load`: the parts that come from the source. `train`: the parts that are trained; the
        classifier is always fresh and always trained. None means all parts. `rate_factor` scales
        the learning rate, `duration_factor` the duration, the warmup and the boundaries.
        """
        config = ConfigDict(self.config.to_dict())
        load, train = (self.parts if p is None else tuple(p) for p in (load, train))
        if not load:
            config.graft.update(**COPY_OPTIONS)
        else:
            config.graft.source = self.source
            fresh = [part for part in self.parts if part not in load]
            skipped = [f"(params|batch_stats)/{_any(x)}/.*" for x in (self.classifier, fresh) if x]
            config.graft.rules = (*((regex, None) for regex in skipped), (r"(.*)", r"\1"))
        if train != self.parts:
            # Classifiers on features have no auxiliary heads.
            heads = [name for name in self.classifier if not (layers and name.startswith("aux"))]
            trained = f"params/{_any((*heads, *train))}/.*"
            config.optimizer.trainable = ((trained, True), (".*", False))
        config.schedule.learning_rate *= rate_factor
        config.schedule.end = min(config.schedule.end, config.schedule.learning_rate)
        for section, field in (("train", "duration"), ("schedule", "warmup")):
            config[section][field] = scale_duration(config[section][field], duration_factor)
        config.schedule.boundaries = tuple(
            scale_duration(boundary, duration_factor) for boundary in config.schedule.boundaries
        )
        return Phase(name, config, tuple(layers))


def scratch(task: Task) -> list[Phase]:
    """Loads nothing."""
    return [task.make_phase(load=())]


def linear(task: Task) -> list[Phase]:
    """Trains a linear classifier on top of the frozen network."""
    return [task.make_phase(train=())]


def features(task: Task) -> list[Phase]:
    """Like `linear`, on features that are computed once: fast, but without augmentation."""
    return [task.make_phase(train=(), layers=(probe.LAST_LAYER,))]


def linear_stages(task: Task) -> list[Phase]:
    """Trains a linear classifier on each part's pooled features; keeps the best by validation."""
    return [task.make_phase(train=(), layers=task.parts)]


def last_k(task: Task) -> list[Phase]:
    """Trains the last k parts and the classifier at a reduced rate."""
    last = task.parts[-task.hyperparameters.last :]
    return [task.make_phase(train=last, rate_factor=task.hyperparameters.rate)]


def all_slowly(task: Task) -> list[Phase]:
    """Trains the whole network at a reduced rate."""
    return [task.make_phase(rate_factor=task.hyperparameters.rate)]


def head_then_all(task: Task) -> list[Phase]:
    """Trains the classifier first, then everything at a reduced rate.

    A trained classifier keeps large first gradients from destroying the pretrained weights.
    """
    rate, share = task.hyperparameters.rate, task.hyperparameters.head_share
    return [
        task.make_phase("1-head", train=(), duration_factor=share),
        task.make_phase("2-all", rate_factor=rate, duration_factor=1 - share),
    ]


def gradual(task: Task) -> list[Phase]:
    """Trains the classifier first, then adds part by part from the top."""
    number = len(task.parts) + 1
    phases = [task.make_phase("1-head", train=(), duration_factor=1 / number)]
    for i in range(1, number):
        phases.append(
            task.make_phase(
                f"{i + 1}-{task.parts[-i]}",
                train=task.parts[-i:],
                rate_factor=task.hyperparameters.rate,
                duration_factor=1 / number,
            )
        )
    return phases


def layer_decay(task: Task) -> list[Phase]:
    """Trains the whole network, with lower rates for lower layers."""
    phase = task.make_phase()
    phase.config.optimizer.layer_decay = task.hyperparameters.layer_decay
    return [phase]


def upper_only(task: Task) -> list[Phase]:
    """Loads only the upper half of the parts. Tests whether this is better than `scratch`."""
    return [task.make_phase(load=task.parts[(len(task.parts) + 1) // 2 :])]


def lower_only(task: Task) -> list[Phase]:
    """Loads only the lower half of the parts."""
    return [task.make_phase(load=task.parts[: (len(task.parts) + 1) // 2])]


STRATEGIES: dict[str, Callable[[Task], list[Phase]]] = {
    "scratch": scratch,
    "linear": linear,
    "features": features,
    "linear_stages": linear_stages,
    "last_k": last_k,
    "all_slowly": all_slowly,
    "head_then_all": head_then_all,
    "gradual": gradual,
    "layer_decay": layer_decay,
    "upper_only": upper_only,
    "lower_only": lower_only,
}


def _any(layers: Sequence[str]) -> str:
    """Returns a regex for any of these layers."""
    return f"({'|'.join(map(re.escape, layers))})"


def scale_duration(duration: str, factor: float) -> str:
    """Scales a duration ("3 epochs")."""
    match = re.fullmatch(r"\s*([\d.]+)\s*(\w+)\s*", duration)
    assert match is not None  # the config was validated
    number, unit = match.groups()
    return f"{round(float(number) * factor, 4)} {unit}" if factor != 1 else duration


def make_task(
    config: ConfigDict,
    source: str,
    hyperparameters: Any,
    *,
    is_new: bool = False,
    fraction: float = 1.0,
) -> Task:
    """Makes a task from the shapes of the target's network; computes nothing.

    With `is_new`, also makes the checks of new runs, for all training examples and for a `fraction`
    of them. Raises UserError.
    """
    components = build_components(config)
    _check_components(components, fraction)
    if is_new:
        configs.raise_problems(find_problems(components))
        if problems := find_problems(components, fraction):  # durations in epochs have fewer steps
            raise UserError(f"with --fractions={fraction:g}: {' | '.join(problems)}")
    shape = (1, *components.dataset.image_shape)

    def find_shapes(model: Any) -> Any:
        return jax.eval_shape(lambda: registry.init_variables(model, jax.random.key(0), shape))

    def list_params(variables: Any) -> dict[str, tuple[int, ...]]:
        return {path: leaf.shape for path, leaf in pytree.flatten(variables["params"]).items()}

    model, name, variables = components.model, config.model.name, find_shapes(components.model)
    try:
        wider_variables = find_shapes(model.clone(num_classes=components.num_classes + 1))
    except Exception as error:
        if components.own_parts.network is None:
            raise
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"{name} with num_classes={components.num_classes + 1}: {message}"
        ) from error
    params, wider = list_params(variables), list_params(wider_variables)
    classifier = {path.rpartition("/")[0] for path in params if params[path] != wider.get(path)}
    if not classifier or params.keys() != wider.keys():
        changes = "no layer" if params == wider else "other layers too"
        raise UserError(
            f"fine-tuning replaces the classifier: expected num_classes of {name} to be the size of"
            f" its last layer, but it changes {changes}"
        )
    layers = [layer.path for layer in cost(model, shape, train=False).layers]
    owners = {path.split("/")[0] for path in params if path.rpartition("/")[0] not in classifier}
    order = list(dict.fromkeys(path.split("/")[0] for path in layers))
    parts = tuple(part for part in order if part in owners and not part.startswith("aux"))
    if not parts:
        raise UserError(f"fine-tuning: {name} has no layers below its classifier to start from")
    task = Task(
        config=config,
        source=source,
        parts=parts,
        classifier=tuple(sorted(classifier)),
        shapes=variables,
        examples=len(components.dataset.splits["train"]),
        description=tuple(components.dataset.describe()),
        hyperparameters=hyperparameters,
        fingerprint=components.dataset.fingerprint,
    )
    return task._replace(why_no_features=_why_no_features(components, task))


def _check_components(components: RunComponents, fraction: float) -> None:
    """Raises UserError for data or a network that no strategy supports."""
    dataset, name = components.dataset, components.config.model.name
    if dataset.task != "classes":
        raise UserError(
            f"fine-tuning by strategies compares accuracies, but an image of {dataset.name} has"
            " several labels (multilabel); train it with config.graft.source alone"
        )
    if dataset.is_stream and fraction < 1:
        raise UserError(
            f"--fractions={fraction:g}: {dataset.name} has a fixed stream of batches, which cannot"
            " be divided; leave the fraction at 1, or use Dataset.from_arrays"
        )
    if "num_classes" not in {field.name for field in dataclasses.fields(components.model)}:
        raise UserError(
            "fine-tuning replaces the classifier, and needs the network's field 'num_classes', the"
            f" number of logits; {name} has no such field; add it"
        )


def _why_no_features(components: RunComponents, task: Task) -> str:
    """Returns why no classifier can be trained on the features of the network; "" if one can."""
    layers = [layer for layer in task.classifier if not layer.startswith("aux")]
    leaves = pytree.flatten(task.shapes["params"])
    params = {path: x for path, x in leaves.items() if path.rpartition("/")[0] in layers}
    name = components.config.model.name
    if (kernel := probe.find_dense_kernel(params)) is None:
        classifier = ", ".join(task.classifier)
        return (
            f"the classifier of {{target}} ({name}: {classifier}) is not a dense layer on features"
        )
    if components.own_parts.regularizers:
        names = ", ".join(components.own_parts.regularizers)
        return f"{names}, of the train.regularizers of {{target}}, cannot act on features"
    if components.dataset.is_stream:
        return "the training images of {target} come in batches without end"
    if components.own_parts.network is not None:
        shape = (1, *components.dataset.image_shape)
        features = _features_shape(components.model, task.shapes, shape)
        if features != (1, params[kernel].shape[0]):
            return f"{name} of {{target}} gives no features [N C] if num_classes is None"
    return ""


def _features_shape(model: Any, variables: Any, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Returns the shape of the network's output with `num_classes=None`; None if the network
    fails."""
    images = jax.ShapeDtypeStruct(shape, "float32")
    try:
        return jax.eval_shape(
            lambda v, x: model.clone(num_classes=None).apply(v, x, train=False), variables, images
        ).shape
    except Exception:  # the user's network may not support it
        return None
