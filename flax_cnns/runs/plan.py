"""What a run will do, known from shapes alone: its steps, when it looks and saves, its optimizer.

Nothing is written here and nothing computed, so that sweeps can check all their runs first.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from flax_cnns import config as configs
from flax_cnns.analysis.cost import cost
from flax_cnns.checkpoint.graft import graft as grafting
from flax_cnns.checkpoint.graft.sources import GraftSource, open_source
from flax_cnns.errors import UserError
from flax_cnns.layers import norm
from flax_cnns.runs.build import (
    RunComponents,
    build_components,
    find_dropout_rates,
    make_augment_and_mix,
    make_train_step,
)
from flax_cnns.train import batchnorm_modes, loop, memory, metrics, optimizers, parallel, schedules
from flax_cnns.train.state import TrainState
from flax_cnns.train.writer import import_wandb
from flax_cnns.types import Array, PyTree


class RunPlan:
    """The steps of a run, and what each of them needs.

    `total`: steps in all; `steps_per_epoch`: may be a fraction; `periods`: how often, in steps, the
    run logs, validates and saves; `validates`: whether there is a validation split; `best_by`,
    `best_mode`: the metric of a validation that says which is the best, by "max" or "min". Raises
    `UserError` for a duration of no step, batches that do not fit into memory, and for a schedule
    or early stopping that would look at a validation split that is not there.
    """

    def __init__(self, components: RunComponents):
        self.components, self.config = components, components.config
        config = self.config
        self.has_validation = "validation" in components.dataset.splits
        self.steps_per_epoch = len(components.dataset.splits["train"]) / config.data.batch_size
        self._check_batches()
        self.best_by, self.best_mode = choose_best_metric(components)
        self.total_steps = self.count_steps(config.train.duration, "train.duration")
        if self.total_steps < 1:
            raise UserError(f"train.duration: {config.train.duration!r} is no step at all")
        self.periods = loop.Periods(
            log=self.count_steps(config.log.every, "log.every"),
            evaluate=self.count_steps(config.train.eval_every, "train.eval_every"),
            save=self.count_steps(config.checkpoint.every, "checkpoint.every"),
        )
        if components.dataset.is_stream and config.train.evaluate_train:
            raise UserError(
                f"train.evaluate_train: {components.dataset.name} gives training batches without"
                " end, and not each example once; give a part of them as another split"
            )
        if not self.has_validation and (
            config.schedule.name == "plateau" or config.train.early_stopping
        ):
            raise UserError(
                f"data.validation: {components.dataset.name} has no validation split, and the"
                " plateau schedule and early stopping look at nothing else; set data.validation=0.1"
            )

    def count_steps(self, duration: str, field: str = "duration") -> int:
        """The steps of a duration ("3 epochs"); `field` opens the message of an error."""
        return schedules.parse_duration(duration, self.steps_per_epoch, what=field)

    def find_problems(self) -> list[str]:
        """`config.find_problems` that take the network or the data to know."""
        components = self.components

        def shapes() -> PyTree:
            return jax.eval_shape(components.init_variables)

        def has_aux_heads() -> bool:
            # The axis of synchronized statistics exists only inside a step.
            alone = {"axis_name": None} if hasattr(components.model, "axis_name") else {}
            model = components.model.clone(**alone)
            variables = components.stack_if_scanned(shapes())
            images = jax.ShapeDtypeStruct((2, *components.dataset.image_shape), "float32")
            rngs = {"shared": jax.random.key(0), "dropout": jax.random.key(0)}
            call = functools.partial(
                model.apply, train=True, mutable=["batch_stats", "aux_logits"], rngs=rngs
            )
            return bool(jax.eval_shape(call, variables, images)[1].get("aux_logits"))

        facts = configs.RunFacts(
            total_steps=self.total_steps,
            count_steps=self.count_steps,
            has_validation=self.has_validation,
            has_own_validation=components.dataset.has_own_validation,
            has_batchnorm=lambda: bool(shapes()["batch_stats"]),
            has_aux_heads=has_aux_heads,
            decodes_images=components.dataset.is_decoded,
        )
        return configs.find_problems(self.config, facts)

    @functools.cached_property
    def layer_order(self) -> list[str]:
        """The paths of the network's layers, as images pass them."""
        shape = (1, *self.components.dataset.image_shape)
        return [layer.path for layer in cost(self.components.model, shape, train=False).layers]

    def make_optimizer(self, variables: PyTree) -> optimizers.Optimizer:
        schedule = schedules.make_schedule(
            self.config.schedule, total_steps=self.total_steps, steps_per_epoch=self.steps_per_epoch
        )
        return optimizers.make_optimizer(
            self.config.optimizer,
            variables["params"],
            schedule,
            batch_stats=variables.get("batch_stats"),
            order=self.layer_order if self.config.optimizer.layer_decay else (),
            groups=getattr(self.components.model, "layer_groups", ()),
            own_regularizers=self.components.own_parts.regularizers,
            factory=self.components.own_parts.optimizer,
            factory_fields=self.components.own_parts.optimizer_fields,
        )

    def make_abstract_state(self) -> TrainState:
        """Shapes and shardings of the state, without a number in it."""

        def make() -> TrainState:
            variables = self.components.stack_if_scanned(
                jax.eval_shape(self.components.init_variables)
            )
            optimizer = self.make_optimizer(variables)

            def create(variables: PyTree) -> TrainState:
                opt_state = optimizer.init(variables["params"])
                return TrainState.create(variables, opt_state, ema=self.config.train.ema > 0)

            return jax.eval_shape(create, variables)

        sharding = jax.sharding.NamedSharding(self.components.mesh, jax.sharding.PartitionSpec())
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), make()
        )

    def check_norms(self) -> None:
        """Raises `UserError` if a BatchNorm that learns would see one value per channel in a step.
        Computes shapes only, and only if a device takes its images one at a time: two images have
        two values per channel."""
        components, config = self.components, self.config
        devices, pieces = components.mesh.devices.size, config.train.accumulate
        if config.data.batch_size != devices * pieces:
            return
        variables = self.make_abstract_state().variables
        modes = self.make_optimizer(variables).batchnorm_modes

        def step(variables: PyTree, batch: dict[str, Array], key: Array) -> Array:
            with batchnorm_modes.intercept(modes), norm.check_batch_norms():  # in this order
                components.model.apply(
                    variables,
                    batch["image"],
                    train=True,
                    mutable=["batch_stats", "aux_logits"],
                    rngs={"shared": key, "dropout": key},
                )
            return key

        shape = (devices, *components.dataset.image_shape)
        batch = {"image": jax.ShapeDtypeStruct(shape, jax.numpy.float32)}
        try:
            jax.eval_shape(
                parallel.parallelize(step, components.mesh, donate=False),
                *(variables, batch, jax.random.key(0)),
            )
        except norm.OneValueError as error:
            raise UserError(
                f"data.batch_size={config.data.batch_size} (devices: {devices}, train.accumulate:"
                f" {pieces}) gives a device 1 image at a time, and {error.path} gets"
                f" {list(error.shape)}: BatchNorm of 1 value per channel makes all images the same;"
                f" take data.batch_size={2 * devices * pieces}, or larger images"
            ) from None

    def check_own_step(self) -> None:
        """Raises `UserError` if an own loss, metric, regularizer or optimizer cannot be part of a
        training step. Traces the step; does nothing if the run has none of these."""
        components, own = self.components, self.components.own_parts
        if not (own.loss or own.metrics or own.regularizers or own.optimizer):
            return
        state, train = self.make_abstract_state(), components.dataset.splits["train"]
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        step = make_train_step(components, self.make_optimizer(variables), self.steps_per_epoch)
        n, devices = self.config.data.batch_size, components.mesh.devices.size
        first = (devices, n // devices) if components.mode == "pmap" else (n,)
        images = np.uint8 if train.images is None else train.images.dtype
        labels = np.zeros(1, np.int32) if train.labels is None else train.labels
        batch = {
            "image": jax.ShapeDtypeStruct((*first, *components.dataset.image_shape), images),
            "label": jax.ShapeDtypeStruct((*first, *labels.shape[1:]), labels.dtype),
        }
        jax.eval_shape(step, state, batch, jax.random.key(0))

    def check_memory(self, train_step: Callable, state: TrainState, batch: Any, key: Any) -> None:
        """Raises `UserError` for batches that a CPU has no memory for; compiles the step."""
        components, data = self.components, self.config.data
        devices = parallel.local_devices(components.mesh)
        if devices[0].platform != "cpu":
            return
        need = memory.needed(train_step, state, batch, key) * len(devices)
        if not memory.fits(20 * need):
            # XLA does not count the patches that a convolution's gradient lays out as it runs.
            layers = cost(
                components.model, (1, *components.dataset.image_shape), train=False
            ).layers
            patches = max(
                (x.macs / x.output_shape[-1] for x in layers if len(x.output_shape or ()) == 4),
                default=0,
            )
            pieces = jax.process_count() * self.config.train.accumulate
            need += 4 * patches * data.batch_size / pieces
        memory.check_fits(need, what=f"data.batch_size={data.batch_size}")
        size, axis = data.eval_batch_size, 1 if components.mode == "pmap" else 0
        if memory.fits(need * size / data.batch_size):
            return  # without a backward pass, less than training on as many images takes

        def shape(x: Array, dtype: Any, rank: int | None = None) -> jax.ShapeDtypeStruct:
            dims = list(x.shape[:rank])
            dims[axis] = dims[axis] * size // data.batch_size
            return jax.ShapeDtypeStruct(dims, dtype, sharding=x.sharding)

        images = components.dataset.splits["train"].images
        of_bytes = images is None and not components.dataset.is_stream
        shapes = {
            "image": shape(
                batch["image"], np.uint8 if of_bytes else getattr(images, "dtype", np.float32)
            ),
            "label": shape(batch["label"], batch["label"].dtype),
            "mask": shape(batch["label"], np.float32, axis + 1),
        }
        need = memory.needed(components.eval_step, state.variables, shapes, None) * len(devices)
        memory.check_fits(need, what=f"data.eval_batch_size={size}")

    def _check_batches(self) -> None:
        """Raises `UserError` for batches whose images alone do not fit into memory."""
        data, dataset = self.config.data, self.components.dataset
        images = dataset.splits["train"].images
        of_bytes = images is None or images.dtype == np.uint8  # batches to come may be either
        size_of_image = math.prod(dataset.image_shape) * (1 if of_bytes else 4)
        ahead = 2 if self.components.dataset.in_memory else 4  # batches that are there at once
        for field in ("batch_size", "eval_batch_size"):
            size = data[field] // jax.process_count()
            memory.check_fits(ahead * size * size_of_image, what=f"data.{field}={data[field]}")


# Which of two values is the better, of the metrics that a run logs by itself.
BEST_MODES = {
    **dict.fromkeys(("accuracy", "top5", "label_accuracy", "subset_accuracy"), "max"),
    "loss": "min",
}


def choose_best_metric(components: RunComponents) -> tuple[str, str]:
    """(name of a metric of the validation, "max" or "min") by `config.train.best_by`, `best_mode`.

    Raises `UserError` for a metric that there is not, and for an own one without a mode.
    """
    config, task = components.config.train, components.dataset.task
    by, mode = config.best_by.removeprefix("validation/"), config.best_mode
    if by == "auto":
        by = "loss" if task == "multilabel" else "accuracy"
    metrics.check_best_by(
        by,
        metrics.list_names(
            components.num_classes, task=task, own_metrics=components.own_parts.metrics
        ),
    )
    if mode == "auto" and by not in BEST_MODES:
        raise UserError(
            f"train.best_mode: is the best {by!r} the highest or the lowest? Set max or min"
        )
    return by, BEST_MODES[by] if mode == "auto" else mode


def dry_run(
    config: Any, sources: dict[Any, GraftSource] | None = None, *, begun: bool = False
) -> tuple[RunComponents, int]:
    """What a run of `config` is made of, and its number of steps; shapes only, nothing is computed.

    `sources`: the opened ones of `config.graft`, to which this run's is added; None for a complete
    run, which needs none. Raises `UserError` for what the run would refuse before its first step;
    what only a new run refuses is allowed if `begun`.
    """
    configs.validate(config)
    if not begun:
        configs.raise_problems(configs.find_problems(config))
    components = build_components(config, begun=begun)
    plan = RunPlan(components)
    if not begun:
        configs.raise_problems(plan.find_problems())
    params = plan.make_abstract_state().params  # the rules of the optimizer too
    find_dropout_rates(components, params)
    make_augment_and_mix(components)
    plan.check_norms()
    plan.check_own_step()
    if sources is not None:
        _check_needs(config, components, sources)
    return components, plan.total_steps


def _check_needs(config: Any, components: RunComponents, sources: dict[Any, GraftSource]) -> None:
    """Raises `UserError` if wandb is missing, or if the weights of `config.graft` do not fit."""
    if config.log.wandb:
        import_wandb()
    if config.graft.source:
        options = grafting.read_options(config.graft)
        name = config.graft.source, options.averaged
        if name not in sources:
            sources[name] = open_source(config.graft.source, averaged=options.averaged)
        target = jax.eval_shape(components.init_variables)
        grafting.check_graft(sources[name], target, config.graft.rules, options)


def find_problems(components: RunComponents, fraction: float = 1.0) -> list[str]:
    """`RunPlan.find_problems` of a run on so much of the training examples."""
    plan = RunPlan(components)
    plan.steps_per_epoch *= fraction
    plan.total_steps = plan.count_steps(components.config.train.duration)
    return plan.find_problems()
