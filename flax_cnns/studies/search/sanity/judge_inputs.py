"""Says what the numbers of the check `inputs` mean."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from flax_cnns.studies.search.sanity.findings import FINE, LEFT_OUT, LOOK, WRONG, Numbers
from flax_cnns.studies.search.sanity.wording import format_numbers, format_percent


def judge_inputs(parts: Mapping[str, Numbers]) -> Iterator[tuple[str, ...]]:
    """Normalization, classes, order, duplicates, and whether labels say anything of images."""
    n = parts["inputs"]
    yield from _judge_normalization(n)
    yield from _judge_classes(n)
    if n["in_both"]:
        share = n["in_both"] / n["compared"][1]
        text = f"{n['in_both']} of {n['compared'][1]} validation images are training images too"
        remedy = "remove the copies; the validation accuracy is too high by them"
        yield (WRONG if share > 0.02 else LOOK), text, remedy
    elif n["compared"][1]:
        yield FINE, f"none of {n['compared'][1]} validation images is a training image too"
    if n["contradicting"]:
        share = n["contradicting"] / n["compared"][0]
        text = f"{n['contradicting']} training images have a copy with another label"
        yield (WRONG if share > 0.02 else LOOK), text, "correct the labels"
    if "train_neighbors" in n:
        yield from _judge_information(n, parts.get("capacity"))


def _judge_normalization(n: Numbers) -> Iterator[tuple[str, ...]]:
    if not n["finite"]:
        yield WRONG, "images have values that are not finite", "repair the images"
        return
    mean, std = n["mean"], n["std"]
    text = (
        f"over {n['images']} training images, the network sees mean {format_numbers(mean)} and"
        f" standard deviation {format_numbers(std)}"
    )
    offset, low, high = max(map(abs, mean)), min(std), max(std)
    if n["grafted"]:
        yield FINE, f"{text}; grafted weights want the normalization that they were trained with"
        return
    remedy = (
        "leave data.mean and data.std at (), so that they are those of the data"
        if n["normalized_by"] == "config"
        else "give mean and std of these data, as data.mean and data.std"
    )
    if high > 5:
        lowest, highest = n["pixel_range"]
        text += f" (pixels are from {lowest:g} to {highest:g}): the images are not scaled"
        yield (
            WRONG,
            text,
            remedy
            if n["normalized_by"] == "config"
            else f"divide the images by their range; {remedy}",
        )
    elif low < 0.2:
        remedy = f"{remedy}; or remove the constant channel"
        yield WRONG, f"{text}: the images are almost constant", remedy
    elif not n["normalize"]:
        level = FINE if offset < 0.1 and 0.9 < low <= high < 1.1 else LOOK
        yield level, f"{text}: not normalized", "" if level == FINE else "normalize the images"
    elif offset > 0.3 or low < 0.7 or high > 1.4:
        text += f": mean and std are of other data ({n['normalized_by']}); expected near 0 and 1"
        own = n["normalized_by"] in ("config", "data set")
        yield (WRONG if own else LOOK), text, remedy
    else:
        yield FINE, text


def _judge_classes(n: Numbers) -> Iterator[tuple[str, ...]]:
    counts = np.asarray(n["counts"])
    name = "labels" if n["task"] == "multilabel" else "classes"
    if (used := int((counts > 0).sum())) < 2 and n["task"] == "classes":
        text = f"all training images have one class, of {len(counts)}"
        yield WRONG, text, "check how the labels are read"
        return
    text = (
        f"{used} of {len(counts)} {name} occur in train, {counts.min():g} to {counts.max():g} times"
    )
    if used < len(counts):
        missing = np.flatnonzero(counts == 0)[:5].tolist()
        yield LOOK, f"{text}; class {missing[0]} has no image", "set data.classes, or add images"
    elif counts.max() > 10 * counts.min():
        remedy = "compare with the accuracy of always guessing the largest class"
        yield LOOK, f"{text}: unbalanced", remedy
    else:
        yield FINE, text
    if order := n["order"]:
        text = (
            f"a training batch of {order['batch_size']:g} has {order['classes']:.1f} classes;"
            f" {order['expected']:.1f} are expected of a random order"
        )
        if order["classes"] < 0.6 * order["expected"]:
            yield WRONG, f"{text}: the examples come in order of class", "shuffle the examples"
        else:
            yield FINE, text


def _judge_information(n: Numbers, capacity: Numbers | None) -> Iterator[tuple[str, ...]]:
    """Compares the nearest neighbor, and the short training if there is one, with chance."""
    if n["mock"]:
        yield LEFT_OUT, "data.mock: the images are noise, so their labels say nothing of them"
        return
    train, validation = n["train_neighbors"], n.get("validation_neighbors")
    told = validation or train
    split = "validation" if validation else "training"
    text = (
        f"the nearest training image tells the label of {format_percent(told['right'])} of"
        f" {told['images']} {split} images; shuffled labels would give"
        f" {format_percent(told['chance'])} (p = {told['p']:.3f})"
    )
    renumbered = n.get("renumbered", 0.0)
    if validation and train["p"] <= 0.01 and renumbered > max(0.25 + told["right"], 0.4):
        text += (
            f"; with the classes of validation renumbered, {format_percent(renumbered)}: its labels"
            " are in another order than those of train"
        )
        yield WRONG, text, "number the classes of all splits alike"
        return
    if told["p"] <= 0.01:
        yield FINE, text
        return
    if validation and train["p"] <= 0.01:
        text += f", while among training images it tells {format_percent(train['right'])}"
    learned = _find_learned(n, capacity)
    if learned is not None:
        text += f"; the short training reaches {format_percent(learned)} of {split} images"
    if learned is not None and learned > _find_chance_limit(told):
        yield LOOK, f"{text}: pixels say little, but the network finds more", ""
        return
    sure = learned is not None and told["images"] >= 50
    text += ": the labels say nothing of the images that either finds; are they shuffled?"
    remedy = "look at some images with their labels; check that both are read in one order"
    yield (WRONG if sure else LOOK), text, remedy


def _find_learned(n: Numbers, capacity: Numbers | None) -> float | None:
    """Returns the best validation accuracy of the short trainings, or None without them. None for
    multilabel data too, whose accuracy is not that of single labels."""
    if n["task"] == "multilabel":
        return None
    rows = [row for row in (capacity or {}).get("widths", []) if "validation" in row]
    return max((row["validation"]["accuracy"] for row in rows), default=None)


def _find_chance_limit(told: Numbers) -> float:
    """Returns the accuracy that guessing exceeds in one of a thousand cases (normal limit)."""
    chance = told["chance"]
    return chance + 3.1 * math.sqrt(max(chance * (1 - chance), 1e-9) / told["images"])
