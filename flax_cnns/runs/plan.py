"""Plans a run from shapes alone: its steps, when it validates and saves, its optimizer.

Writes nothing and computes nothing, so that a sweep can check all its runs first.
"""

from __future__ import annotations

import dataclasses
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
from flax_cnns.data.streams import alternates_flips
from flax_cnns.errors import UserError
from flax_cnns.layers import norm
from flax_cnns.runs.build import (
    RunComponents,
    build_components,
    find_dropout_rates,
    make_augment_and_mix,
    make_train_step,
)
from flax_cnns.train import (
    batchnorm_modes,
    loop,
    memory,
    metrics,
    optimizers,
    parallel,
    schedules,
    step_calls,
)
from flax_cnns.train.state import TrainState
from flax_cnns.train.writer import import_wandb
from flax_cnns.types import Array, PyTree


class RunPlan:
    """The number of steps of a run, and what the steps need.

    Attributes:
        total_steps: of the whole run.
        steps_per_epoch: may be a fraction.
        periods: how often, in steps, the run logs, validates and saves.
        has_validation: whether there is a validation split.
        best_by, best_mode: the validation metric that selects the best checkpoint, "max" or "min".

    Raises UserError for a duration of less than one step, for batches that do not fit into memory,
    and for a plateau schedule or early stopping without a validation split.
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
            raise UserError(f"train.duration: {config.train.duration!r} is less than one step")
        self.periods = loop.Periods(
            log=self.count_steps(config.log.every, "log.every"),
            evaluate=self.count_steps(config.train.eval_every, "train.eval_every"),
            save=self.count_steps(config.checkpoint.every, "checkpoint.every"),
        )
        self._check_calls()
        if components.dataset.is_stream and config.train.evaluate_train:
            raise UserError(
                f"train.evaluate_train: {components.dataset.name} gives training batches without"
                " end, not each example once; pass some of its examples as another split"
            )
        if not self.has_validation and (
            config.schedule.name == "plateau" or config.train.early_stopping
        ):
            is_stream = components.dataset.is_stream
            remedy = "give sizes['validation']" if is_stream else "set data.validation=0.1"
            raise UserError(
                f"data.validation: {components.dataset.name} has no validation split, which the"
                f" plateau schedule and early stopping need; {remedy}"
            )

    def count_steps(self, duration: str, field: str = "duration") -> int:
        """Returns the steps of a duration ("3 epochs"). `field` is named in an error message."""
        return schedules.parse_duration(duration, self.steps_per_epoch, what=field)

    def find_problems(self) -> list[str]:
        """Returns the problems that `config.find_problems` can see only with network and data."""
        components = self.components

        def find_shapes() -> PyTree:
            return jax.eval_shape(components.init_variables)

        def has_aux_heads() -> bool:
            # The axis of synchronized statistics exists only inside a step.
            no_axis = {"axis_name": None} if hasattr(components.model, "axis_name") else {}
            model = components.model.clone(**no_axis)
            variables = components.stack_if_scanned(find_shapes())
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
            has_batchnorm=lambda: bool(find_shapes()["batch_stats"]),
            has_aux_heads=has_aux_heads,
            decodes_images=components.dataset.is_decoded,
        )
        return configs.find_problems(self.config, facts)

    @functools.cached_property
    def layer_order(self) -> list[str]:
        """The paths of the network's layers, in the order in which they run."""
        shape = (1, *self.components.dataset.image_shape)
        return [layer.path for layer in cost(self.components.model, shape, train=False).layers]

    @property
    def notes(self) -> list[str]:
        """What a new run says about its plan: that loops gain little on a CPU."""
        n = self.config.train.steps_per_call
        if n == 1 or self.components.mesh.devices.flat[0].platform != "cpu":
            return []
        return [
            f"train.steps_per_call={n}: on a CPU, a loop of steps is hardly faster than single"
            " steps, or slower (docs/accelerators.md); 1 is better but for tests of such runs"
        ]

    def make_optimizer(self, variables: PyTree) -> optimizers.Optimizer:
        """Makes the optimizer of the config for the network's variables."""
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
        """Returns the shapes and shardings of the training state; computes no values."""

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
        """Raises UserError if a training BatchNorm would see one value per channel in a step.

        Computes shapes only, and only if a device takes one image at a time: two images already
        have two values per channel.
        """
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
                f" {list(error.shape)}: BatchNorm of 1 value per channel makes all images equal;"
                f" set data.batch_size={2 * devices * pieces}, or use larger images"
            ) from None

    def check_own_step(self) -> None:
        """Raises UserError if an own loss, metric, regularizer or optimizer fails in a step.

        Traces the training step. Does nothing if the run has none of these own parts.
        """
        components, own = self.components, self.components.own_parts
        if not (own.loss or own.metrics or own.regularizers or own.optimizer):
            return
        state, train = self.make_abstract_state(), components.dataset.splits["train"]
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        step = make_train_step(components, self.make_optimizer(variables), self.steps_per_epoch)
        images = np.uint8 if train.images is None else train.images.dtype
        labels = np.zeros(1, np.int32) if train.labels is None else train.labels
        batch = parallel.describe_batch(
            {
                "image": (components.dataset.image_shape, images),
                "label": (labels.shape[1:], labels.dtype),
                **self._describe_mirror(),
            },
            self.config.data.batch_size,
            components.mesh,
            components.mode,
        )
        jax.eval_shape(step, state, batch, jax.random.key(0))

    def _describe_mirror(self) -> dict[str, tuple[tuple[int, ...], type]]:
        mirrors = alternates_flips(self.config.data.augment)
        return {"mirror": ((), np.bool_)} if mirrors else {}

    def check_memory(self, train_step: Callable, state: TrainState, batch: Any, key: Any) -> None:
        """Raises UserError if the batches do not fit into a CPU's memory. Compiles the step."""
        components, data = self.components, self.config.data
        devices = parallel.local_devices(components.mesh)
        if devices[0].platform != "cpu":
            return
        need = memory.needed(train_step, state, batch, key) * len(devices)
        if not memory.fits(20 * need):
            # XLA does not count the patches that a convolution's gradient creates at run time.
            image_shape = (1, *components.dataset.image_shape)
            layers = cost(components.model, image_shape, train=False).layers
            shapes_of_maps = ((x.macs, x.output_shape or ()) for x in layers)
            patches = max(
                (m / shape[-1] for m, shape in shapes_of_maps if len(shape) == 4), default=0
            )
            pieces = jax.process_count() * self.config.train.accumulate
            need += 4 * patches * data.batch_size / pieces
        memory.check_fits(need, what=f"data.batch_size={data.batch_size}")
        size = data.eval_batch_size
        if memory.fits(need * size / data.batch_size):
            return  # evaluation has no backward pass, so it needs less than training
        images = components.dataset.splits["train"].images
        is_uint8 = images is None and not components.dataset.is_stream
        # Everywhere but in a call, the rows of a batch come after its axes of devices and examples.
        first = 2 if components.mode == "pmap" and "rows" not in batch else 1
        label = batch["label"]
        shapes = parallel.describe_batch(
            {
                "image": (
                    components.dataset.image_shape,
                    np.uint8 if is_uint8 else getattr(images, "dtype", np.float32),
                ),
                "label": (label.shape[first:], label.dtype),
                "mask": ((), np.float32),
            },
            size,
            components.mesh,
            components.mode,
        )
        need = memory.needed(components.eval_step, state.variables, shapes, None) * len(devices)
        memory.check_fits(need, what=f"data.eval_batch_size={size}")

    def _check_batches(self) -> None:
        """Raises UserError if the images of the batches alone do not fit into this machine."""
        if not parallel.is_on_this_machine(self.components.mesh):
            return
        data, dataset = self.config.data, self.components.dataset
        images = dataset.splits["train"].images
        is_uint8 = images is None or images.dtype == np.uint8  # a stream's images may be floats
        image_bytes = math.prod(dataset.image_shape) * (1 if is_uint8 else 4)
        batches_ahead = 2 if self.components.dataset.in_memory else 4
        for field in ("batch_size", "eval_batch_size"):
            size = data[field] // jax.process_count()
            what = f"data.{field}={data[field]}"
            memory.check_fits(batches_ahead * size * image_bytes, what=what)

    def _check_calls(self) -> None:
        """Raises UserError if `train.steps_per_call` does not suit the data or the periods."""
        n, train = self.config.train.steps_per_call, self.components.dataset.splits["train"]
        if n == 1:
            return
        if train.images is None or self.config.data.augment.where == "loader":
            problem = (
                "the host augments the images (data.augment.where='loader')"
                if train.images is not None
                else f"{self.components.dataset.name} is not in memory"
            )
            raise UserError(
                f"train.steps_per_call={n}: the images of all steps must be on the devices, but"
                f" {problem}; set train.steps_per_call=1"
            )
        names = {"log": "log.every", "evaluate": "train.eval_every", "save": "checkpoint.every"}
        periods = {names[key]: steps for key, steps in dataclasses.asdict(self.periods).items()}
        step_calls.check_periods(n, periods)


