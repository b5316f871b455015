"""Compares our networks with those of other libraries: same weights, same images, same logits?

    python -m tests.parity --all               # every pair, one at a time; resumes if interrupted
    python -m tests.parity resnet50 nin_cifar10    # some networks, with every source
    python -m tests.parity --all --again       # starts over
    python -m tests.parity resnet50 --csv      # updates experiments/results/parity.csv
    pip install torch==2.13.0 keras==3.15 && pip install --no-deps torchvision==0.28.0 timm==1.0.31

Every tensor of the other network gets random values, and `flax_cnns.weights.convert` converts them
to our variables. Both networks then evaluate four images in float32. "Difference" is the largest
difference of logits, divided by their standard deviation over the images (root mean square over the
classes). A pair passes with at most 1e-4. "Control" is the difference after one of the tensors was
drawn again, which must not pass.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import re
import sys
import time
import zlib
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from flax_cnns import create_model, list_models, model_info
from flax_cnns import tree as pytree
from flax_cnns.errors import UserError
from flax_cnns.weights import convert
from tests.models import foreign
from tests.models.published import UNVERIFIED
from tests.models.shapes import FAMILY_OF
from tests.models.straight.cases import CASES, MORE, Case, in_numpy, redrawn

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "experiments/results/parity.csv"
ORDER = ("torchvision", "timm", "Keras", "NumPy")
LIBRARY_NAMES = {"keras": "Keras"}  # in the recorded table
LIMIT = 1e-4
MAX_IMAGE_SIZE = 331  # pixels; EfficientNets for larger images are compared at this size

NUMPY = {case.name: case for case in CASES + MORE}


class Result(NamedTuple):
    """The comparison of a network with one source."""

    name: str
    source: str
    params: int
    size: int
    spread: float  # standard deviation of the logits over the images; 0 if they are constant
    scale: float  # root mean square of the logits
    difference: float  # largest difference of logits / spread
    control: float  # the difference after one tensor was drawn again
    redrawn: str  # the name of this tensor
    seconds: float

    @property
    def passed(self) -> bool:
        varies = self.spread > 1e-3 * self.scale
        return varies and self.difference <= LIMIT < self.control


def sources_of(name: str) -> tuple[str, ...]:
    """Returns `model_info(name).sources` without tracing. Raises `UserError` for unknown names."""
    create_model(name)
    family = import_module(f"flax_cnns.models.{FAMILY_OF[name]}")
    return getattr(family, "SOURCES", {}).get(name, ())


def list_pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """Lists (network, source) of all networks in `names` that have other implementations."""
    sources = {name: (*sources_of(name), *["NumPy"] * (name in NUMPY)) for name in names}
    # tests/weights compares with the package efficientnet_lite, by its published weights.
    return [
        (name, source)
        for name in sources
        for source in sources[name]
        if source != "efficientnet_lite"
    ]


def list_all_pairs() -> list[tuple[str, str]]:
    """Lists the pairs of all networks; a network with several names occurs once per source."""
    first = {
        (create_model(name), source): (name, source)
        for name, source in reversed(list_pairs(list_models()))
    }
    return sorted(first.values())


def spread(logits: np.ndarray) -> float:
    """Returns the standard deviation over the images [N K], root mean square over the classes."""
    return float(np.sqrt(np.mean(np.var(logits, axis=0))))


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Returns the largest difference of logits [N K], divided by their spread."""
    return float(np.abs(ours - theirs).max() / spread(theirs))


def disturb(
    tensors: Mapping[str, np.ndarray], name: str, source: str, gain: float = 2.0
) -> dict[str, np.ndarray]:
    """Returns the tensors with the one called `name` drawn again."""
    return {**tensors, name: foreign.redraw(f"again.{name}", tensors[name].shape, source, gain)}


def compare(
    name: str,
    source: str,
    live: foreign.Live,
    size: int,
    *,
    n: int = 4,
    **fields: Any,
) -> Result:
    """Compares our network `name` with these fields to the other library's network."""
    began = time.perf_counter()
    info, x = model_info(name), foreign.images(n, size, create_model(name).input_size[-1])
    theirs = foreign.logits(live, x, source)
    variables = convert(name, live.tensors, source, **fields)
    model = create_model(name, **{"num_classes": theirs.shape[-1]} | fields)
    apply = jax.jit(model.apply)
    ours = np.asarray(apply(variables, x))
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    used = used_tensors(name, source, live.tensors, fields)
    victim = used[zlib.crc32(name.encode()) % len(used)]
    tensors = disturb(live.tensors, victim, source, foreign.gain(name))
    wrong = np.asarray(apply(convert(name, tensors, source, **fields), x))
    return Result(
        name=name,
        source=source,
        params=info.params,
        size=size,
        spread=spread(theirs),
        scale=float(np.sqrt(np.mean(theirs**2))),
        difference=difference(ours, theirs),
        control=difference(wrong, theirs),
        redrawn=victim,
        seconds=time.perf_counter() - began,
    )


def compare_numpy(case: Case) -> Result:
    """Compares our network with a straight-line forward pass in NumPy, f64."""
    began = time.perf_counter()
    model, tensors, x = redrawn(case)
    apply = jax.jit(model.apply, compiler_options={"xla_backend_optimization_level": 0})
    ours = np.asarray(apply(pytree.unflatten(tensors), x))
    theirs = in_numpy(case.straight, tensors, x)
    assert ours.dtype == np.float32
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    used = [path for path in tensors if "/aux" not in path]
    victim = used[zlib.crc32(case.name.encode()) % len(used)]
    wrong = np.asarray(
        apply(pytree.unflatten(disturb(tensors, victim, "keras", foreign.gain(case.name))), x)
    )
    return Result(
        name=case.name,
        source="NumPy",
        params=model_info(case.name).params,
        size=case.size,
        spread=spread(theirs),
        scale=float(np.sqrt(np.mean(theirs**2))),
        difference=difference(ours, theirs),
        control=difference(wrong, theirs),
        redrawn=victim,
        seconds=time.perf_counter() - began,
    )


