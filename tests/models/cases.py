"""The comparisons that are recorded, one a family: small, always run, and without the library.

    python -m tests.models.make_reference [FAMILY ...]     # needs torchvision, timm or Keras

writes `reference/FAMILY.npz`: the other network's names and shapes of tensors (their values follow
by rule), its logits, and of a training step the loss and for each of our leaves the gradient's (or
the new statistic's) norm and its product with a random direction.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_cnns import create_model
from flax_cnns import tree as pytree
from flax_cnns.weights import convert
from tests.models import foreign
from tests.models.foreign import Case

FOLDER = Path(__file__).parent / "reference"
AUX_WEIGHT = 0.3


class Outputs(NamedTuple):
    """What both sides compute. Leaves are in the order of our sorted paths."""

    logits: np.ndarray  # [N K], in evaluation
    loss: float | None = None  # of a training step without dropout
    leaves: np.ndarray | None = None  # [leaves 2]: of gradient or statistic (norm, product)


def _measures(tree: dict[str, dict]) -> np.ndarray:
    rows = []
    for path, leaf in sorted(pytree.flatten(tree).items()):
        random = np.random.RandomState(zlib.crc32(path.encode()))
        leaf = np.asarray(leaf, np.float64)
        rows.append((np.linalg.norm(leaf), np.vdot(leaf, random.standard_normal(leaf.shape))))
    return np.array(rows)


def _batch(case: Case) -> tuple[np.ndarray, np.ndarray]:
    channels = create_model(case.name).input_size[-1]
    return foreign.images(4, case.size, channels), np.array([1, 0, 3, 2])


def theirs(case: Case) -> tuple[dict[str, np.ndarray], Outputs]:
    """The tensors and what the live network makes of them."""
    model = foreign.build(case.name, case.source) if case.build is None else case.build()
    live = foreign.load(model, case.source, foreign.gain(case.name))
    x, labels = _batch(case)
    logits = foreign.logits(live, x, case.source)
    if not case.train:
        return live.tensors, Outputs(logits)
    step = foreign.train_step(live, x, labels, AUX_WEIGHT)
    tree = convert(case.name, step["tensors"], case.source, **case.fields)
    return live.tensors, Outputs(logits, step["loss"], _measures(tree))


def ours(case: Case, tensors: Mapping[str, np.ndarray]) -> tuple[Outputs, Callable]:
    """What we compute, and the function that gave the logits: variables -> [N K]."""
    variables, (x, labels) = convert(case.name, tensors, case.source, **case.fields), _batch(case)
    classes = variables["params"]["head"]["kernel"].shape[-1]
    model = create_model(case.name, **case.fields, num_classes=classes)
    # Nearly all of the time is the compiler's.
    options = {"xla_backend_optimization_level": 0}
    apply = jax.jit(lambda v: model.apply(v, x), compiler_options=options)
    logits = np.asarray(apply(variables))
    if not case.train:
        return Outputs(logits), apply
    still = model.clone(**{f: 0.0 for f in ("dropout", "aux_dropout") if hasattr(model, f)})

    def loss_fn(params):
        out, state = still.apply(
            {"params": params, "batch_stats": variables["batch_stats"]},
            x,
            train=True,
            mutable=["batch_stats", "aux_logits"],
        )
        heads = [(1.0, out), *((AUX_WEIGHT, v) for v in jax.tree.leaves(state.get("aux_logits")))]
        loss = 0.0
        for weight, each in heads:
            picked = jnp.take_along_axis(jax.nn.log_softmax(each), labels[:, None], 1)
            loss -= weight * jnp.mean(picked)
        return loss, state["batch_stats"]

    step = jax.jit(jax.value_and_grad(loss_fn, has_aux=True), compiler_options=options)
    (loss, stats), grads = step(variables["params"])
    tree = {"params": grads, "batch_stats": stats}
    return Outputs(logits, float(loss), _measures(tree)), apply


def check(got: Outputs, wanted: Outputs) -> None:
    """Raises AssertionError unless both are the same network's."""
    spread = np.sqrt(np.mean(np.var(wanted.logits, axis=0)))
    assert spread > 1e-3 * np.sqrt(np.mean(wanted.logits**2)), "a constant output proves nothing"
    assert np.abs(got.logits - wanted.logits).max() <= 1e-4 * spread
    if wanted.loss is None:
        return
    np.testing.assert_allclose(got.loss, wanted.loss, rtol=1e-4)
    norms = wanted.leaves[:, 0]
    assert (norms > 0).all(), "a leaf without a gradient proves nothing"
    # Small gradients of large sums: a difference counts against the larger of both.
    error = np.abs(got.leaves - wanted.leaves).max(1)
    assert (error <= 2e-3 * norms + 1e-6 * np.linalg.norm(norms)).all()


def save(path: Path, tensors: Mapping[str, np.ndarray], outputs: Outputs) -> None:
    shapes = {name: array.shape for name, array in tensors.items()}
    step = {} if outputs.loss is None else dict(loss=outputs.loss, leaves=outputs.leaves)
    np.savez_compressed(path, shapes=json.dumps(shapes), logits=outputs.logits, **step)


def load(path: Path, source: str, gain: float = 2.0) -> tuple[dict[str, np.ndarray], Outputs]:
    with np.load(path) as kept:
        shapes = json.loads(str(kept["shapes"]))
        step = (float(kept["loss"]), kept["leaves"]) if "loss" in kept else ()
        outputs = Outputs(kept["logits"], *step)
    return {
        n: foreign.redraw(n, tuple(shape), source, gain) for n, shape in shapes.items()
    }, outputs
