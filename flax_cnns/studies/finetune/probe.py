"""Linear classifiers on a network's fixed features: "bottom features can be precomputed".

The features of all splits are computed once, without augmentation, pooled to [N C], and kept in a
file; each classifier then trains on them with the config's own loss, optimizer (but without SAM:
the problem is convex), schedule, number of steps and order of examples. On the network's last
features that is, but for rounding and for gradient noise, which is another, what a run computes in
which all but the classifier is frozen and nothing is augmented; it passes each image once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from flax_cnns import config as configs
from flax_cnns import files
from flax_cnns import tree as pytree
from flax_cnns.analysis.cost import cost
from flax_cnns.checkpoint.graft.graft import graft_from_config
from flax_cnns.data import augment, mix, pipeline
from flax_cnns.data import images as img
from flax_cnns.errors import UserError
from flax_cnns.runs import workdir as workdirs
from flax_cnns.runs.build import RunComponents, build_components
from flax_cnns.runs.train import check_complete_run
from flax_cnns.train import losses, metrics, optimizers, regularizers, schedules
from flax_cnns.types import Array, PyTree

LAST_LAYER = "pre_logits"  # what the network gives without its classifier
Features = dict[str, dict[str, np.ndarray]]  # split -> {"labels": i32 [N], layer: f32 [N C]}


def run_probe(
    config: ConfigDict,
    workdir: str | os.PathLike,
    layers: Sequence[str],
    *,
    every_layer: Sequence[str] = (),
    cache: str | os.PathLike,
    accept_changed_data: bool = False,
    fingerprint: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Trains a linear classifier on each of `layers` (module paths such as "stage2", or `LAST`) and
    returns what it writes to `workdir/summary.json`, beside `classifiers.npz` with kernels and
    biases by layer; a directory that is complete is only read.

    `config` is that of a run in which `optimizer.trainable` leaves the classifier alone. The
    accuracy is that of the layer with the best validation accuracy (without that split: the last).
    `every_layer`: those to be kept in the file `cache`, for other calls. `accept_changed_data` and
    `fingerprint`: as in `runs.train.run`. Raises `UserError`.
    """
    workdir, cache = pathlib.Path(workdir).absolute(), pathlib.Path(cache)
    resolved = configs.to_plain(config) | {"probe": list(layers)}
    with workdirs.open_workdir(workdir, primary=True) as opened:
        workdirs.check_workdir(workdir, resolved, accept_changed_data=accept_changed_data)
        if (workdir / "summary.json").is_file():
            check_complete_run(config, workdir, fingerprint, accept_changed_data)
            return workdirs.read_json(workdir / "summary.json")
        components = build_components(config)
        files.write_json(workdir / "config.json", resolved)
        files.write_json(workdir / "dataset.json", components.dataset.as_dict())
        shape = (1, *components.dataset.image_shape)
        order = [layer.path for layer in cost(components.model, shape, train=False).layers]
        variables = components.init_variables()
        if config.graft.source:
            variables, report = graft_from_config(config.graft, variables, order)
            print(report)
        wanted = list(dict.fromkeys([*every_layer, *layers]))
        found, passing = load_or_compute_features(components, variables, wanted, cache)
        opened.begun = True
        tried, heads = {}, {}
        for layer in layers:
            head, tried[layer] = _classify(components, variables, layer, found)
            heads |= {f"{layer}/{name}": array for name, array in head.items()}
        np.savez(workdir / "classifiers.npz", **heads)
        best = max(tried, key=lambda name: tried[name].get("validation/accuracy", 0.0))
        chosen = tried[best if "validation" in found else layers[-1]]
        summary = {
            "model": config.model.name,
            "dataset": components.dataset.name,
            "seed": config.seed,
            "validation/best_accuracy": chosen.get("validation/accuracy"),
            "test/accuracy": chosen["test/accuracy"],
            "layers": tried,
            # Without compiling.
            "features_seconds": passing,
            "training_seconds": sum(layer["seconds"] for layer in tried.values()),
        }
        with (workdir / "metrics.jsonl").open("w") as log:
            for layer, numbers in tried.items():
                log.write(json.dumps({"layer": layer} | numbers) + "\n")
        files.write_json(workdir / "summary.json", summary)
        return summary


# ---------------------------------------------------------------------------- features


