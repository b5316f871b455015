"""The network, data and steps of a config, for experiments that are too short to be runs.

Nothing here reads the test split or writes a file.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_cnns import config as configs
from flax_cnns.config import DEFAULTS, FIELDS
from flax_cnns.data import augment, mix, pipeline
from flax_cnns.errors import UserError
from flax_cnns.runs.build import (
    RunComponents,
    build_components,
    host_batches,
    initialize_jax,
    make_train_step,
    make_training_key,
    train_batches,
)
from flax_cnns.runs.plan import RunPlan
from flax_cnns.runs.start import make_initial_variables
from flax_cnns.train import losses, metrics, parallel, steps
from flax_cnns.train.optimizers import PlateauState
from flax_cnns.train.state import TrainState
from flax_cnns.types import Array, PyTree

MAX_IMAGES = 2000  # of the training split that are looked at
MAX_VALIDATION_IMAGES = 1000
MAX_BYTES = 2**28  # of these images
MEASURED = 256  # most images of a batch whose loss and accuracy are measured

HostBatch = dict[str, np.ndarray]


class SanityBench:
    """A config's network at initialization, with its data and the means to train it shortly."""

    def __init__(self, config: Any):
        config = configs.complete(config)
        configs.validate(config)
        configs.raise_problems(configs.find_problems(config))
        initialize_jax(config)
        if jax.process_count() > 1:
            raise UserError("search sanity runs in one process, with any number of devices")
        self.config = config
        self.components = build_components(config, callbacks=False)
        self.plan = RunPlan(self.components)
        configs.raise_problems(self.plan.find_problems())
        self.plan.check_norms()
        self.dataset = self.components.dataset
        self.loss = losses.select_loss(self.components.own_parts.loss, self.dataset.task)
        # On the host, so that no step can donate them.
        self.variables: PyTree = jax.device_get(
            self.components.stack_if_scanned(make_initial_variables(self.plan)[0])
        )
        self.optimizer = self.plan.make_optimizer(self.variables)

    @property
    def devices(self) -> int:
        return self.components.mesh.devices.size

    def collect(self, split: str) -> HostBatch:
        """Returns {"image", "label"} of some examples, not augmented: all of a small split.

        Training examples come in the order of the run's first batches.
        """
        name, most = ("train", MAX_IMAGES) if split == "train" else (split, MAX_VALIDATION_IMAGES)
        size = len(self.dataset.splits[name])
        height, width, channels = self.dataset.image_shape
        most = min(most, size, max(MAX_BYTES // (4 * height * width * channels), self.devices))
        batches: Any = (
            host_batches(self.components)
            if name == "train"
            else pipeline.eval_batches(self.dataset, name, self.config.data)
        )
        images, labels, count = [], [], 0
        with contextlib.closing(batches):
            for batch in batches:
                rows = np.asarray(batch.get("mask", np.ones(len(batch["label"])))) > 0
                images.append(np.asarray(batch["image"])[rows])
                labels.append(np.asarray(batch["label"])[rows])
                count += len(images[-1])
                if count >= most:
                    break
        return {"image": np.concatenate(images)[:most], "label": np.concatenate(labels)[:most]}

    def normalize(self, images: np.ndarray) -> np.ndarray:
        """Returns f32 images as the network sees them without augmentation."""
        return np.asarray(make_normalize(self.components)(jnp.asarray(images)))


def make_normalize(components: RunComponents) -> Callable[[Array], Array]:
    """Returns the function that normalizes images as the run does in evaluation."""
    dataset = components.dataset
    return augment.make_normalize(
        components.config.data.augment, mean=dataset.mean, std=dataset.std
    )


# ---------------------------------------------------------------------------- networks


def drop_axis(model: nn.Module) -> nn.Module:
    """Returns the network without synchronized BatchNorm, whose axis exists only inside a step."""
    return model.clone(axis_name=None) if hasattr(model, "axis_name") else model


def make_quiet_apply(model: nn.Module, modes: Mapping[str, str]) -> Callable:
    """Returns the network's `apply` without anything random: evaluation, except that each BatchNorm
    whose mode is "train" normalizes by the batch and updates its statistics, as in training."""

    def follow_batch(
        function: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        layer = context.module
        if not isinstance(layer, nn.BatchNorm) or context.method_name != "__call__":
            return function(*args, **kwargs)
        if modes.get("/".join(layer.path), "train") != "train":
            return function(*args, **kwargs)
        if kwargs.get("use_running_average"):
            return function(*args, **(kwargs | {"use_running_average": False}))
        if layer.use_running_average:
            layer = layer.clone(parent=layer.scope, use_running_average=False)
            return layer(*args, **kwargs)
        return function(*args, **kwargs)

    def apply(variables: PyTree, images: Array, *, train: bool = True, **call: Any) -> Any:
        del train
        with nn.intercept_methods(follow_batch):
            return model.apply(variables, images, train=False, **call)

    return apply


# ---------------------------------------------------------------------------- short trainings


class Trainer:
    """The config's own training step, at any learning rate. One program serves all rates."""

    def __init__(self, components: RunComponents, variables: PyTree, *, quiet: bool = False):
        """`variables` are on the host. `quiet` turns off all that is random or regularizes:
        augmentation, mixing, dropout, penalties, weight decay, averages."""
        config = configs.complete(components.config)
        config.schedule.name, config.schedule.warmup = "constant", "0 steps"
        config.schedule.learning_rate = 1.0  # the rate is the plateau's factor
        own = components.own_parts
        if quiet:
            for path, field in FIELDS.items():
                if field.regularizer or path == "train.accumulate":
                    configs.set_config_field(config, path, DEFAULTS[path])
            own = own._replace(regularizers={})
        self.components = components._replace(config=config, own_parts=own)
        self.variables = variables
        plan = RunPlan(self.components)
        self.optimizer = plan.make_optimizer(variables)
        if quiet:
            normalize = make_normalize(components)
            step = steps.make_train_step(
                make_quiet_apply(components.model, self.optimizer.batchnorm_modes),
                self.optimizer,
                augment=lambda images, keys: normalize(images),
                mix=mix.make_mix(config.mix, components.num_classes, task=components.dataset.task),
                loss=own.loss,
                task=components.dataset.task,
            )
            self._step = parallel.parallelize(step, components.mesh, mode=components.mode)
        else:
            self._step = make_train_step(self.components, self.optimizer, plan.steps_per_epoch)
        self._key = parallel.replicate(make_training_key(config), components.mesh)
        self.seconds = float("inf")  # of the fastest step so far

    def start(self) -> TrainState:
        """Returns the state at initialization."""
        opt_state = self.optimizer.init(self.variables["params"])
        ema = self.components.config.train.ema > 0
        state = TrainState.create(jax.tree.map(jnp.asarray, self.variables), opt_state, ema=ema)
        return parallel.replicate(jax.tree.map(jnp.copy, state), self.components.mesh)

    def step(
        self, state: TrainState, batch: Any, rate: float
    ) -> tuple[TrainState, dict[str, float]]:
        """Takes one step. Returns the state and loss, accuracy, bad, norm and the penalties.

        The loss is infinite if the step's numbers were not finite.
        """
        began = time.perf_counter()
        scale = parallel.replicate(np.float32(rate), self.components.mesh)
        opt_state = jax.tree.map(
            lambda leaf: leaf._replace(scale=scale) if isinstance(leaf, PlateauState) else leaf,
            state.opt_state,
            is_leaf=lambda leaf: isinstance(leaf, PlateauState),
        )
        state, sums = self._step(state.replace(opt_state=opt_state), batch, self._key)
        found = {name: float(x) for name, x in jax.device_get(sums).items() if np.ndim(x) == 0}
        self.seconds = min(self.seconds, time.perf_counter() - began)
        numbers = {"loss": float("inf"), "accuracy": 0.0, "bad": found["bad"]}
        numbers["norm"] = found["norm"]
        if not found["bad"]:
            numbers["loss"] = found["loss"] / found["count"]
            numbers["accuracy"] = compute_accuracy(found, self.components.dataset.task)
        penalties = {name: found[name] for name in found if metrics.is_penalty(name)}
        return state, numbers | penalties

    @contextlib.contextmanager
    def batches(self) -> Iterator[Iterator[Any]]:
        """A context with the run's training batches, on the devices, without end."""
        with contextlib.closing(train_batches(self.components)) as stream:
            yield stream


def compute_accuracy(sums: Mapping[str, float], task: str) -> float:
    """Returns the accuracy; of multilabel data, the share of images with all labels right."""
    name = "correct_subsets" if task == "multilabel" else "correct"
    return sums[name] / sums["count"] if sums["count"] else float("nan")


# ---------------------------------------------------------------------------- measurements


class Meter:
    """Loss and accuracy of a network, with BatchNorm by the batch's statistics as in training."""

    def __init__(self, components: RunComponents, modes: Mapping[str, str], size: int):
        """`size`: of the batches, over all devices (`choose_size`)."""
        self.components, self.size = components, size
        config, task = components.config, components.dataset.task
        apply, normalize = make_quiet_apply(components.model, modes), make_normalize(components)
        loss = losses.select_loss(components.own_parts.loss, task)
        smoothing = configs.complete(config).mix
        smoothing.mixup = smoothing.cutmix = 0.0
        smooth = mix.make_mix(smoothing, components.num_classes, task=task)

        def measure(variables: PyTree, batch: dict[str, Array], key: Any) -> dict[str, Array]:
            images = normalize(batch["image"])
            logits, _ = apply(variables, images, mutable=["batch_stats"])
            logits = logits.astype(jnp.float32)
            labels = losses.soft_labels(batch["label"], components.num_classes)
            losses.check_logits(logits, *labels.shape)
            each = loss(logits, labels)
            sums = metrics.sum_metrics(each, logits, batch["label"], labels, task=task)
            sums["guessing"] = jnp.sum(loss(jnp.zeros_like(logits), labels))
            sums["smoothed"] = jnp.sum(loss(logits, smooth(images, batch["label"], key)[1]))
            # The spread that matters to a softmax is that within an image.
            sums["spread"] = jnp.sum(jnp.std(logits, axis=-1))
            return lax.psum(sums, "batch")

        self._measure = parallel.parallelize(
            measure, components.mesh, mode=components.mode, donate=False
        )

    def measure(self, variables: PyTree, examples: HostBatch) -> dict[str, float]:
        """Returns loss, accuracy, guessing (the loss of logits 0), smoothed (the loss with label
        smoothing), spread (the logits' standard deviation within an image) and count.

        Examples that do not fill a batch are left out.
        """
        components, size, total = self.components, self.size, len(examples["label"])
        sums: dict[str, Any] = {}
        key = parallel.replicate(make_training_key(components.config), components.mesh)
        variables = {name: variables.get(name, {}) for name in ("params", "batch_stats")}
        variables = parallel.replicate(variables, components.mesh)
        for first in range(0, max(total - size, 0) + 1, size):
            rows = np.arange(first, first + size) % total
            batch = components.shard({name: x[rows] for name, x in examples.items()})
            sums = metrics.add_sums(sums, jax.device_get(self._measure(variables, batch, key)))
        names = ("loss", "guessing", "smoothed", "spread")
        found = {name: float(sums[name]) / float(sums["count"]) for name in names}
        accuracy = compute_accuracy(sums, components.dataset.task)
        return found | {"accuracy": accuracy, "count": float(sums["count"])}


def choose_size(total: int, devices: int) -> int:
    """Returns a batch size of at most `MEASURED`, a multiple of `devices`, such that few of `total`
    examples are left out."""
    batches = -(-total // MEASURED)
    return max(total // batches // devices, 1) * devices