def used_tensors(
    name: str, source: str, tensors: Mapping[str, np.ndarray], fields: Mapping[str, Any]
) -> list[str]:
    """Lists the tensors that evaluation uses: all but those of auxiliary heads."""
    marks = {key: np.full(np.shape(a), i, np.float32) for i, (key, a) in enumerate(tensors.items())}
    variables = convert(name, marks, source, **fields)
    for collection in variables.values():
        for module in [module for module in collection if module.startswith("aux")]:
            del collection[module]
    keys = list(marks)
    return [keys[int(leaf.flat[0])] for leaf in jax.tree.leaves(variables)]


def hash_code(name: str, source: str) -> str:
    """Hashes the files that a pair's result depends on; if one changes, it is compared again."""
    package, tests = ROOT / "flax_cnns", Path(__file__).parent
    families = [FAMILY_OF[name]]
    theirs = ("__init__", "builders", *families)
    files = {Path(__file__), *(tests / f"models/foreign/{file}.py" for file in theirs)}
    files |= {*(package / "layers").rglob("*.py")}
    files |= {package / "weights/__init__.py", package / "weights/name_maps.py"}
    for family in families:  # grows by the families that each file imports
        path = package / f"models/{family}.py"
        files |= {path, package / f"weights/{family}.py"}
        imported = re.findall(r"from flax_cnns\.models(?:\.| import )(\w+)", path.read_text())
        families += [other for other in imported if other not in families]
    if source == "NumPy":
        files |= {*(tests / "models/straight").glob("*.py")}
    digest = hashlib.sha256()
    for path in sorted(path for path in files if path.is_file()):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def format_table(results: list[Result]) -> str:
    rows = [("network", "source", "parameters", "size", "max |difference| / std", "control", "")]
    for r in results:
        verdict = "" if r.passed else "FAILS "
        if r.name in UNVERIFIED:
            verdict += f"count unverified ({UNVERIFIED[r.name]})"
        numbers = f"{r.difference:.1e}", f"{r.control:.1e}"
        rows.append((r.name, r.source, f"{r.params:,}", str(r.size), *numbers, verdict))
    widths = [max(map(len, column)) for column in zip(*rows)]
    align = "<<>>>><"
    return "\n".join(
        "  ".join(f"{cell:{a}{w}}" for a, cell, w in zip(align, row, widths)).rstrip()
        for row in rows
    )


def update_table(results: Iterable[Result], path: Path) -> None:
    """Writes the rows into the table at `path`, replacing older rows of the same pairs."""
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    table = {tuple(row[:2]): row for row in rows}
    for r in results:
        library = LIBRARY_NAMES.get(r.source, r.source)
        numbers = f"{r.difference:.1e}", f"{r.control:.1e}"
        table[r.name, library] = [r.name, library, str(r.params), str(r.size), *numbers]
    ordered = sorted(table.values(), key=lambda row: (ORDER.index(row[1]), row[0]))
    path.write_text("".join(f"{','.join(row)}\n" for row in [header, *ordered]))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", nargs="*", help="names of our networks")
    parser.add_argument("--all", action="store_true", help="all networks")
    parser.add_argument("--csv", action="store_true", help="update the recorded table")
    parser.add_argument("--again", action="store_true", help="ignore earlier results")
    parser.add_argument("--results", type=Path, default=ROOT / "runs/parity.json")
    args = parser.parse_args(argv)
    if not args.names and not args.all:
        parser.error("expected names of networks, or --all")
    try:
        chosen = list_all_pairs() if args.all else list_pairs(args.names)
    except UserError as e:
        parser.error(str(e))
    compared = {name for name, _ in chosen}
    if unpaired := sorted(set(args.names) - compared):
        parser.error(f"no other implementation of {', '.join(unpaired)}")
    saved: dict[str, list[Any]] = {}  # {"resnet18 torchvision": [hash, *result]}
    if args.results.is_file() and not args.again:
        saved = json.loads(args.results.read_text())
    versions = {pair: hash_code(*pair) for pair in chosen}
    missing = [p for p in chosen if saved.get(" ".join(p), [None])[0] != versions[p]]
    for i, (name, source) in enumerate(missing, 1):
        print(f"{i}/{len(missing)} {name} from {source} ...", file=sys.stderr, flush=True)
        if source == "NumPy":
            result = compare_numpy(NUMPY[name])
        else:
            size = min(create_model(name).input_size[0], MAX_IMAGE_SIZE)
            try:
                theirs = foreign.build(name, source, size)
                live = foreign.load(theirs, source, foreign.gain(name))
            except (UserError, ImportError) as e:
                parser.error(f"cannot import {source}: {e}; --help shows what to install")
            result = compare(name, source, live, size)
            del live, theirs
        jax.clear_caches()
        args.results.parent.mkdir(parents=True, exist_ok=True)
        partial = args.results.with_suffix(".partial")
        saved[f"{name} {source}"] = [versions[name, source], *result]
        partial.write_text(json.dumps(saved, indent=1))
        partial.replace(args.results)
    results = [Result(*saved[" ".join(pair)][1:]) for pair in chosen]
    print(format_table(results))
    if args.csv:
        update_table(results, TABLE)
    failed = [r for r in results if not r.passed]
    print(f"{len(results) - len(failed)} of {len(results)} pass (limit {LIMIT:g})")
    if args.all and (others := [name for name in list_models() if name not in compared]):
        print(f"tested only by counts and by shared code: {', '.join(others)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