def load_or_compute_features(
    components: RunComponents, variables: PyTree, layers: Sequence[str], cache: pathlib.Path
) -> tuple[Features, float]:
    """What `features` gives. It is read from `cache` if that holds the features of this config,
    these weights and these examples undamaged; else it is computed and kept there."""
    config = configs.to_plain(components.config)
    data = config["data"] | {"dir": ""}  # the digest covers the data, wherever they lie
    key = json.dumps([config["model"], data, list(layers), _digest(components, variables)])
    if cache.is_file():
        # A damaged file may raise anything.
        with contextlib.suppress(Exception), np.load(cache) as kept:
            if str(kept["key"]) == key:
                flat = {name: kept[name] for name in kept.files if "/" in name}
                found: Features = {}
                for name, array in flat.items():
                    split, layer = name.split("/", 1)
                    found.setdefault(split, {})[layer] = array
                return found, float(kept["seconds"])
    found, seconds = compute_features(components, variables, layers)
    flat = {f"{split}/{n}": array for split, of in found.items() for n, array in of.items()}
    cache.parent.mkdir(parents=True, exist_ok=True)
    with files.replace_atomically(cache) as beside, beside.open("wb") as file:
        np.savez(file, key=np.str_(key), seconds=seconds, **flat)
    return found, seconds


def _digest(components: RunComponents, variables: PyTree) -> str:
    """A digest of the weights and of the examples of all splits: of pixels and labels in memory,
    else of the fingerprint and the reader's version. A folder or a run may hold others today under
    the same name."""
    digest = hashlib.sha256()
    for path, leaf in pytree.flatten(jax.device_get(variables)).items():
        digest.update(path.encode())
        digest.update(np.ascontiguousarray(leaf))
    for role, split in components.dataset.splits.items():
        digest.update(f"{role} {len(split)}".encode())
        if split.labels is not None:
            digest.update(np.ascontiguousarray(split.labels))
        if split.images is not None:
            digest.update(np.ascontiguousarray(split.images))
        else:
            digest.update(f"reader {img.READER_VERSION}".encode())
    digest.update(json.dumps(components.dataset.fingerprint, sort_keys=True).encode())
    return digest.hexdigest()


def compute_features(
    components: RunComponents, variables: PyTree, layers: Sequence[str]
) -> tuple[Features, float]:
    """Each image of each split through the network once, in evaluation mode. Whatever stands
    between examples and channels is averaged. Beside them the seconds that the training images
    took, without compiling: the others any strategy must pass to be evaluated."""
    dataset = components.dataset
    # Every block by its name: inside a stack nothing can be captured.
    named = {"scan": False} if hasattr(components.model, "scan") else {}
    model = components.model.clone(num_classes=None, **named)
    normalize = augment.make_normalize(
        components.config.data.augment, mean=dataset.mean, std=dataset.std
    )

    @jax.jit
    def forward(variables: PyTree, images: Array) -> dict[str, Array]:
        pre_logits, state = model.apply(
            variables,
            normalize(images),
            train=False,
            capture_intermediates=lambda module, _: "/".join(module.path) in layers,
            mutable=["intermediates"],
        )
        captured = pytree.flatten(state.get("intermediates", {}))
        maps = {path.removesuffix("/__call__/0"): x for path, x in captured.items()}
        return {
            layer: x.reshape(len(x), -1, x.shape[-1]).astype(jnp.float32).mean(1)
            for layer, x in {**maps, LAST_LAYER: pre_logits}.items()
            if layer in layers
        }

    def batches(split: str) -> Any:
        return pipeline.eval_batches(dataset, split, components.config.data)

    first = next(batches("test"))["image"]
    jax.block_until_ready(forward(variables, first))  # compiled now
    found, seconds = {}, {}
    for split in dataset.splits:
        began = time.perf_counter()
        rows: dict[str, list] = {}
        for batch in batches(split):
            there = batch["mask"] > 0
            computed = jax.device_get(forward(variables, batch["image"]))
            for name, array in (computed | {"labels": batch["label"]}).items():
                rows.setdefault(name, []).append(array[there])
        found[split] = {name: np.concatenate(arrays) for name, arrays in rows.items()}
        if not len(found[split]["labels"]):
            raise UserError(f"{dataset.name}: no image of the {split} split could be decoded")
        seconds[split] = time.perf_counter() - began
    if missing := set(layers) - set(found["train"]):
        raise UserError(f"{components.config.model.name} has no layer {sorted(missing)[0]!r}")
    return found, seconds["train"]


# ---------------------------------------------------------------------------- the classifier


