"""The classes that `data.classes` chooses, by name or number."""

from __future__ import annotations

from typing import Any

import numpy as np

from flax_cnns.data.decode import read_labels
from flax_cnns.data.readers.arrays import ArraySource
from flax_cnns.data.types import ImageSource, RawDataset, Relabeled, Subset, take_rows
from flax_cnns.errors import UserError, did_you_mean


def select_classes(
    raw: RawDataset, config: Any, begun: bool, name: str = ""
) -> tuple[RawDataset, list[str]]:
    """The examples of `config.classes` alone, labeled in the order in which these are given; and
    notes. `name`: what messages call the data set; "": `config.name`."""
    name = name or config.name
    chosen, notes = find_class_indices(config, raw.class_names, begun, name)
    if not chosen:
        return raw, notes
    new = np.full(raw.num_classes, -1, np.int32)
    new[chosen] = np.arange(len(chosen))

    class_names = tuple(raw.class_names[i] for i in chosen)

    def choose(role: str, source: ImageSource) -> ImageSource:
        labels = new[read_labels(source)]
        rows, said = np.flatnonzero(labels >= 0), f"classes {chosen}"
        if not len(rows):
            raise UserError(
                f"data.classes: the {role} split of {name} has no image of {', '.join(class_names)}"
            )
        if isinstance(source, ArraySource):  # arrays stay arrays: nothing is decoded
            images = take_rows(source.images, rows)
            return ArraySource(images, labels[rows], f"{source.name}, {said}")
        return Relabeled(Subset(source, rows, said), labels[rows], said)

    raw = raw._replace(
        sources={role: choose(role, source) for role, source in raw.sources.items()},
        num_classes=len(chosen),
        class_names=class_names,
    )
    return raw, notes


def find_class_indices(
    config: Any, names: tuple[str, ...], begun: bool = False, name: str = ""
) -> tuple[list[int], list[str]]:
    """`config.classes` as numbers, and notes. Raises UserError for one that there is not, or there
    twice, and for a number that is another class's name, which is a note where a run is `begun`."""
    name = name or config.name
    chosen, notes = [], []
    for given in config.classes:
        if isinstance(given, int) and str(given) in names and names.index(str(given)) != given:
            counted = names[given : given + 1] if given >= 0 else ()
            said = (
                f"data.classes: {given} is ambiguous: {name} has a class named "
                f"{str(given)!r}, and number {given} is {repr(*counted) if counted else 'none'}"
            )
            if not begun or not counted:
                raise UserError(f"{said}; give names, in quotes: {str(given)!r}")
            notes.append(f"{said}; this run took the number")
        if given in names:
            chosen.append(names.index(given))
        elif isinstance(given, int) and 0 <= given < len(names):
            chosen.append(given)
        else:
            near = did_you_mean(given, names) if isinstance(given, str) else ""
            known = near or f"; it has 0 to {len(names) - 1}"
            raise UserError(f"data.classes: {name} has no class {given!r}{known}")
    if len(chosen) == 1 or len(set(chosen)) < len(chosen):
        raise UserError(
            f"data.classes: expected two classes or more, each once; got {tuple(config.classes)}"
        )
    return chosen, notes
