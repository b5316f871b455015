"""Linear classifiers on a network's fixed features (CS231n: "bottom features can be precomputed").

The features of all splits are computed once, without augmentation, pooled to [N C], and kept in a
file. Each classifier is then trained on them with the config's own loss, optimizer (without SAM,
because the problem is convex), schedule, number of steps and order of examples. On the last
features, the result equals, up to rounding, a run without augmentation that trains only the
classifier; but here the network sees each image only once. Gradient noise, if on, is drawn
differently.
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
from flax_cnns.data import augment, mix, pipeline, streams
from flax_cnns.data import images as img
from flax_cnns.errors import UserError
from flax_cnns.runs import workdir as workdirs
from flax_cnns.runs.build import RunComponents, build_components
from flax_cnns.runs.train import check_complete_run
from flax_cnns.train import losses, metrics, optimizers, regularizers, schedules
from flax_cnns.types import Array, PyTree

LAST_LAYER = "pre_logits"  # the network's output without its classifier
Features = dict[str, dict[str, np.ndarray]]  # split -> {"labels": i32 [N], layer: f32 [N C]}


def run_probe(
    config: ConfigDict,
    workdir: str | os.PathLike,
    layers: Sequence[str],
    *,
    cached_layers: Sequence[str] = (),
    cache: str | os.PathLike,
    accept_changed_data: bool = False,
    fingerprint: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Trains a linear classifier on the features of each of `layers`.

    Layers are module paths such as "stage2", or `LAST_LAYER`. Writes `summary.json` and
    `classifiers.npz` (kernels and biases by layer) into `workdir` and returns the summary. If
    `workdir` is complete, only reads its summary. The summary's accuracy is from the layer with the
    best validation accuracy, or from the last layer if there is no validation split.

    `config`: of a run in which `optimizer.trainable` selects only the classifier. `cached_layers`:
    more layers to keep in the file `cache`, for other calls. `accept_changed_data` and
    `fingerprint`: as in `runs.train.run`. Raises UserError.
    """
    workdir, cache = pathlib.Path(workdir).absolute(), pathlib.Path(cache)
    resolved = configs.to_plain(config) | {"probe": list(layers)}
    with workdirs.open_workdir(workdir, primary=True) as handle:
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
        all_layers = list(dict.fromkeys([*cached_layers, *layers]))
        features, seconds = load_or_compute_features(components, variables, all_layers, cache)
        handle.begun = True
        results: dict[str, dict[str, float]] = {}
        heads: dict[str, Any] = {}
        for layer in layers:
            head, results[layer] = _train_classifier(components, variables, layer, features)
            heads |= {f"{layer}/{name}": array for name, array in head.items()}
        np.savez(workdir / "classifiers.npz", **heads)
        best = max(results, key=lambda name: results[name].get("validation/accuracy", 0.0))
        chosen = results[best if "validation" in features else layers[-1]]
        summary = {
            "model": config.model.name,
            "dataset": components.dataset.name,
            "seed": config.seed,
            "validation/best_accuracy": chosen.get("validation/accuracy"),
            "test/accuracy": chosen["test/accuracy"],
            "layers": results,
            # Without compiling.
            "features_seconds": seconds,
            "training_seconds": sum(numbers["seconds"] for numbers in results.values()),
        }
        with (workdir / "metrics.jsonl").open("w") as log:
            for layer, numbers in results.items():
                log.write(json.dumps({"layer": layer} | numbers) + "\n")
        files.write_json(workdir / "summary.json", summary)
        return summary


# ---------------------------------------------------------------------------- features


