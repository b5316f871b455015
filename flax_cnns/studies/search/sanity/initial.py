"""Measures a network before training: its loss with and without penalties, and its layers."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_cnns import tree as pytree
from flax_cnns.analysis import activations
from flax_cnns.analysis.explain.features import unroll
from flax_cnns.errors import UserError
from flax_cnns.runs.build import (
    find_dropout_rates,
    make_augment_and_mix,
    make_training_key,
    train_batches,
)
from flax_cnns.studies.search.sanity.bench import (
    HostBatch,
    Meter,
    SanityBench,
    Trainer,
    drop_axis,
)
from flax_cnns.train import dropout, losses, parallel, steps
from flax_cnns.types import Array, PyTree

MAX_LAYER_IMAGES = 64


# ---------------------------------------------------------------------------- the initial loss


def measure_loss(bench: SanityBench, meter: Meter, train: HostBatch) -> dict[str, Any]:
    """Returns the numbers of the check `loss`: the initial loss of plain images, that of logits 0,
    and each further term of the loss that is minimized, as [name, value, is part of the loss]."""
    config = bench.config
    plain = meter.measure(bench.variables, train)
    numbers: dict[str, Any] = {
        "images": plain["count"],
        "loss": plain["loss"],
        "guessing": plain["guessing"],
        "spread": plain["spread"],
        "logits": bench.components.num_classes,
        "task": bench.dataset.task,
        "own_loss": bench.components.own_parts.loss is not None,
        "grafted": bool(config.graft.source),
    }
    terms: list[list[Any]] = []
    if config.mix.label_smoothing:
        name = f"label smoothing (mix.label_smoothing={config.mix.label_smoothing:g})"
        terms.append([name, plain["smoothed"] - plain["loss"], True])
    training, auxiliary = _measure_training_loss(bench)
    numbers["training_loss"] = training
    if auxiliary is not None:
        terms.append(["auxiliary heads (train.aux_weight)", auxiliary, True])
    terms += list_penalties(bench)
    numbers["terms"] = terms
    return numbers


def list_penalties(bench: SanityBench) -> list[list[Any]]:
    """Returns [name, value at initialization, whether it is part of the loss] of each penalty.

    Weight decay a counts as a/2 ||w||^2, whose gradient it adds. Decoupled, it is not in the loss.
    """
    config, optimizer = bench.config.optimizer, bench.optimizer
    weights, _ = pytree.partition(bench.variables["params"], optimizer.trainable)
    found: list[list[Any]] = []
    for name, regularizer in optimizer.regularizers.items():
        if regularizer.penalty is not None:
            value = float(regularizer.penalty(weights, jnp.zeros((), jnp.int32)))
            title = "L2 (optimizer.l2)" if name == "l2" else f"{name} (own regularizer)"
            found.append([title, value, True])
    decay = pytree.expand_per_parameter(
        config.weight_decay, bench.variables["params"], what="optimizer.weight_decay", default=0.0
    )
    decay, _ = pytree.partition(decay, optimizer.trainable)
    if not any(np.any(a) for a in jax.tree.leaves(decay)):
        return found
    squares = jax.tree.map(lambda w, a: 0.5 * float(np.sum(a * np.square(w))), weights, decay)
    is_own = bench.components.own_parts.optimizer is not None
    coupled = config.weight_decay_mode == "coupled" or (
        config.weight_decay_mode == "auto" and (is_own or config.name not in ("adamw", "lamb"))
    )
    kind = "coupled: acts as this penalty" if coupled else "decoupled: not in the loss"
    title = f"weight decay (optimizer.weight_decay, {kind})"
    return [*found, [title, sum(jax.tree.leaves(squares)), coupled]]


def _measure_training_loss(bench: SanityBench) -> tuple[float, float | None]:
    """Returns (the loss of the run's first batch as training computes it, without penalties and
    auxiliary losses; the auxiliary losses times their weights, or None if there are no heads)."""
    components, config = bench.components, bench.config
    rates = find_dropout_rates(components, bench.optimizer.trainable)
    apply = dropout.add_dropout(components.model.apply, rates, config.train.dropout_mode)
    has_heads: list[bool] = []

    def watch(variables: PyTree, images: Array, **call: Any) -> Any:
        logits, updates = apply(variables, images, **call)
        has_heads.append(bool(updates.get("aux_logits")))
        return logits, updates

    parts = make_augment_and_mix(components)
    step_config = steps.StepConfig(
        watch,
        bench.optimizer,
        **parts,
        loss=bench.loss,
        task=bench.dataset.task,
        aux_weights=losses.make_aux_weights(config.train, bench.plan.steps_per_epoch),
    )

    def measure(variables: PyTree, batch: Any, key: Array) -> tuple[Array, Array]:
        step = jnp.zeros((), jnp.int32)
        examples = steps.prepare_examples(
            batch, key, step, **parts, axis_name="batch", active=bench.optimizer.regularizers
        )
        total, (_, sums) = steps.compute_loss(
            step_config, step, {}, variables["params"], variables["batch_stats"], examples
        )
        return lax.pmean((sums["loss"] / sums["count"], total), "batch")

    run = parallel.parallelize(measure, components.mesh, mode=components.mode, donate=False)
    variables = {name: bench.variables.get(name, {}) for name in ("params", "batch_stats")}
    with contextlib.closing(train_batches(components)) as stream:
        given = parallel.replicate((variables, make_training_key(config)), components.mesh)
        loss, total = map(float, run(given[0], next(stream), given[1]))
    return loss, total - loss if any(has_heads) else None


# ---------------------------------------------------------------------------- layers


def measure_layers(bench: SanityBench, trainer: Trainer, train: HostBatch) -> dict[str, Any]:
    """Returns the numbers of the check `layers`: activations, dead channels and gradient norms at
    initialization, the size of one update relative to the weights, and frozen BatchNorms."""
    modes = bench.optimizer.batchnorm_modes
    mode: Any = "batch" if "train" in modes.values() else "running"
    network = drop_axis(bench.components.model)
    model, variables = unroll(network, jax.tree.map(jnp.asarray, bench.variables))
    images = jnp.asarray(bench.normalize(train["image"][:MAX_LAYER_IMAGES]))
    labels = losses.soft_labels(
        jnp.asarray(train["label"][:MAX_LAYER_IMAGES]), bench.components.num_classes
    )
    numbers: dict[str, Any] = {"batchnorm": mode, "images": len(images), "layers": []}
    try:
        found = activations.measure_activations(model, variables, images, batchnorm=mode)
    except UserError as error:
        return numbers | {"error": str(error)} | measure_batchnorm(bench, None)
    norms = activations.measure_gradients(
        model, variables, images, labels, batchnorm=mode, loss=bench.loss
    )
    rate = bench.config.schedule.learning_rate
    with trainer.batches() as stream:
        state, _ = trainer.step(trainer.start(), next(stream), rate)
        params, stats = jax.device_get((state.params, state.batch_stats))
        trainer.step(state, next(stream), rate)  # without compilation, for the forecast
    ratios = compare_weights(bench.variables, params)
    for layer in found:
        owner = layer.path.partition("[")[0]
        numbers["layers"].append(
            {
                "path": layer.path,
                "mean": layer.mean,
                "std": layer.std,
                "dead": layer.dead,
                "values": layer.values,
                "counts": layer.counts.tolist(),
                "range": [float(layer.edges[0]), float(layer.edges[-1])],
                "gradient": norms.get(owner),
                "update": ratios.get(owner),
            }
        )
    return numbers | measure_batchnorm(bench, stats)


def compare_weights(before: PyTree, params: PyTree) -> dict[str, float | None]:
    """Returns {layer: ||change of its kernel|| / ||kernel||}, with named blocks.

    A kernel that was 0 has None if it changed, and 0.0 if it did not.
    """
    old, new = (pytree.flatten(pytree.unstack_blocks(x)) for x in (before["params"], params))
    found: dict[str, float | None] = {}
    for path, kernel in old.items():
        if np.ndim(kernel) < 2 or not path.endswith("kernel"):
            continue
        kernel, change = np.asarray(kernel, np.float64), np.asarray(new[path], np.float64)
        size = float(np.linalg.norm(kernel))
        moved = float(np.linalg.norm(change - kernel))
        found[path.rpartition("/")[0]] = moved / size if size else (None if moved else 0.0)
    return found


def measure_batchnorm(bench: SanityBench, after: PyTree | None) -> dict[str, Any]:
    """Returns how many BatchNorm layers there are, and how many normalize by mean 0 and variance 1:
    those with frozen statistics (`frozen`), and those that one step did not move (`unmoved`).
    `after`: the statistics after the step."""
    stats = pytree.flatten(bench.variables.get("batch_stats", {}))
    moved = {} if after is None else pytree.flatten(after)
    modes = bench.optimizer.batchnorm_modes
    found = {"norms": len(modes), "frozen": 0, "unmoved": 0}

    def is_fresh(layer: str, of: dict[str, Any]) -> bool:
        mean, variance = (np.asarray(of[f"{layer}/{name}"]) for name in ("mean", "var"))
        return not mean.any() and bool((variance == 1).all())

    for layer, mode in modes.items():
        if not is_fresh(layer, stats):
            continue
        if mode != "train":
            found["frozen"] += 1
        elif moved and is_fresh(layer, moved):
            found["unmoved"] += 1
    return found
