"""Builds the objects of a run from its config: network, data, steps."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple, TypedDict

import jax

from flax_cnns import tree as pytree
from flax_cnns.data import augment, mix, pipeline
from flax_cnns.data.batch_stream import TrainBatches
from flax_cnns.data.load import load_dataset
from flax_cnns.data.streams import alternates_flips
from flax_cnns.data.types import Dataset
from flax_cnns.errors import UserError
from flax_cnns.evaluation.exact import evaluate
from flax_cnns.layers import inside_control_flow
from flax_cnns.models import registry
from flax_cnns.runs import own_parts
from flax_cnns.runs import workdir as workdirs
from flax_cnns.runs.network import check_network, describe_parameters, get_model_fields, make_model
from flax_cnns.runs.own_parts import OpaqueObjects, OwnParts
from flax_cnns.runtime import launch
from flax_cnns.train import (
    dropout,
    loop,
    losses,
    optimizers,
    parallel,
    precise_bn,
    step_calls,
    steps,
)
from flax_cnns.train.evaluation_step import make_eval_step
from flax_cnns.train.state import TrainState
from flax_cnns.types import Array, PyTree


class RunComponents(NamedTuple):
    """Everything that training and evaluation need, built from a config and not trained yet."""

    config: Any  # a ConfigDict
    model: Any  # a linen module
    dataset: Dataset
    mesh: Any  # of the devices that the run uses
    eval_step: Any  # (variables, batch, key) -> {metric: sum}, parallelized; None for `load_run`
    num_classes: int  # the number of logits
    own_parts: OwnParts = OwnParts()

    @property
    def mode(self) -> str:
        """How the steps are parallelized: `config.train.parallel`."""
        return self.config.train.parallel

    def shard(self, batch: dict[str, Any]) -> Any:
        """Puts a batch of this process on its devices."""
        return parallel.shard_batch(batch, self.mesh, self.mode)

    def evaluate(
        self,
        variables: PyTree,
        split: str,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> dict[str, Any]:
        """Returns the sums of the metrics over a split, with every example counted once.

        The blocks of `variables` may be named or stacked. Raises UserError if no image of the split
        can be decoded.
        """
        variables = self.stack_if_scanned(variables)
        batches = pipeline.eval_batches(
            self.dataset,
            split,
            self.config.data,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        with contextlib.closing(loop.prefetch(map(self.shard, batches))) as sharded:
            sums = evaluate(self.eval_step, variables, sharded, should_stop=should_stop)
        if not sums.get("count"):
            raise UserError(
                f"{self.dataset.name}: no image of the {split} split could be decoded, so there is"
                " nothing to evaluate; repair the images, then continue with the same command and"
                " --accept-changed-data"
            )
        return sums

    def stack_if_scanned(self, variables: PyTree) -> PyTree:
        """Returns `variables` in the layout that the training and evaluation steps use.

        A network with `scan` gets its blocks stacked. Everywhere else (checkpoints, grafting,
        `load_variables`) every block has a name.
        """
        scans = getattr(self.model, "scan", False)
        return pytree.stack_blocks(variables) if scans else variables

    def describe_own_parts(self) -> dict[str, Any]:
        """Returns the content of `own.json`: {kind: [{name, opaque, fields, digest}]}.

        An opaque network also has the shapes of its parameters.
        """
        record = {
            kind: [dict(part) for part in parts] for kind, parts in self.own_parts.record.items()
        }
        for part in record.get("model", ()):
            if part["opaque"]:
                part["params"] = describe_parameters(jax.eval_shape(self.init_variables))
        return record

    def init_variables(self) -> PyTree:
        """Initializes the network on one device, with named blocks.

        Depends on the seed alone, so the values are equal for any number of devices.
        """
        height, width, channels = self.dataset.image_shape
        shape = (1, height, width, channels)
        return registry.init_variables(self.model, jax.random.key(self.config.seed), shape)


def build_components(
    config: Any,
    objects: OpaqueObjects | None = None,
    *,
    confusion: bool = False,
    begun: bool = False,
    callbacks: bool = True,
    devices: list[Any] | None = None,
    dataset: Dataset | None = None,
) -> RunComponents:
    """Loads the data and builds the network, the mesh and the evaluation step.

    `objects`: what `own_parts.write_to_config` returned. `begun`: whether the run has begun, see
    `load_dataset`. `callbacks`: whether to create the own callbacks, see `own_parts.resolve`.
    `confusion`: whether the evaluation step also counts a confusion matrix. `devices`: those of the
    mesh; None takes all. `dataset`: None loads the config's. Raises UserError.
    """
    own = own_parts.resolve(config, objects, callbacks=callbacks)
    if own.network is None:
        registry.create_model(**get_model_fields(config))  # reports a typo before loading the data
    mesh = parallel.make_mesh(devices)
    parallel.check_batch(config.data.batch_size, mesh, what="data.batch_size")
    parallel.check_batch(config.data.eval_batch_size, mesh, what="data.eval_batch_size")
    if dataset is None:
        data = own.make_data() if own.make_data else None
        dataset = load_dataset(config.data, data=data, begun=begun)
    model = make_model(config, dataset, own.network)
    width = model.num_classes if own.network is None else check_network(model, dataset)
    eval_step = make_eval_step(
        model.apply,
        normalize=augment.make_normalize(config.data.augment, mean=dataset.mean, std=dataset.std),
        num_classes=width,
        confusion=confusion and dataset.task == "classes",
        loss=own.loss,
        metrics=own.metrics,
        task=dataset.task,
        flip=config.train.eval_flip,
    )
    eval_step = parallel.parallelize(eval_step, mesh, mode=config.train.parallel, donate=False)
    return RunComponents(config, model, dataset, mesh, eval_step, width, own)


def make_augment(components: RunComponents) -> steps.Augment:
    """Returns the function that augments and normalizes a batch of images."""
    dataset = components.dataset
    return augment.make_augment(
        components.config.data.augment,
        image_shape=dataset.image_shape,
        mean=dataset.mean,
        std=dataset.std,
        covariance=dataset.covariance,
        cropped=not dataset.in_memory,  # the loader has cropped the images of a stream
    )


class AugmentAndMix(TypedDict):
    """Keyword arguments of the training step and of the moments step."""

    augment: steps.Augment
    mix: steps.Mix


def make_augment_and_mix(components: RunComponents) -> AugmentAndMix:
    """Returns what the step applies to its images and labels.

    `augment` does nothing if the loader has augmented the images.
    """
    augment_images = make_augment(components)
    if components.config.data.augment.where == "loader":
        augment_images = lambda images, keys: images  # noqa: E731
    return {
        "augment": augment_images,
        "mix": mix.make_mix(
            components.config.mix, components.num_classes, task=components.dataset.task
        ),
    }


def make_training_key(config: Any) -> Array:
    """Returns the random key of the whole training, distinct from the initialization's."""
    return jax.random.fold_in(jax.random.key(config.seed), 1)


