"""Checks every import of the package against a table of allowed imports, and for cycles."""

from __future__ import annotations

import ast
import functools
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "flax_cnns"

# All parts may import these modules, which import only each other from the package.
COMMON = {"errors", "types", "files", "names"}

# Part of the package: the parts that it may import, besides itself and COMMON. A part is a folder,
# a folder in a folder, or a module. A file belongs to the part with the longest matching name.
MAY_IMPORT = {
    "tree": set(),
    "config": set(),
    "runtime": set(),
    "recipes": set(),  # configs/ in a checkout
    "layers": {"tree"},
    "models": {"layers"},
    "models.registry": {"models", "layers"},
    "data": {"tree", "config"},
    "train": {"tree"},
    "weights": {"models", "models.registry", "layers", "tree", "data.images"},
    "evaluation": {"train.metrics", "train.losses", "train.parallel", "data", "tree"},
    "analysis": {"layers", "tree"},
    "checkpoint": {"tree"},
    "checkpoint.graft": {"checkpoint", "weights", "tree"},
    "checkpoint.listing": {"checkpoint", "checkpoint.graft", "tree"},
    "interop": {"models", "models.registry", "weights", "checkpoint", "tree"},
}
MAY_IMPORT["runs"] = set(MAY_IMPORT)
MAY_IMPORT["studies"] = {"runs"} | MAY_IMPORT["runs"]
MAY_IMPORT["cli"] = {"studies"} | MAY_IMPORT["studies"]
MAY_IMPORT["launch"] = {"runtime"}  # the command `python -m flax_cnns.launch`
# flax_cnns/__init__.py names modules as strings and imports them late.
FILES = sorted(set(PACKAGE.rglob("*.py")) - {PACKAGE / "__init__.py"})
CONFIGS = sorted((ROOT / "configs").rglob("*.py"))


def imported(source: str, path: Path) -> set[str]:
    """Returns the modules that a file imports anywhere. `from a import b` counts as `a.b`."""
    package = path.relative_to(ROOT).parent.parts
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


@functools.cache
def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def modules(source: str, path: Path, root: Path = PACKAGE) -> set[str]:
    """Returns the modules below `root` that a file imports, without the name of `root`."""
    found, top = set(), ".".join(root.relative_to(ROOT).parts)
    for name in imported(source, path):
        while name and not is_module(name):
            name = name.rpartition(".")[0]
        if name.startswith(top):
            found.add(name.removeprefix(top).removeprefix("."))
    return found


def name_of(path: Path, root: Path = PACKAGE) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_in(module: str, part: str) -> bool:
    return module == part or module.startswith(f"{part}.")


def part(module: str) -> str | None:
    return max((p for p in MAY_IMPORT if is_in(module, p)), key=len, default=None)


def forbidden(source: str, path: Path) -> set[str]:
    own = part(name_of(path))
    allowed = COMMON if own is None else COMMON | {own} | MAY_IMPORT[own]

    def fits(module: str) -> bool:
        if module in allowed:  # the table names this module itself
            return True
        return part(module) in allowed or any(is_in(module, p) for p in allowed - set(MAY_IMPORT))

    return {module for module in modules(source, path) if not fits(module)}


@functools.cache
def bound(module: Path) -> set[str]:
    """Returns the names that a module binds anywhere."""
    names = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    return names


def test_what_a_file_imports_from_another_is_there():
    """Finds imports of names that were moved or renamed, also on untested paths."""
    ours = [path for top in ("flax_cnns", "experiments") for path in (ROOT / top).rglob("*.py")]
    missing = []
    for path in ours:
        for name in imported(path.read_text(), path):
            module, _, last = name.rpartition(".")
            if not module.startswith("flax_cnns.") or is_module(name) or not is_module(module):
                continue
            file = ROOT / module.replace(".", "/")
            file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
            if last not in bound(file) | {"*"}:
                missing.append(f"{path.relative_to(ROOT)}: {name}")
    assert missing == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_what_its_part_may(path):
    name = name_of(path)
    assert part(name) or name in COMMON, f"give {name} a row in the table"
    assert forbidden(path.read_text(), path) == set()


