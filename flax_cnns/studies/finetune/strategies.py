"""Strategies of fine-tuning: each makes phases of a target's config."""

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

COPY_OPTIONS = graft.GraftOptions()._asdict()  # of config.graft: leaves are copied as they are


class Phase(NamedTuple):
    """A whole run; with `layers` in its place a linear classifier on each of these, fixed."""

    name: str
    config: ConfigDict
    layers: tuple[str, ...] = ()


class Task(NamedTuple):
    """A network to fine-tune: what every strategy starts from."""

    config: ConfigDict  # of the run from scratch
    source: str  # as `graft` takes it
    parts: tuple[str, ...]  # the network's own, from the images up: stem, stage1 ...
    classifier: tuple[str, ...]  # the layers whose shape depends on the number of classes
    shapes: Any  # of the network's variables
    examples: int  # of the whole training split
    description: tuple[str, ...]  # what its data set holds, as lines
    hyperparameters: Any  # `strategy` of the config: last, rate, head_share, layer_decay
    fingerprint: dict[str, Any] = {}  # noqa: RUF012 (never changed) of its data
    why_no_features: str = ""  # why no classifier can learn on its features; "": one can

    def phase(
        self,
        name: str = "",
        *,
        load: Sequence[str] | None = None,
        train: Sequence[str] | None = None,
        rate: float = 1.0,
        share: float = 1.0,
        layers: Sequence[str] = (),
    ) -> Phase:
        """`load`: the parts that come from the source, `train`: those that learn, beside the
        classifier, which is fresh and always learns; None: all. `rate` is a factor on the learning
        rate, `share` one on the duration."""
        config = ConfigDict(self.config.to_dict())
        load, train = (self.parts if p is None else tuple(p) for p in (load, train))
        if not load:
            config.graft.update(**COPY_OPTIONS)
        else:
            config.graft.source = self.source
            fresh = [part for part in self.parts if part not in load]
            named = [f"(params|batch_stats)/{_any(of)}/.*" for of in (self.classifier, fresh) if of]
            config.graft.rules = (*((regex, None) for regex in named), (r"(.*)", r"\1"))
        if train != self.parts:
            # Classifiers on features know no auxiliary heads.
            heads = [name for name in self.classifier if not (layers and name.startswith("aux"))]
            learning = f"params/{_any((*heads, *train))}/.*"
            config.optimizer.trainable = ((learning, True), (".*", False))
        config.schedule.learning_rate *= rate
        config.schedule.end = min(config.schedule.end, config.schedule.learning_rate)
        for section, field in (("train", "duration"), ("schedule", "warmup")):
            config[section][field] = scale_duration(config[section][field], share)
        boundaries = config.schedule.boundaries
        config.schedule.boundaries = tuple(scale_duration(at, share) for at in boundaries)
        return Phase(name, config, tuple(layers))


def scratch(task: Task) -> list[Phase]:
    """Nothing is loaded."""
    return [task.phase(load=())]


def linear(task: Task) -> list[Phase]:
    """A linear classifier on the top of the frozen network."""
    return [task.phase(train=())]


def features(task: Task) -> list[Phase]:
    """The same on features that are computed once: fast, but without augmentation."""
    return [task.phase(train=(), layers=(probe.LAST_LAYER,))]


def linear_stages(task: Task) -> list[Phase]:
    """A linear classifier on each part's pooled features; the best by validation counts."""
    return [task.phase(train=(), layers=task.parts)]


def last_k(task: Task) -> list[Phase]:
    """The last parts learn, slowly, and the classifier."""
    last = task.parts[-task.hyperparameters.last :]
    return [task.phase(train=last, rate=task.hyperparameters.rate)]


def all_slowly(task: Task) -> list[Phase]:
    """The whole network learns, at a tenth of the rate."""
    return [task.phase(rate=task.hyperparameters.rate)]


def head_then_all(task: Task) -> list[Phase]:
    """The classifier first, so that its first gradients spoil nothing; then all, slowly."""
    share = task.hyperparameters.head_share
    return [
        task.phase("1-head", train=(), share=share),
        task.phase("2-all", rate=task.hyperparameters.rate, share=1 - share),
    ]


def gradual(task: Task) -> list[Phase]:
    """The classifier first, then part by part from the top."""
    number = len(task.parts) + 1
    phases = [task.phase("1-head", train=(), share=1 / number)]
    for i in range(1, number):
        name = f"{i + 1}-{task.parts[-i]}"
        train = task.parts[-i:]
        phases.append(
            task.phase(name, train=train, rate=task.hyperparameters.rate, share=1 / number)
        )
    return phases


def layer_decay(task: Task) -> list[Phase]:
    """The whole network learns, the slower the lower a layer."""
    phase = task.phase()
    phase.config.optimizer.layer_decay = task.hyperparameters.layer_decay
    return [phase]