# For each metric that a run logs by itself: whether the highest or the lowest value is the best.
BEST_MODES = {
    **dict.fromkeys(("accuracy", "top5", "label_accuracy", "subset_accuracy"), "max"),
    "loss": "min",
}


def choose_best_metric(components: RunComponents) -> tuple[str, str]:
    """Returns (validation metric, "max" or "min") from `train.best_by` and `train.best_mode`.

    Raises UserError for an unknown metric, and for an own metric without a mode.
    """
    config, task = components.config.train, components.dataset.task
    by, mode = config.best_by.removeprefix("validation/"), config.best_mode
    if by == "auto":
        by = "loss" if task == "multilabel" else "accuracy"
    own_metrics = components.own_parts.metrics
    names = metrics.list_names(components.num_classes, task=task, own_metrics=own_metrics)
    metrics.check_best_by(by, names)
    if mode == "auto" and by not in BEST_MODES:
        raise UserError(
            f"train.best_mode: is the highest or the lowest {by!r} the best? Set max or min"
        )
    return by, BEST_MODES[by] if mode == "auto" else mode


def dry_run(
    config: Any, sources: dict[Any, GraftSource] | None = None, *, begun: bool = False
) -> tuple[RunComponents, int]:
    """Builds a run of `config` from shapes alone. Returns its components and its number of steps.

    `sources`: the opened sources of `config.graft`, to which this run's source is added; None skips
    the checks that a complete run does not need. `begun`: skips the checks of a new run. Raises
    UserError for everything that the run would refuse before its first step.
    """
    configs.validate(config)
    if not begun:
        configs.raise_problems(configs.find_problems(config))
    components = build_components(config, begun=begun)
    plan = RunPlan(components)
    if not begun:
        configs.raise_problems(plan.find_problems())
    params = plan.make_abstract_state().params  # also checks the optimizer's rules
    find_dropout_rates(components, params)
    make_augment_and_mix(components)
    plan.check_norms()
    plan.check_own_step()
    if sources is not None:
        _check_wandb_and_graft(config, components, sources)
    return components, plan.total_steps


def _check_wandb_and_graft(
    config: Any, components: RunComponents, sources: dict[Any, GraftSource]
) -> None:
    """Raises UserError if wandb is missing, or if the weights of `config.graft` do not fit."""
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
    """Returns `RunPlan.find_problems` for a run on a fraction of the training examples."""
    plan = RunPlan(components)
    plan.steps_per_epoch *= fraction
    plan.total_steps = plan.count_steps(components.config.train.duration)
    return plan.find_problems()