def load_or_compute_features(
    components: RunComponents, variables: PyTree, layers: Sequence[str], cache: pathlib.Path
) -> tuple[Features, float]:
    """Returns what `compute_features` returns.

    Reads it from `cache` if the file is intact and belongs to this config, these weights and these
    examples; otherwise computes it and writes the file.
    """
    config = configs.to_plain(components.config)
    data = config["data"] | {"dir": ""}  # the digest covers the data, wherever they are
    key = json.dumps([config["model"], data, list(layers), _digest(components, variables)])
    if cache.is_file():
        # A damaged file may raise any exception.
        with contextlib.suppress(Exception), np.load(cache) as saved:
            if str(saved["key"]) == key:
                cached: Features = {}
                for name in saved.files:
                    if "/" in name:
                        split, layer = name.split("/", 1)
                        cached.setdefault(split, {})[layer] = saved[name]
                return cached, float(saved["seconds"])
    features, seconds = compute_features(components, variables, layers)
    flat: dict[str, Any] = {
        f"{split}/{name}": array
        for split, arrays in features.items()
        for name, array in arrays.items()
    }
    cache.parent.mkdir(parents=True, exist_ok=True)
    with files.replace_atomically(cache) as temporary, temporary.open("wb") as file:
        np.savez(file, key=np.str_(key), seconds=seconds, **flat)
    return features, seconds


def _digest(components: RunComponents, variables: PyTree) -> str:
    """Returns a digest of the weights and of the examples of all splits.

    Covers the data's fingerprint, known labels, and pixels in memory. For other images, covers the
    reader's version instead of pixels. The same folder or run name may hold other data later.
    """
    digest = hashlib.sha256()

    def update(array: Any) -> None:
        digest.update(np.ascontiguousarray(array).data)

    for path, leaf in pytree.flatten(jax.device_get(variables)).items():
        digest.update(path.encode())
        update(leaf)
    for role, split in components.dataset.splits.items():
        digest.update(f"{role} {len(split)}".encode())
        if split.labels is not None:
            update(split.labels)
        if split.images is not None:
            update(split.images)
        else:
            digest.update(f"reader {img.READER_VERSION}".encode())
    digest.update(json.dumps(components.dataset.fingerprint, sort_keys=True).encode())
    return digest.hexdigest()


def compute_features(
    components: RunComponents, variables: PyTree, layers: Sequence[str]
) -> tuple[Features, float]:
    """Computes the features of all images of all splits, in evaluation mode.

    All axes between examples and channels are averaged. Returns (features, seconds for the training
    images without compiling). The time for the other splits does not count, because every strategy
    evaluates them.
    """
    dataset = components.dataset
    # Without scan, so that every block has a name: inside a stack nothing can be captured.
    unscanned = {"scan": False} if hasattr(components.model, "scan") else {}
    model = components.model.clone(num_classes=None, **unscanned)
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
    jax.block_until_ready(forward(variables, first))  # compiles
    features: Features = {}
    seconds: dict[str, float] = {}
    for split in dataset.splits:
        start_time = time.perf_counter()
        rows: dict[str, list] = {}
        for batch in batches(split):
            is_real = batch["mask"] > 0
            computed = jax.device_get(forward(variables, batch["image"]))
            for name, array in (computed | {"labels": batch["label"]}).items():
                rows.setdefault(name, []).append(array[is_real])
        features[split] = {name: np.concatenate(arrays) for name, arrays in rows.items()}
        if not len(features[split]["labels"]):
            raise UserError(f"{dataset.name}: no image of the {split} split could be decoded")
        seconds[split] = time.perf_counter() - start_time
    if missing := set(layers) - set(features["train"]):
        raise UserError(f"{components.config.model.name} has no layer {sorted(missing)[0]!r}")
    return features, seconds["train"]


# ---------------------------------------------------------------------------- the classifier


