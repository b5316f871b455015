"""Writes reference/trained.npz: a small trained network, and 50 test images of Fashion-MNIST.

    apt-get install dataset-fashion-mnist
    python -m tests.analysis.explain.make_trained /usr/share/datasets/fashion-mnist
    python -m tests.analysis.explain.make_trained  # prints how similar maps stay, layer by layer
    python -m tests.analysis.explain.make_trained quality.png  # the table of `visualize quality`

The network is of the kind for which guided backpropagation is known to restore the image (Nie et
al. 2018, arXiv 1805.07039, section 4): several convolutions with ReLU, and max pooling.
"""

from __future__ import annotations

import gzip
import sys
from collections.abc import Collection
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from flax_cnns import layers
from flax_cnns.analysis.explain import backward_rules, gradients, quality
from flax_cnns.analysis.explain.targets import make_target
from flax_cnns.analysis.statistics import Interval, mean, paired_difference
from flax_cnns.names import make_console
from flax_cnns.runs.subject import Subject
from flax_cnns.runs.visualize.quality import draw_quality, make_rich_table
from tests.analysis.explain.make_reference import FOLDER

PATH = FOLDER / "trained.npz"
EPOCHS, BATCH = 3, 128


class PooledCNN(nn.Module):
    """Six convolutions with ReLU, two max poolings, and a dense layer on the means: images f32
    [N 28 28 1] in 0..1 -> logits f32 [N num_classes]."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, images, *, train=False):
        x = images
        for i, width in enumerate((12, 12, 24, 24, 32, 32), 1):
            x = nn.relu(nn.Conv(width, (3, 3), name=f"conv{i}")(x))
            if i in (2, 4):
                x = layers.max_pool(x, 2, 2)
        return nn.Dense(self.num_classes, name="head")(x.mean((1, 2)))


def read(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns images u8 [N 28 28 1] and labels [N]: IDX files have headers of 16 and 8 bytes."""
    bytes_of = lambda name, skip: np.frombuffer(  # noqa: E731
        gzip.decompress((folder / f"{part}-{name}-ubyte.gz").read_bytes()), np.uint8, offset=skip
    )
    return bytes_of("images-idx3", 16).reshape(-1, 28, 28, 1), bytes_of("labels-idx1", 8)


def load() -> tuple[PooledCNN, dict, jax.Array]:
    """Returns (network, variables, images [50 28 28 1] in 0..1)."""
    with np.load(PATH) as kept:
        arrays = dict(kept)
    images = jnp.asarray(arrays.pop("images"), jnp.float32) / 255
    params: dict = {}
    for name, array in arrays.items():
        layer, _, leaf = name.partition("/")
        params.setdefault(layer, {})[leaf] = jnp.asarray(array, jnp.float32)
    return PooledCNN(), {"params": params}, images


def measure_similarity(layers: Collection[str] = ()) -> dict[str, dict[str, Interval]]:
    """Returns {last random layer: means over the images of Spearman's correlation of absolute maps
    before and after the randomization, and the paired difference}; bootstrap intervals."""
    model, variables, images = load()
    goal = make_target(None, model, variables, images)
    methods = {"gradient": gradients.gradient, "guided": backward_rules.guided_backprop}

    def explain(name: str, variables: dict) -> jax.Array:
        return methods[name](model, variables, images, goal)[..., 0]

    trained = {name: explain(name, variables) for name in methods}
    table = {}
    for layer, changed in quality.randomize(model, variables, images, jax.random.key(0)):
        if layers and layer not in layers:
            continue
        found = {
            name: quality.rank_correlation(trained[name], explain(name, changed))
            for name in methods
        }
        table[layer] = {name: mean(list(x), method="bootstrap") for name, x in found.items()}
        pairs = (dict(enumerate(found[name].tolist())) for name in ("guided", "gradient"))
        table[layer]["difference"] = paired_difference(*pairs, method="bootstrap").interval
    return table


def draw_table(png: str) -> None:
    model, variables, images = load()
    names = [str(i) for i in range(10)]
    given = (np.asarray(images), [""] * len(images), lambda pixels: pixels, names)
    title = "a CNN with max pooling on Fashion-MNIST"
    subject = Subject(title, model, variables, *given)
    methods = ("gradient", "integrated_gradients", "guided_backprop", "deconvnet", "cam")
    table = draw_quality(subject, png, methods=(*methods, "grad_cam", "layer_cam"))
    make_console(width=200).print(make_rich_table(table))


def main(folder: str) -> None:
    model = PooledCNN()
    images, labels = read(Path(folder), "train")
    test_images, test_labels = read(Path(folder), "t10k")
    params = model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]
    steps = EPOCHS * (len(images) // BATCH)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

    @jax.jit
    def step(params, state, x, y):
        def loss(params):
            logits = model.apply({"params": params}, x / 255.0)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    state, generator = optimizer.init(params), np.random.default_rng(0)
    for epoch in range(EPOCHS):
        order = generator.permutation(len(images))
        for i in range(len(images) // BATCH):
            chosen = order[i * BATCH : (i + 1) * BATCH]
            x, y = images[chosen].astype(np.float32), labels[chosen].astype(np.int32)
            params, state, value = step(params, state, x, y)
        print(f"epoch {epoch + 1}: loss {value:.3f}", flush=True)
    params = jax.tree.map(lambda a: np.asarray(a, np.float16), params)
    predict = jax.jit(lambda x: model.apply({"params": params}, x / 255.0).argmax(-1))
    predicted = np.concatenate([predict(x) for x in np.split(np.float32(test_images), 10)])
    print(f"test accuracy {(predicted == test_labels).mean():.4f}")
    arrays = {f"{layer}/{leaf}": a for layer, of in params.items() for leaf, a in of.items()}
    np.savez_compressed(PATH, images=test_images[:50], **arrays)
    print(f"{PATH.name}: {PATH.stat().st_size:,} bytes")


if __name__ == "__main__":
    if sys.argv[1:] and Path(sys.argv[1]).is_dir():
        main(sys.argv[1])
    elif sys.argv[1:]:
        draw_table(sys.argv[1])
    else:
        for layer, row in measure_similarity().items():
            cells = (f"{k} {v.mean:.3f} [{v.low:.3f}, {v.high:.3f}]" for k, v in row.items())
            print(f"{layer}: {', '.join(cells)}")