def _classify(
    components: RunComponents, variables: PyTree, layer: str, found: Features
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """The classifier on a layer, {"kernel" [C K], "bias" [K]} of the features as they are, and
    {"validation/accuracy", "test/accuracy", "seconds"}, beside the user's own metrics of both."""
    config = components.config
    per_epoch = len(found["train"]["labels"]) / config.data.batch_size
    total = schedules.parse_duration(config.train.duration, per_epoch, what="train.duration")
    schedule = schedules.make_schedule(
        config.schedule, total_steps=total, steps_per_epoch=per_epoch
    )
    params, batch_stats = variables["params"], variables.get("batch_stats")
    own = components.own_parts
    optimizer = optimizers.make_optimizer(
        config.optimizer,
        params,
        schedule,
        batch_stats=batch_stats,
        factory=own.optimizer,
        factory_fields=own.optimizer_fields,
    )
    loss_of = own.loss or losses.cross_entropy
    head = _head(pytree.partition(params, optimizer.trainable)[0], layer, found["train"][layer])
    soften = mix.make_mix(
        ConfigDict(config.mix.to_dict() | {"mixup": 0.0, "cutmix": 0.0}), components.num_classes
    )
    size = config.data.batch_size
    places = range(total * size)
    order = [pipeline.row_at(i, config.seed, len(found["train"]["labels"])) for i in places]
    order = jnp.asarray(order).reshape(total, size)

    def train(head: PyTree, x: Array, labels: Array, order: Array) -> PyTree:
        def step(carry: tuple, inputs: tuple) -> tuple:
            (head, opt_state), (i, rows) = carry, inputs

            def loss(head: PyTree) -> Array:
                _, soft = soften(x[rows], labels[rows], jax.random.key(0))
                kernel, bias = _kernel_and_bias(head)
                return jnp.mean(loss_of(x[rows] @ kernel + bias, soft))

            grads, key = jax.grad(loss)(head), jax.random.fold_in(jax.random.key(config.seed), i)
            grads, _ = regularizers.add_penalties(optimizer.regularizers, head, grads, i)
            return optimizer.update(head, grads, opt_state, step=i, key=key), None

        carry = head, optimizer.tx.init(head)
        return jax.lax.scan(step, carry, (jnp.arange(total), order))[0][0]

    x, labels = found["train"][layer], found["train"]["labels"]
    mean, std = 0.0, 1.0
    if layer != LAST_LAYER:
        # Each layer has another scale, and the rate was chosen for the last.
        mean, std = x.mean(0), x.std(0) + 1e-6
    inputs = head, (x - mean) / std, labels, order
    compiled = jax.jit(train).lower(*inputs).compile()
    began = time.perf_counter()
    head = jax.block_until_ready(compiled(*inputs))
    numbers = {"seconds": time.perf_counter() - began}
    kernel, bias = map(np.asarray, _kernel_and_bias(head))
    kernel = kernel / np.reshape(std, (-1, 1))
    bias = bias - mean @ kernel if layer != LAST_LAYER else bias
    for split in found.keys() - {"train"}:
        logits, true = found[split][layer] @ kernel + bias, found[split]["labels"]
        classes = true if true.ndim == 1 else np.argmax(true, -1)  # rows of soft labels
        numbers[f"{split}/accuracy"] = float(np.mean(np.argmax(logits, -1) == classes))
        if own.metrics:
            hot = np.eye(logits.shape[-1], dtype=np.float32)[true] if true.ndim == 1 else true
            soft = np.pad(hot, ((0, 0), (0, logits.shape[-1] - hot.shape[-1])))
            sums = metrics.sum_own_metrics(own.metrics, jnp.asarray(logits), jnp.asarray(soft))
            numbers |= metrics.compute(jax.device_get(sums), f"{split}/")
    return {"kernel": kernel, "bias": bias}, numbers


def find_dense_kernel(leaves: Mapping[str, Any]) -> str | None:
    """The path of the kernel of a classifier that is one dense layer; None of another one."""
    kernels = [path for path in leaves if path.endswith("/kernel") and leaves[path].ndim == 2]
    return kernels[0] if len(kernels) == 1 and len(leaves) <= 2 else None


def _head(head: PyTree, layer: str, x: np.ndarray) -> PyTree:
    """The network's fresh classifier; on another layer than its own one of zeros."""
    flat = pytree.flatten(head)
    if not (kernel := find_dense_kernel(flat)):
        raise UserError(
            "a linear classifier on features: expected one dense layer (no convolution) alone to be"
            f" trainable, got {', '.join(flat)}"
        )
    if layer == LAST_LAYER:
        return head
    flat = {path: jnp.zeros_like(leaf) for path, leaf in flat.items()}
    flat[kernel] = jnp.zeros((x.shape[-1], flat[kernel].shape[-1]), jnp.float32)
    return pytree.unflatten(flat)


def _kernel_and_bias(head: PyTree) -> tuple[Array, Array | float]:
    flat = pytree.flatten(head)
    kernel = next(leaf for path, leaf in flat.items() if path.endswith("/kernel"))
    return kernel, next((leaf for path, leaf in flat.items() if path.endswith("/bias")), 0.0)
