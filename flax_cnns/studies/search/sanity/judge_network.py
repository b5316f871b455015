"""Says what the numbers of the checks `loss` and `layers` mean.

Whatever a design may intend, such as a layer that starts with zeros, is wrong only if the network
cannot learn a few images by heart either.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from flax_cnns.studies.search.sanity.findings import FINE, LOOK, WRONG, Numbers
from flax_cnns.studies.search.sanity.trainings import FEW
from flax_cnns.studies.search.sanity.wording import format_percent

# ---------------------------------------------------------------------------- initial loss


def judge_loss(parts: Mapping[str, Numbers]) -> Iterator[tuple[str, ...]]:
    """The initial loss against that of guessing, and the size of each penalty."""
    n = parts["loss"]
    loss, guessing, spread = n["loss"], n["guessing"], n["spread"]
    name = "the loss of logits 0"
    if not n["own_loss"]:
        k = n["logits"]
        name = f"{k} ln 2" if n["task"] == "multilabel" else f"ln {k}"
    text = f"the initial loss is {loss:.4g}; {name} is {guessing:.4g}"
    spread_text = f"; the logits of an image spread by {spread:.3g}"
    if not math.isfinite(loss):
        remedy = "check the images and the initialization"
        yield WRONG, f"the initial loss is {loss:g}", remedy
    elif n["grafted"]:
        yield FINE, f"{text}, but the network starts from grafted weights"
    elif loss > 2 * guessing + 0.5:
        text += (
            f"{spread_text}: the network is sure of wrong answers before it has learned anything"
        )
        level = LOOK if n["own_loss"] else WRONG  # another loss may be low at other logits than 0
        yield level, text, "make the initial weights smaller, first those of the head"
    elif loss > 1.35 * guessing:
        yield LOOK, text + spread_text, "a head that starts with smaller weights starts at guessing"
    elif loss < 0.8 * guessing and not n["own_loss"]:
        text += ": the network knows something before it has learned anything"
        yield WRONG, text, "check that the labels are not part of the images"
    else:
        yield FINE, text
    total = loss
    for title, value, counts in n["terms"]:
        total += value if counts else 0.0
        sentence = f"with {title}: {value:+.4g}"
        sentence += f", {total:.4g} together" if counts else ""
        if counts and value > 3 * guessing:
            yield LOOK, f"{sentence}: larger than the loss of the data", "make it smaller"
        elif value < -0.01 and "smoothing" not in title:
            yield LOOK, f"{sentence}: a penalty should not be negative", "check its sign"
        else:
            yield FINE, sentence
    text = "with the run's own augmentation, mixing and dropout the first batch has {:.4g}"
    yield FINE, text.format(n["training_loss"])


# ---------------------------------------------------------------------------- layers


def judge_layers(parts: Mapping[str, Numbers]) -> Iterator[tuple[str, ...]]:
    """Activations, gradients, the size of an update, BatchNorm."""
    n, overfit = parts["layers"], parts.get("overfit")
    yield from _judge_batchnorm(n)
    if "error" in n:
        remedy = "make the initial weights smaller, or normalize the images"
        yield WRONG, f"at initialization, {n['error']}", remedy
        return
    layers = n["layers"]
    failed = overfit is not None and not overfit["attempts"][-1]["steps"]
    moved = overfit["moved"] if overfit else {}
    still = [x["path"] for x in layers if moved.get(x["path"].partition("[")[0], 1.0) in (0.0,)]
    if still:
        text = (
            f"{len(still)} of {len(moved)} layers with kernels have no gradient, and did not move"
            f" while {FEW} images were to be learned: {_name(still)}"
        )
        yield WRONG if failed else LOOK, text, "initialize their weights with random numbers"
    yield from _judge_scales(layers, failed)
    dead = [x for x in layers if x["dead"] is not None]
    if dead:
        worst = max(dead, key=lambda x: x["dead"])
        share = format_percent(worst["dead"])
        text = f"at most {share} of a layer's channels are dead ({worst['path']})"
        remedy = "use smaller biases, larger weights, or a norm before the ReLU"
        if worst["dead"] >= 0.9:
            yield (WRONG if failed else LOOK), text, remedy
        else:
            yield (LOOK, text, remedy) if worst["dead"] >= 0.5 else (FINE, text)
    yield from _judge_gradients(layers)


def _name(paths: Any) -> str:
    paths = list(paths)
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def _judge_batchnorm(n: Numbers) -> Iterator[tuple[str, ...]]:
    remedy = "let BatchNorm train (optimizer.bn=()), or start from weights that have statistics"
    if n["frozen"]:
        text = (
            f"{n['frozen']} of {n['norms']} BatchNorm layers are frozen with the mean 0 and the"
            " variance 1 of a new network, so they do not normalize"
        )
        yield WRONG, text, remedy
    elif n["norms"] and n["unmoved"] > n["norms"] / 2:
        text = (
            f"a training step left the statistics of {n['unmoved']} of {n['norms']} BatchNorm"
            " layers at mean 0 and variance 1, which evaluation would use"
        )
        yield WRONG, text, "call BatchNorm with use_running_average=not train"
    elif n["norms"]:
        yield (
            FINE,
            f"a step moves the statistics of {n['norms'] - n['unmoved']} of {n['norms']} norms",
        )


def _judge_scales(layers: list[dict], failed: bool) -> Iterator[tuple[str, ...]]:
    stds = [x["std"] for x in layers]
    high = max(layers, key=lambda x: x["std"])
    usual = float(np.median(stds))
    text = (
        f"the outputs of the layers have standard deviations from {min(stds):.3g} to"
        f" {max(stds):.3g}, usually {usual:.3g}"
    )
    if usual < 1e-2:
        remedy = "initialize with he (model.init=he), or lsuv"
        yield (WRONG if failed else LOOK), f"{text}: they vanish", remedy
    elif high["std"] > 1e3:
        remedy = "initialize with he (model.init=he) or lsuv, or use norms"
        yield (WRONG if failed else LOOK), f"{text}: they explode, first in {high['path']}", remedy
    else:
        yield FINE, text


def _judge_gradients(layers: list[dict]) -> Iterator[tuple[str, ...]]:
    norms = [x for x in layers if x["gradient"]]
    if norms:
        low, high = (f(norms, key=lambda x: x["gradient"]) for f in (min, max))
        text = (
            f"gradient norms by layer are from {low['gradient']:.3g} ({low['path']}) to"
            f" {high['gradient']:.3g} ({high['path']})"
        )
        wide = high["gradient"] > 1e5 * low["gradient"]
        yield (
            (LOOK, f"{text}: very unequal", "use norms, shortcuts, or another initializer")
            if (wide)
            else (FINE, text)
        )
    ratios = [x["update"] for x in layers if x["update"]]
    if not ratios:
        return
    usual = float(np.median(ratios))
    text = f"the first step at the full rate changes kernels by {usual:.2g} of their norm (median)"
    if usual > 1:
        yield LOOK, f"{text}; 0.001 to 0.01 is usual", "lower schedule.learning_rate, or warm up"
    elif usual < 1e-6:
        yield LOOK, f"{text}; 0.001 to 0.01 is usual", "raise schedule.learning_rate"
    else:
        yield FINE, text