def upper_only(task: Task) -> list[Phase]:
    """The upper half of the parts is loaded, the lower is not: no better than from scratch?"""
    return [task.phase(load=task.parts[(len(task.parts) + 1) // 2 :])]


def lower_only(task: Task) -> list[Phase]:
    """The lower half is loaded, the upper is not."""
    return [task.phase(load=task.parts[: (len(task.parts) + 1) // 2])]


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
    return f"({'|'.join(map(re.escape, layers))})"


def scale_duration(duration: str, share: float) -> str:
    number, unit = re.fullmatch(r"\s*([\d.]+)\s*(\w+)\s*", duration).groups()
    return f"{round(float(number) * share, 4)} {unit}" if share != 1 else duration


def make_task(
    config: ConfigDict,
    source: str,
    hyperparameters: Any,
    *,
    new: bool = False,
    fraction: float = 1.0,
) -> Task:
    """Looks at the shapes of the target's network; nothing is computed. Raises `UserError`; `new`:
    also for what no new run of this network may have on these data, or on a `fraction` of them."""
    components = build_components(config)
    _check_parts(components, fraction)
    if new:
        configs.raise_problems(find_problems(components))
        if found := find_problems(components, fraction):  # durations in epochs are fewer steps
            raise UserError(f"with --fractions={fraction:g}: {' | '.join(found)}")
    shape = (1, *components.dataset.image_shape)

    def shapes(model: Any) -> Any:
        return jax.eval_shape(lambda: registry.init_variables(model, jax.random.key(0), shape))

    def params(variables: Any) -> dict[str, tuple[int, ...]]:
        return {path: leaf.shape for path, leaf in pytree.flatten(variables["params"]).items()}

    model, name, variables = components.model, config.model.name, shapes(components.model)
    try:
        wide = shapes(model.clone(num_classes=components.num_classes + 1))
    except Exception as error:
        if components.own_parts.network is None:
            raise
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{name} with num_classes={components.num_classes + 1}: {said}") from error
    here, wider = params(variables), params(wide)
    classifier = {path.rpartition("/")[0] for path in here if here[path] != wider.get(path)}
    if not classifier or here.keys() != wider.keys():
        changes = "no layer" if here == wider else "other layers too"
        raise UserError(
            f"fine-tuning gives the network another classifier: expected num_classes of {name} to"
            f" be the size of its last layer, and it changes {changes}"
        )
    ran = [layer.path for layer in cost(model, shape, train=False).layers]
    owners = {path.split("/")[0] for path in here if path.rpartition("/")[0] not in classifier}
    order = list(dict.fromkeys(path.split("/")[0] for path in ran))
    own = tuple(name for name in order if name in owners and not name.startswith("aux"))
    if not own:
        raise UserError(f"fine-tuning: {name} has no layers below its classifier to start from")
    examples, description = (
        len(components.dataset.splits["train"]),
        tuple(components.dataset.describe()),
    )
    classifier, data = tuple(sorted(classifier)), components.dataset.fingerprint
    task = Task(
        config, source, own, classifier, variables, examples, description, hyperparameters, data
    )
    return task._replace(why_no_features=_why_no_features(components, task))


def _check_parts(components: RunComponents, fraction: float) -> None:
    """Raises `UserError` for data and networks that no strategy can take."""
    dataset, name = components.dataset, components.config.model.name
    if dataset.task != "classes":
        raise UserError(
            f"fine-tuning by strategies compares accuracies, and an image of {dataset.name} has"
            " several labels (multilabel); train it with config.graft.source alone"
        )
    if dataset.is_stream and fraction < 1:
        raise UserError(
            f"--fractions={fraction:g}: no fraction can be taken of {dataset.name}, which come in"
            " an order of their own; leave it at 1, or give Dataset.from_arrays"
        )
    if "num_classes" not in {field.name for field in dataclasses.fields(components.model)}:
        raise UserError(
            "fine-tuning gives the network another classifier, and needs a field 'num_classes' of"
            f" it, the number of logits; {name} has none; add one"
        )


def _why_no_features(components: RunComponents, task: Task) -> str:
    """Why no classifier can learn on the features of a task's network; "" if one can."""
    layers = [layer for layer in task.classifier if not layer.startswith("aux")]
    leaves = pytree.flatten(task.shapes["params"])
    own = {path: x for path, x in leaves.items() if path.rpartition("/")[0] in layers}
    name = components.config.model.name
    if (kernel := probe.find_dense_kernel(own)) is None:
        classifier = ", ".join(task.classifier)
        return f"the classifier of {{target}} ({name}: {classifier}) is no dense layer on features"
    if components.own_parts.regularizers:
        named = ", ".join(components.own_parts.regularizers)
        return f"{named}, of the train.regularizers of {{target}}, cannot act on features"
    if components.dataset.is_stream:
        return "the training images of {target} come in batches without end"
    if components.own_parts.network is not None:
        shape = (1, *components.dataset.image_shape)
        features = _features_shape(components.model, task.shapes, shape)
        if features != (1, own[kernel].shape[0]):
            return f"{name} of {{target}} gives no features [N C] where num_classes is None"
    return ""


def _features_shape(model: Any, variables: Any, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    images = jax.ShapeDtypeStruct(shape, "float32")
    try:
        return jax.eval_shape(
            lambda v, x: model.clone(num_classes=None).apply(v, x, train=False), variables, images
        ).shape
    except Exception:  # the user's code was not made for it
        return None
