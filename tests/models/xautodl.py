"""The authors' network of NAS-Bench-201 (PyPI's xautodl 1.0.0) with random tensors, recorded.

pip install torch && pip install --no-deps xautodl==1.0.0
python -m tests.models.xautodl      # writes reference/nas_bench_201.npz
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from flax_cnns import tree as pytree
from tests.models import cases, foreign
from tests.models.straight.nas_bench_201 import CELL

FIELDS = dict(cell=CELL, depths=(2, 1, 1), widths=(4, 8, 16))
WITHIN = {"op.1.weight": "conv/kernel"}  # names inside a unit, theirs and ours
WITHIN |= {"op.2.weight": "norm/scale", "op.2.bias": "norm/bias"}
WITHIN |= {"op.2.running_mean": "norm/mean", "op.2.running_var": "norm/var"}
EDGES = ("edge0_1", "edge0_2", "edge1_2", "edge0_3", "edge1_3", "edge2_3")
# The release has as many cells in each stage, so the recorded network is put together from parts.
PLACES = ("stage1/cell1", "stage1/cell2", "stage2/reduction", "stage2/cell1")
PLACES += ("stage3/reduction", "stage3/cell1")


def build() -> Any:
    """Builds the release's network with two cells in the first stage and one in the others."""
    from xautodl.models.cell_infers import TinyNetwork
    from xautodl.models.cell_infers.cells import InferCell
    from xautodl.models.cell_searchs.genotypes import Structure

    class Network(TinyNetwork):
        def forward(self, images: Any) -> Any:
            return super().forward(images)[1]

    cell = Structure.str2structure(CELL)
    network = Network(4, 1, cell, 10)
    network.cells.insert(1, InferCell(cell, 4, 4, 1))
    return network


def rename(name: str) -> str | None:
    """Returns our path of a tensor of theirs; None for counters."""
    if name.endswith("num_batches_tracked"):
        return None
    name = name.replace("stem.0.weight", "stem.op.1.weight").replace("stem.1.", "stem.op.2.")
    name = name.replace("lastact.0.", "op.2.")
    name = name.replace("classifier.weight", "head/kernel").replace("classifier.bias", "head/bias")
    name = re.sub(r"cells\.(\d+)", lambda m: PLACES[int(m[1])], name)
    name = re.sub(r"layers\.(\d+)", lambda m: EDGES[int(m[1])], name)
    name = name.replace("conv_a", "conv1").replace("conv_b", "conv2")
    name = name.replace("downsample.1.weight", "projection/kernel")
    for theirs, ours in WITHIN.items():
        name = name.replace(theirs, ours)
    path = name.replace(".", "/").removeprefix("norm/" if name.count("norm/") > 1 else "-")
    kind = "batch_stats" if path.endswith(("/mean", "/var")) else "params"
    return f"{kind}/{path}"


def convert(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns our variables with their tensors."""
    flat = {}
    for name, value in tensors.items():
        if path := rename(name):
            axes = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[value.ndim]
            flat[path] = np.ascontiguousarray(value.transpose(axes))
    return pytree.unflatten(flat)


def run_theirs() -> tuple[dict[str, np.ndarray], cases.Outputs]:
    """Returns their tensors, and their logits, loss and gradients on four images of 16 pixels."""
    live = foreign.load(build(), "torchvision", 1.0)
    x, labels = foreign.images(4, 16), np.array([1, 0, 3, 2])
    logits = foreign.logits(live, x, "torchvision")
    step = foreign.train_step(live, x, labels, 0.0)
    leaves = cases.measure(convert(step["tensors"]))
    return live.tensors, cases.Outputs(logits, step["loss"], leaves)


if __name__ == "__main__":
    cases.save(cases.FOLDER / "nas_bench_201.npz", *run_theirs())
