"""Compares every network with other libraries: same weights, same images, same logits?

    python -m tests.parity --all               # every pair in turn; resumes where it stopped
    python -m tests.parity resnet50 nin_cifar10    # some networks, with every source
    python -m tests.parity --all --again       # start again
    python -m tests.parity resnet50 --csv      # also write experiments/results/parity.csv
    pip install torch==2.13.0 keras==3.15 && pip install --no-deps torchvision==0.28.0 timm==1.0.31

Every tensor of the other network is redrawn and converted by `flax_cnns.weights.convert`. Then both
networks evaluate four images in float32. Difference: the largest difference of the logits, divided
by their standard deviation over the images (root mean square over the classes). A pair passes with
at most 1e-4. Control: the difference after one tensor was redrawn, which must not pass.
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
DISPLAY_NAMES = {"keras": "Keras"}  # in the table
LIMIT = 1e-4
MAX_PIXELS = 331  # EfficientNets for larger images are compared at this size

NUMPY = {case.name: case for case in CASES + MORE}


class Result(NamedTuple):
    name: str
    source: str
    params: int
    size: int
    spread: float  # of the logits over the images; zero for a constant output
    scale: float  # root mean square of the logits
    difference: float  # the largest difference, divided by `spread`
    control: float  # the same with one tensor redrawn
    redrawn: str  # name of that tensor
    seconds: float

    @property
    def passed(self) -> bool:
        alive = self.spread > 1e-3 * self.scale
        return alive and self.difference <= LIMIT < self.control


def sources_of(name: str) -> tuple[str, ...]:
    """Returns the sources that `model_info` has, without tracing the network. Raises `UserError`
    for an unknown name."""
    create_model(name)
    family = import_module(f"flax_cnns.models.{FAMILY_OF[name]}")
    return getattr(family, "SOURCES", {}).get(name, ())


def pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """Returns (network, source) for each network with an independent implementation."""
    sources = {name: (*sources_of(name), *["NumPy"] * (name in NUMPY)) for name in names}
    # tests/weights compares efficientnet_lite through its published weights.
    sources = {name: [s for s in of if s != "efficientnet_lite"] for name, of in sources.items()}
    return [(name, source) for name in sources for source in sources[name]]


def every_pair() -> list[tuple[str, str]]:
    """Returns the pairs of `list_models()`. A network with several names has each source once."""
    first = {
        (create_model(name), source): (name, source)
        for name, source in reversed(pairs(list_models()))
    }
    return sorted(first.values())


def spread(logits: np.ndarray) -> float:
    """Returns the standard deviation of [N K] over images, as root mean square over classes."""
    return float(np.sqrt(np.mean(np.var(logits, axis=0))))


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / spread(theirs))


def disturb(
    tensors: Mapping[str, np.ndarray], name: str, source: str, gain: float = 2.0
) -> dict[str, np.ndarray]:
    """Returns the tensors with one of them redrawn."""
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
    """Compares our network `name`, with fields, with the other library's network."""
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
    """Returns the tensors that evaluation uses: all but those of auxiliary heads."""
    marks = {key: np.full(np.shape(a), i, np.float32) for i, (key, a) in enumerate(tensors.items())}
    variables = convert(name, marks, source, **fields)
    for collection in variables.values():
        for module in [module for module in collection if module.startswith("aux")]:
            del collection[module]
    keys = list(marks)
    return [keys[int(leaf.flat[0])] for leaf in jax.tree.leaves(variables)]


def code(name: str, source: str) -> str:
    """Returns a digest of the files that a pair's result depends on. If one of them changes, the
    pair is compared again."""
    package, tests = ROOT / "flax_cnns", Path(__file__).parent
    families = [FAMILY_OF[name]]
    theirs = ("__init__", "builders", *families)
    files = {Path(__file__), *(tests / f"models/foreign/{file}.py" for file in theirs)}
    files |= {*(package / "layers").rglob("*.py")}
    files |= {package / "weights/__init__.py", package / "weights/name_maps.py"}
    for family in families:  # the loop adds the families that each family imports
        path = package / f"models/{family}.py"
        files |= {path, package / f"weights/{family}.py"}
        found = re.findall(r"from flax_cnns\.models(?:\.| import )(\w+)", path.read_text())
        families += [other for other in found if other not in families]
    if source == "NumPy":
        files |= {*(tests / "models/straight").glob("*.py")}
    digest = hashlib.sha256()
    for path in sorted(path for path in files if path.is_file()):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def table(results: list[Result]) -> str:
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


def enter(results: Iterable[Result], path: Path) -> None:
    """Writes the rows into the table at `path` and replaces older rows of the same pairs."""
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    table = {tuple(row[:2]): row for row in rows}
    for r in results:
        beside = DISPLAY_NAMES.get(r.source, r.source)
        numbers = f"{r.difference:.1e}", f"{r.control:.1e}"
        table[r.name, beside] = [r.name, beside, str(r.params), str(r.size), *numbers]
    ordered = sorted(table.values(), key=lambda row: (ORDER.index(row[1]), row[0]))
    path.write_text("".join(f"{','.join(row)}\n" for row in [header, *ordered]))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", nargs="*", help="networks of ours")
    parser.add_argument("--all", action="store_true", help="all of them")
    parser.add_argument("--csv", action="store_true", help="enter the rows in the recorded table")
    parser.add_argument("--again", action="store_true", help="forget what is known")
    parser.add_argument("--results", type=Path, default=ROOT / "runs/parity.json")
    args = parser.parse_args(argv)
    if not args.names and not args.all:
        parser.error("expected names of networks, or --all")
    try:
        chosen = every_pair() if args.all else pairs(args.names)
    except UserError as e:
        parser.error(str(e))
    compared = {name for name, _ in chosen}
    if alone := sorted(set(args.names) - compared):
        parser.error(f"there is nothing to compare with for {', '.join(alone)}")
    saved = {}  # {"resnet18 torchvision": [code, *result]}
    if args.results.is_file() and not args.again:
        saved = json.loads(args.results.read_text())
    versions = {pair: code(*pair) for pair in chosen}
    missing = [p for p in chosen if saved.get(" ".join(p), [None])[0] != versions[p]]
    for i, (name, source) in enumerate(missing, 1):
        print(f"{i}/{len(missing)} {name} from {source} ...", file=sys.stderr, flush=True)
        if source == "NumPy":
            result = compare_numpy(NUMPY[name])
        else:
            size = min(create_model(name).input_size[0], MAX_PIXELS)
            try:
                theirs = foreign.build(name, source, size)
                live = foreign.load(theirs, source, foreign.gain(name))
            except (UserError, ImportError) as e:
                parser.error(f"{source} cannot be had: {e}; --help says what to install")
            result = compare(name, source, live, size)
            del live, theirs
        jax.clear_caches()
        args.results.parent.mkdir(parents=True, exist_ok=True)
        partial = args.results.with_suffix(".partial")
        saved[f"{name} {source}"] = [versions[name, source], *result]
        partial.write_text(json.dumps(saved, indent=1))
        partial.replace(args.results)
    results = [Result(*saved[" ".join(pair)][1:]) for pair in chosen]
    print(table(results))
    if args.csv:
        enter(results, TABLE)
    failed = [r for r in results if not r.passed]
    print(f"{len(results) - len(failed)} of {len(results)} pass (limit {LIMIT:g})")
    if args.all and (others := [name for name in list_models() if name not in compared]):
        print(f"proven by their counts and by what they share with these: {', '.join(others)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
