"""The loss on planes and lines through parameters, saved row by row, so that it can be resumed.

loss = Loss(model, [(images, labels)])
directions = tuple(random_direction(variables["params"], jax.random.key(i)) for i in (0, 1))
levels = evaluate_plane(loss, variables, directions, xs, ys, folder="runs/plane")
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flax_cnns import files
from flax_cnns import tree as pytree
from flax_cnns.analysis.landscape.objective import Levels, Loss, Variables
from flax_cnns.errors import UserError
from flax_cnns.types import PyTree

ABOUT = "plane.json"


def evaluate_plane(
    loss: Loss,
    variables: Variables,
    directions: tuple[PyTree, PyTree],
    xs: Sequence[float] | np.ndarray,
    ys: Sequence[float] | np.ndarray,
    *,
    folder: str | os.PathLike | None = None,
    about: Mapping[str, Any] = {},
    say: Callable[[str], None] = print,
) -> Levels:
    """Returns losses and accuracies f32 [len(ys) len(xs)] at params + x * directions[0] + y *
    directions[1].

    If `folder` is given, each row is saved there, and a repeated call computes only the missing
    rows. `about`: facts for JSON, which must be equal in a repeated call. Raises `UserError` if the
    folder holds rows of another plane, network, loss or other images, and KeyboardInterrupt, with a
    message, after Ctrl-C.
    """
    wanted = {
        "xs": [float(x) for x in xs],
        "ys": [float(y) for y in ys],
        "directions": _compute_checksum(directions),
        **_describe(loss, variables),
        **about,
    }
    place = None if folder is None else _open_folder(folder, wanted)
    points = jnp.asarray(xs, jnp.float32)
    rows = _compute_rows(
        len(ys), lambda i: loss.measure_row(variables, directions, points, float(ys[i])), place, say
    )
    return Levels(rows[:, 0], rows[:, 1])


def evaluate_line(
    loss: Loss,
    start: Variables,
    end: Variables,
    alphas: Sequence[float] | np.ndarray,
    *,
    reestimate: Callable[[Variables], Variables] | None = None,
    folder: str | os.PathLike | None = None,
    about: Mapping[str, Any] = {},
    say: Callable[[str], None] = lambda line: None,
) -> Levels:
    """Returns losses and accuracies f32 [len(alphas)] at (1 - alpha) * start + alpha * end.

    All variables are interpolated, the running statistics of BatchNorm too. Interpolated variances
    beyond the two ends are at least 0. `reestimate`, if given, replaces the statistics at each
    point: it returns the variables with other statistics. `folder`, `about` and `say` are as in
    `evaluate_plane`. Raises `UserError` if the two ends have other parameters.
    """
    first, second = pytree.flatten(start), pytree.flatten(end)
    shapes = [{path: leaf.shape for path, leaf in each.items()} for each in (first, second)]
    if shapes[0] != shapes[1]:
        differing = sorted(path for path, _ in shapes[0].items() ^ shapes[1].items())
        raise UserError(
            f"the two ends differ in the shape of {differing[0]!r}: they are not of one network"
        )
    wanted = {
        "alphas": [float(a) for a in alphas],
        "end": _compute_checksum(end),
        "reestimated": reestimate is not None,
        **_describe(loss, start),
        **about,
    }
    place = None if folder is None else _open_folder(folder, wanted)

    def measure(number: int) -> np.ndarray:
        between = _interpolate(start, end, alphas[number])
        return np.stack(loss.measure(reestimate(between) if reestimate else between))

    points = _compute_rows(len(alphas), measure, place, say, unit="point")
    return Levels(points[:, 0], points[:, 1])


def _interpolate(start: Variables, end: Variables, alpha: float) -> Variables:
    mixed = {
        path: (1 - alpha) * leaf + alpha * other
        for (path, leaf), other in zip(pytree.flatten(start).items(), jax.tree.leaves(end))
    }
    for path in mixed:
        if path.startswith("batch_stats/") and path.endswith("/var"):
            mixed[path] = jnp.maximum(mixed[path], 0)
    return pytree.unflatten(mixed)


def _compute_rows(
    count: int,
    compute: Callable[[int], np.ndarray],
    place: Path | None,
    say: Callable[[str], None],
    unit: str = "row",
) -> np.ndarray:
    """Returns f32 [count 2 ...]; rows whose file exists are read, and the others are saved."""
    rows: list[np.ndarray] = []
    times: list[float] = []
    paths = [None if place is None else place / f"{unit}{i}.npy" for i in range(count)]
    missing = sum(path is None or not path.is_file() for path in paths)
    if missing < count:
        say(f"{place}: {count - missing} of {count} {unit}s are saved already")
    for number, path in enumerate(paths):
        if path is not None and path.is_file():
            rows.append(_read_row(path))
            continue
        began = time.monotonic()
        try:
            row = compute(number)
        except KeyboardInterrupt:
            if place is None:
                raise
            saved = count - missing + len(times)
            raise KeyboardInterrupt(
                f"interrupted; {saved} of {count} {unit}s are saved in {place}; run the same"
                " command again to compute the others"
            ) from None
        if path is not None:
            with files.replace_atomically(path) as temporary, open(temporary, "wb") as file:
                np.save(file, row)
        rows.append(row)
        times.append(time.monotonic() - began)
        # The first row also waits for the compiler.
        usual = np.mean(times[1:] or times)
        left = usual * (missing - len(times))
        say(
            f"{unit} {number + 1}/{count}: loss {row[0].min():.4g}"
            + (f" to {row[0].max():.4g}" if row[0].ndim else "")
            + f"  ETA {int(left) // 3600}:{int(left) // 60 % 60:02}:{int(left) % 60:02}"
        )
    return np.stack(rows)


def _read_row(path: Path) -> np.ndarray:
    try:
        return np.load(path)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); remove this file") from None


# ---- what identifies the rows


def describe_network(model: nn.Module) -> dict[str, Any]:
    """Returns {"class": "module:Name", field: value} of a network, equal in every process.

    Values are numbers, strings, lists and dicts. A function is described by its name.
    """
    return _describe_value(model)


def _describe_value(value: Any) -> Any:
    if isinstance(value, nn.Module):
        fields = [f.name for f in dataclasses.fields(value) if f.name not in ("parent", "name")]
        described = {name: _describe_value(getattr(value, name, None)) for name in fields}
        return {"class": _name_object(type(value)), **described}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.dtype):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _describe_value(each) for key, each in value.items()}
    if isinstance(value, Sequence):
        return [_describe_value(each) for each in value]
    if isinstance(value, functools.partial):
        described = {key: _describe_value(each) for key, each in value.keywords.items()}
        return [_describe_value(value.func), _describe_value(value.args), described]
    if callable(value):
        return _name_object(value)
    return _name_object(type(value))


def _name_object(value: Any) -> str:
    name = getattr(value, "__qualname__", None) or type(value).__qualname__
    return f"{getattr(value, '__module__', '')}:{name}"


def _describe(loss: Loss, variables: Variables) -> dict[str, Any]:
    return {
        "network": describe_network(loss.model),
        "variables": _compute_checksum(variables),
        "images": _compute_checksum(loss.batches),
        "loss": _name_object(loss.each),
        "batchnorm": loss.batchnorm,
    }


def _compute_checksum(tree: PyTree) -> int:
    checksum = 0
    for leaf in jax.tree.leaves(tree):
        checksum = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), checksum)
    return checksum


def _open_folder(folder: str | os.PathLike, wanted: Mapping[str, Any]) -> Path:
    """The folder, which holds only rows that `wanted` describes. Raises `UserError`."""
    place = Path(folder)
    about = place / ABOUT
    wanted = json.loads(json.dumps(wanted))
    if about.is_file():
        try:
            there = json.loads(about.read_text())
        except ValueError:
            raise UserError(f"{about} is damaged; remove {place}") from None
        if there != wanted:
            differing = [key for key in wanted if wanted[key] != there.get(key)]
            raise UserError(
                f"{place} holds rows of another plane or line ({', '.join(differing)} differ); "
                "choose another place, or remove this folder"
            )
        return place
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {place}: {error.strerror}") from None
    files.write_json(about, wanted)
    return place
