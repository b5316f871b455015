"""The recorded comparisons with other libraries, one per family. They run without the library.

    python -m tests.models.make_reference [FAMILY ...]     # needs torchvision, timm or Keras

writes `reference/FAMILY.npz`. The file holds the names and shapes of the other network's tensors
(a rule gives their values), its logits, and for a training step the loss and two numbers for each
of our leaves: the norm of its gradient (or new statistic), and the product with a random direction.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

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
    """What both networks compute. Leaves are in the order of our sorted paths."""

    logits: np.ndarray  # [N K], in evaluation
    loss: float | None = None  # of a training step without dropout
    leaves: np.ndarray | None = None  # [leaves 2]: norm and product of gradient or statistic


def measure(tree: dict[str, dict]) -> np.ndarray:
    rows = []
    for path, leaf in sorted(pytree.flatten(tree).items()):
        random = np.random.RandomState(zlib.crc32(path.encode()))
        leaf = np.asarray(leaf, np.float64)
        rows.append((np.linalg.norm(leaf), np.vdot(leaf, random.standard_normal(leaf.shape))))
    return np.array(rows)


def _batch(case: Case) -> tuple[np.ndarray, np.ndarray]:
    channels = create_model(case.name).input_size[-1]
    return foreign.images(4, case.size, channels), np.array([1, 0, 3, 2])


def run_theirs(case: Case) -> tuple[dict[str, np.ndarray], Outputs]:
    """Returns the other network's tensors and what it computes with them."""
    model = foreign.build(case.name, case.source) if case.build is None else case.build()
    live = foreign.load(model, case.source, foreign.gain(case.name))
    x, labels = _batch(case)
    logits = foreign.logits(live, x, case.source)
    if not case.train:
        return live.tensors, Outputs(logits)
    step = foreign.train_step(live, x, labels, AUX_WEIGHT)
    tree = convert(case.name, step["tensors"], case.source, **case.fields)
    return live.tensors, Outputs(logits, step["loss"], measure(tree))


def run_ours(case: Case, tensors: Mapping[str, np.ndarray]) -> tuple[Outputs, Callable]:
    """Returns what our network computes, and the function variables -> logits [N K]."""
    variables, (x, labels) = convert(case.name, tensors, case.source, **case.fields), _batch(case)
    classes = variables["params"]["head"]["kernel"].shape[-1]
    model = create_model(case.name, **case.fields, num_classes=classes)
    return run_model(model, variables, x, labels, train=case.train)


def run_model(
    model: Any, variables: Any, x: np.ndarray, labels: np.ndarray, *, train: bool = True
) -> tuple[Outputs, Callable]:
    """Returns what `model` computes with `variables`, and the function variables -> logits."""
    # Compiling takes nearly all of the time.
    options = {"xla_backend_optimization_level": 0}
    apply = jax.jit(lambda v: model.apply(v, x), compiler_options=options)
    logits = np.asarray(apply(variables))
    if not train:
        return Outputs(logits), apply
    without_dropout = model.clone(
        **{f: 0.0 for f in ("dropout", "aux_dropout") if hasattr(model, f)}
    )

    def loss_fn(params):
        out, state = without_dropout.apply(
            {"params": params, "batch_stats": variables["batch_stats"]},
            x,
            train=True,
            mutable=["batch_stats", "aux_logits"],
        )
        heads = [(1.0, out), *((AUX_WEIGHT, v) for v in jax.tree.leaves(state.get("aux_logits")))]
        loss = 0.0
        for weight, head_logits in heads:
            picked = jnp.take_along_axis(jax.nn.log_softmax(head_logits), labels[:, None], 1)
            loss -= weight * jnp.mean(picked)
        return loss, state["batch_stats"]

    step = jax.jit(jax.value_and_grad(loss_fn, has_aux=True), compiler_options=options)
    (loss, stats), grads = step(variables["params"])
    tree = {"params": grads, "batch_stats": stats}
    return Outputs(logits, float(loss), measure(tree)), apply


def check_outputs(got: Outputs, wanted: Outputs) -> None:
    """Raises AssertionError unless both come from the same network."""
    spread = np.sqrt(np.mean(np.var(wanted.logits, axis=0)))
    assert spread > 1e-3 * np.sqrt(np.mean(wanted.logits**2)), "a constant output proves nothing"
    assert np.abs(got.logits - wanted.logits).max() <= 1e-4 * spread
    if wanted.loss is None:
        return
    np.testing.assert_allclose(got.loss, wanted.loss, rtol=1e-4)
    norms = wanted.leaves[:, 0]
    assert (norms > 0).all(), "a leaf without a gradient proves nothing"
    # The second term allows for small gradients that are sums of large numbers.
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