@pytest.mark.parametrize("root", ["flax_cnns", "experiments/benchmarks"])
def test_no_module_imports_itself_by_way_of_others(root):
    root = ROOT / root
    files = FILES if root == PACKAGE else root.rglob("*.py")
    graph = {name_of(path, root): modules(path.read_text(), path, root) for path in files}
    graph = {name: found - {name, ""} for name, found in graph.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"these import each other: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_a_config_imports_ml_collections_the_table_of_fields_and_configs(path):
    names = imported(path.read_text(), path)
    assert not re.search(r"^(from|import) configs\b", path.read_text(), re.M), "relatively"
    ours = {name for name in names if name.startswith("flax_cnns")}
    assert all(name.startswith("flax_cnns.config.") for name in ours)
    tops = {name.partition(".")[0] for name in names - ours}
    assert tops <= {"ml_collections", "configs", "__future__"}


@pytest.mark.parametrize(
    "line",
    [
        "from flax_cnns.models.registry import create_model",
        "from flax_cnns.models import registry",
        "import flax_cnns.models.registry as r",
        "from ..models import registry",
        "from ..models.registry import create_model",
        "def late():\n    from flax_cnns.models import registry",
    ],
)
def test_the_walk_sees_every_way_to_import(line):
    assert forbidden(line, PACKAGE / "train/loop.py") == {"models.registry"}
    assert forbidden(line, PACKAGE / "models/resnet.py") == {"models.registry"}
    assert forbidden(line, PACKAGE / "runs/train.py") == set()


# Files with imports by a computed name, which the checks cannot see: the package's __init__.py, the
# families of the registry, a family's name map, packages for reading a file.
BY_NAME = {
    *("__init__.py", "models/registry.py", "weights/__init__.py", "weights/common.py"),
    "data/types.py",  # packages that a user's own data come from
    "cli/__main__.py",  # the command to run
    "runs/references.py",  # a user's own parts, given by name
}


def test_modules_are_imported_by_statements():
    by_name = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if re.search(r"import_module\(|__import__\(", path.read_text())
    }
    assert by_name == BY_NAME


def test_the_package_imports_nothing_that_is_not_installed_with_it():
    for path in FILES:
        tops = {name.partition(".")[0] for name in imported(path.read_text(), path)}
        assert tops.isdisjoint({"experiments", "configs", "tests"}), path


def test_a_file_is_read_in_one_sitting():
    """A file has at most 400 lines."""
    long = [
        str(path.relative_to(ROOT)) for path in FILES if len(path.read_text().splitlines()) > 400
    ]
    assert long == []


def test_a_row_may_name_one_module_of_a_part():
    exact = PACKAGE / "evaluation/exact.py"
    assert forbidden("from flax_cnns.train.metrics import zeros", exact) == set()
    assert forbidden("from flax_cnns.train import loop", exact) == {"train.loop"}
    assert forbidden("import flax_cnns", exact) == {""}  # the package itself reaches everything


def test_importing_the_package_leaves_jax_alone():
    """A launcher must set the environment before JAX is imported."""
    command = "import sys, flax_cnns; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], cwd=ROOT, check=False).returncode == 0


def public_classes() -> list[tuple[str, str]]:
    """(name, module) of the classes of the package; a family's own classes are its own."""
    return [
        (node.name, name_of(path))
        for path in FILES
        if not name_of(path).startswith("models.")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]


def test_no_two_public_classes_have_one_name():
    names: dict[str, list[str]] = {}
    for name, module in public_classes():
        names.setdefault(name, []).append(module)
    assert len(names) > 50
    assert not {name: modules for name, modules in names.items() if len(modules) > 1}