def host_batches(components: RunComponents, start: int = 0) -> Generator[Any] | TrainBatches:
    """Yields this process's rows of the training batches, from step `start` on, on the host.

    The caller must close the generator. A data set made by `Dataset.from_batches` gives a
    `TrainBatches`, which also has a method `digest(step)`.
    """
    return pipeline.train_batches(
        components.dataset,
        components.config.data,
        seed=components.config.seed,
        start_step=start,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def train_batches(
    components: RunComponents,
    start: int = 0,
    batches: Generator[Any] | TrainBatches | None = None,
) -> Generator[Any]:
    """Yields batches on the devices for the training step, from step `start` on, without end.

    The images are augmented if the config lets the loader augment. `batches`: the `host_batches`
    from `start` on; None makes them. The caller must close the generator.
    """
    config = components.config
    batches = host_batches(components, start) if batches is None else batches
    prepared: Iterator[Any] = batches
    with contextlib.closing(batches):
        if config.data.augment.where == "loader":
            first = jax.process_index() * (config.data.batch_size // jax.process_count())
            augmented = steps.make_loader_augment(
                make_augment(components), lambda: make_training_key(config), first=first
            )
            prepared = map(augmented, batches, itertools.count(start))
        yield from map(components.shard, prepared)


def train_calls(components: RunComponents, start: int, total: int) -> Generator[Any]:
    """Yields what `make_train_call` takes for its calls, from step `start` to step `total`."""
    config = components.config
    train, k = components.dataset.splits["train"], config.train.steps_per_call
    assert train.images is not None  # RunPlan refuses other data
    assert train.labels is not None
    rows = pipeline.train_rows(
        len(train.images),
        config.data,
        seed=config.seed,
        start_step=start,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    sizes = (min(k, total - step) for step in range(start, total, k))
    calls = (step_calls.stack(itertools.islice(rows, size)) for size in sizes)
    examples = train.images[:], train.labels[:]
    return step_calls.yield_calls(*examples, calls, components.mesh, mode=components.mode)


def find_dropout_rates(components: RunComponents, params: PyTree) -> dict[str, float]:
    """Returns {path of a module: rate} for `config.train.dropout`."""
    shape = (1, *components.dataset.image_shape)
    return dropout.decide_rates(components.config.train.dropout, components.model, shape, params)


def make_train_step(
    components: RunComponents, optimizer: optimizers.Optimizer, steps_per_epoch: float
) -> Callable[[TrainState, Any, Array], tuple[TrainState, dict[str, Array]]]:
    """Returns the parallelized training step of the run."""
    step = _make_step(components, optimizer, steps_per_epoch)
    return parallel.parallelize(step, components.mesh, mode=components.mode)


def make_train_call(
    components: RunComponents, optimizer: optimizers.Optimizer, steps_per_epoch: float
) -> Callable[[TrainState, Any, Array], tuple[TrainState, dict[str, Array]]]:
    """Returns the parallelized loop over `train.steps_per_call` training steps (step_calls.py)."""
    step = _make_step(components, optimizer, steps_per_epoch)
    call = step_calls.loop_steps(step, inside_control_flow)
    axes = step_calls.list_axes(mirror=alternates_flips(components.config.data.augment))
    return parallel.parallelize(call, components.mesh, mode=components.mode, axes=axes)


def _make_step(
    components: RunComponents, optimizer: optimizers.Optimizer, steps_per_epoch: float
) -> Callable[[TrainState, Any, Array], tuple[TrainState, dict[str, Array]]]:
    """Returns the training step of the run, as if there were one device."""
    config = components.config
    rates = find_dropout_rates(components, optimizer.trainable)
    return steps.make_train_step(
        dropout.add_dropout(components.model.apply, rates, config.train.dropout_mode),
        optimizer,
        **make_augment_and_mix(components),
        aux_weights=losses.make_aux_weights(config.train, steps_per_epoch),
        ema_decay=config.train.ema,
        ema_warmup=config.train.ema_warmup,
        accumulate=config.train.accumulate,
        loss=components.own_parts.loss,
        metrics=components.own_parts.metrics,
        task=components.dataset.task,
    )


def make_statistics_refresh(
    components: RunComponents,
    optimizer: optimizers.Optimizer,
    key: Array,
    should_stop: Callable[[], bool],
) -> Callable[[TrainState], TrainState] | None:
    """Returns the function that recomputes the BatchNorm statistics before a validation.

    Returns None if the config or the network does not need this.
    """
    n = components.config.train.precise_bn
    if not n or "train" not in optimizer.batchnorm_modes.values():
        return None
    step = precise_bn.make_moments_step(
        components.model.apply,
        optimizer.batchnorm_modes,
        **make_augment_and_mix(components),
        active=optimizer.regularizers,
    )
    step = parallel.parallelize(step, components.mesh, mode=components.mode, donate=False)

    def refresh(state: TrainState) -> TrainState:
        # Always the run's first batches, so that validations differ by the weights alone.
        with contextlib.closing(train_batches(components)) as stream:
            batches = itertools.islice(stream, n)
            stats = precise_bn.estimate_statistics(
                step, state.variables, batches, key, should_stop=should_stop
            )
        return state.with_statistics(parallel.replicate(stats, components.mesh))

    return refresh


def check_own_parts(workdir: pathlib.Path, record: dict[str, Any], *, begun: bool) -> list[str]:
    """Returns notes on own parts whose source changed since the run began.

    Raises UserError if the processes have different code, or if the parameters of an opaque network
    changed.
    """
    if not record:
        return []
    launch.check_processes_agree(
        json.dumps(record, sort_keys=True),
        what="the code of the own parts",
        fix="all must have the same files",
    )
    path = workdir / "own.json"
    if not begun or not path.is_file():
        return []
    return own_parts.compare_records(workdirs.read_json(path), record)


def initialize_jax(config: Any, *, connect: bool = True) -> None:
    """Sets XLA flags and connects the processes. Must come before JAX's first operation."""
    if config.train.deterministic:
        flag = "--xla_gpu_deterministic_ops=true"
        if flag not in os.environ.get("XLA_FLAGS", ""):
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    if connect:
        launch.initialize()


@contextlib.contextmanager
def explain_moved_data(config: Any) -> Iterator[None]:
    """Adds a cure to the UserError of a run whose `data.dir` does not exist."""
    try:
        yield
    except UserError as error:
        directory = config.data.dir
        if not directory or os.path.exists(os.path.expanduser(directory)):
            raise
        cure = "if the data moved, first start the run's own command with the new data.dir"
        raise UserError(f"{error}; {cure}") from None


def check_run_data(workdir: pathlib.Path, dataset: Dataset, accept: bool) -> dict[str, Any] | None:
    """Returns the accepted change of a run's data, or None if the data did not change.

    Raises UserError if the processes read different data, or if the data changed without `accept`.
    """
    launch.check_processes_agree(
        json.dumps(dataset.fingerprint, sort_keys=True),
        what="the data",
        fix="all must read the same files",
    )
    quiet = jax.process_index() > 0
    return workdirs.check_data(workdir, dataset.snapshot, accept=accept, quiet=quiet)
