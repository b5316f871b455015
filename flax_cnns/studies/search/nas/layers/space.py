"""The space of Zoph & Le 2016, section 4.1: filter heights, widths and numbers, and skips.

A network of the space is `flax_cnns.models.nas.NAS` with a table. Without skips, each layer takes
the layer before it. With skips, it takes the layers that its anchor chose; if there are none, it
takes the images (section 3.3). Strides, as in the second search of section 4.1, are an option.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from flax_cnns.errors import UserError
from flax_cnns.models.nas import Layer
from flax_cnns.studies.search.nas.controller import Anchor, Categorical

HEIGHTS = WIDTHS = (1, 3, 5, 7)
FILTERS = (24, 36, 48, 64)
STRIDES = (1, 2, 3)
MODEL = "nas_v1"  # the registered network that takes a table


class LayersSpace(NamedTuple):
    """All networks of `layers` layers."""

    layers: int
    has_skips: bool = True
    has_strides: bool = False

    @property
    def decisions(self) -> tuple[Categorical | Anchor, ...]:
        """What the controller decides, layer by layer."""
        strides = [Categorical(f"stride_{side}", len(STRIDES)) for side in ("height", "width")]
        layer: list[Categorical | Anchor] = [
            Categorical("height", len(HEIGHTS)),
            Categorical("width", len(WIDTHS)),
            *(strides if self.has_strides else []),
            Categorical("filters", len(FILTERS)),
            *([Anchor()] if self.has_skips else []),
        ]
        return tuple(layer * self.layers)

    def count_networks(self) -> int:
        """Returns the number of different decisions."""
        layer = len(HEIGHTS) * len(WIDTHS) * len(FILTERS)
        layer *= len(STRIDES) ** 2 if self.has_strides else 1
        skips = self.layers * (self.layers - 1) // 2 if self.has_skips else 0
        return layer**self.layers * 2**skips

    def split_by_layer(self, decisions: Sequence[int]) -> list[tuple[int, ...]]:
        """Splits flat decisions into those of each layer. Raises UserError for a wrong number."""
        own = 5 if self.has_strides else 3
        sizes = [own + (i if self.has_skips else 0) for i in range(self.layers)]
        if len(decisions) != sum(sizes):
            raise UserError(f"expected {sum(sizes)} decisions, got {len(decisions)}")
        ends = list(itertools.accumulate(sizes))
        return [tuple(decisions[end - size : end]) for size, end in zip(sizes, ends)]

    def make_fields(self, decisions: Sequence[int]) -> dict[str, Any]:
        """Returns the fields `table` and, with strides, `strides` of `models.nas.NAS`."""
        table, strides = [], []
        for i, chosen in enumerate(self.split_by_layer(decisions)):
            height, width, *rest = chosen
            if self.has_strides:
                strides.append((STRIDES[rest[0]], STRIDES[rest[1]]))
                rest = rest[2:]
            filters, *bits = rest
            # Layer i + 1 takes layer j + 1 if bit j is set.
            sources = tuple(j + 1 for j, bit in enumerate(bits) if bit) if self.has_skips else (i,)
            table.append(Layer((HEIGHTS[height], WIDTHS[width]), FILTERS[filters], sources or (0,)))
        fields: dict[str, Any] = {"table": tuple(table)}
        return fields | ({"strides": tuple(strides)} if self.has_strides else {})

    def name(self, decisions: Sequence[int]) -> str:
        """Returns the decisions as digits, layer by layer: "312-0201-22311"."""
        return "-".join("".join(map(str, layer)) for layer in self.split_by_layer(decisions))

    def draw_uniformly(self, seed: int, number: int) -> tuple[int, ...]:
        """Returns random decisions, each option equally likely, of the trial with this number.

        The trials' networks are independent of each other.
        """
        rng, anchors = np.random.default_rng([seed, number]), itertools.count()
        drawn: list[int] = []
        for decision in self.decisions:
            if isinstance(decision, Categorical):
                drawn.append(int(rng.integers(decision.size)))
            else:
                drawn += rng.integers(2, size=next(anchors)).tolist()
        return tuple(drawn)