def _train_classifier(
    components: RunComponents, variables: PyTree, layer: str, features: Features
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Trains the classifier on a layer.

    Returns {"kernel" [C K], "bias" [K]} for unscaled features, and {"validation/accuracy",
    "test/accuracy", "seconds"} with the user's own metrics of both splits.
    """
    config = components.config
    per_epoch = len(features["train"]["labels"]) / config.data.batch_size
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
    x, labels = features["train"][layer], features["train"]["labels"]
    head = _make_head(pytree.partition(params, optimizer.trainable)[0], layer, x)
    soften = mix.make_mix(
        ConfigDict(config.mix.to_dict() | {"mixup": 0.0, "cutmix": 0.0}), components.num_classes
    )
    size = config.data.batch_size
    positions = range(total * size)
    rows_in_order = [streams.find_row(i, config.seed, len(labels)) for i in positions]
    order = jnp.asarray(rows_in_order).reshape(total, size)

    def train(head: PyTree, x: Array, labels: Array, order: Array) -> PyTree:
        def step(carry: tuple, inputs: tuple) -> tuple:
            (head, opt_state), (i, rows) = carry, inputs

            def loss(head: PyTree) -> Array:
                _, soft = soften(x[rows], labels[rows], jax.random.key(0))
                kernel, bias = _get_kernel_and_bias(head)
                return jnp.mean(loss_of(x[rows] @ kernel + bias, soft))

            grads, key = jax.grad(loss)(head), jax.random.fold_in(jax.random.key(config.seed), i)
            grads, _ = regularizers.add_penalties(optimizer.regularizers, head, grads, i)
            return optimizer.update(head, grads, opt_state, step=i, key=key), None

        carry = head, optimizer.tx.init(head)
        return jax.lax.scan(step, carry, (jnp.arange(total), order))[0][0]

    mean: Any = 0.0
    std: Any = 1.0
    if layer != LAST_LAYER:
        # Layers have different scales, and the learning rate was chosen for the last layer.
        mean, std = x.mean(0), x.std(0) + 1e-6
    inputs = head, (x - mean) / std, labels, order
    compiled = jax.jit(train).lower(*inputs).compile()
    start_time = time.perf_counter()
    head = jax.block_until_ready(compiled(*inputs))
    numbers = {"seconds": time.perf_counter() - start_time}
    kernel, bias = map(np.asarray, _get_kernel_and_bias(head))
    kernel = kernel / np.reshape(std, (-1, 1))
    bias = bias - mean @ kernel if layer != LAST_LAYER else bias
    for split in features.keys() - {"train"}:
        logits, true = features[split][layer] @ kernel + bias, features[split]["labels"]
        classes = true if true.ndim == 1 else np.argmax(true, -1)  # soft labels are rows [N K]
        numbers[f"{split}/accuracy"] = float(np.mean(np.argmax(logits, -1) == classes))
        if own.metrics:
            one_hot = np.eye(logits.shape[-1], dtype=np.float32)[true] if true.ndim == 1 else true
            soft = np.pad(one_hot, ((0, 0), (0, logits.shape[-1] - one_hot.shape[-1])))
            sums = metrics.sum_own_metrics(own.metrics, jnp.asarray(logits), jnp.asarray(soft))
            numbers |= metrics.compute(jax.device_get(sums), f"{split}/")
    return {"kernel": kernel, "bias": bias}, numbers


def find_dense_kernel(leaves: Mapping[str, Any]) -> str | None:
    """Returns the path of the kernel if the classifier is one dense layer; otherwise None."""
    kernels = [path for path in leaves if path.endswith("/kernel") and leaves[path].ndim == 2]
    return kernels[0] if len(kernels) == 1 and len(leaves) <= 2 else None


def _make_head(head: PyTree, layer: str, x: np.ndarray) -> PyTree:
    """Returns the network's fresh classifier for the last layer, or zeros for another layer."""
    flat = pytree.flatten(head)
    if not (kernel := find_dense_kernel(flat)):
        raise UserError(
            "a linear classifier on features: expected one dense layer (no convolution) to be the"
            f" only trainable layer, got {', '.join(flat)}"
        )
    if layer == LAST_LAYER:
        return head
    flat = {path: jnp.zeros_like(leaf) for path, leaf in flat.items()}
    flat[kernel] = jnp.zeros((x.shape[-1], flat[kernel].shape[-1]), jnp.float32)
    return pytree.unflatten(flat)


def _get_kernel_and_bias(head: PyTree) -> tuple[Array, Array | float]:
    flat = pytree.flatten(head)
    kernel = next(leaf for path, leaf in flat.items() if path.endswith("/kernel"))
    return kernel, next((leaf for path, leaf in flat.items() if path.endswith("/bias")), 0.0)
