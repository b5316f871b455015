"""What may import what: the table, against every import statement of the package."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Part of the package: parts it may import. Its own files, errors, files and names
# are everyone's.
MAY_IMPORT = {
    "errors": set(),
    "files": set(),
    "names": set(),
    "network": set(),
    "types": set(),
    "pytree": {"types"},
    "layers": {"types", "pytree"},
    "models": {"layers", "types"},
    "registry": {"models"},
    "train": {"types", "pytree"},
    "checkpoint": {"types", "pytree", "weights"},
    "data": {"types", "network"},
    "weights": {"registry", "models", "layers", "data", "network", "pytree", "types"},
    "analysis": {"types", "pytree"},
    "evaluation": {"train", "data", "types"},
    "output": set(),
    "launch": {"output"},
    "config": {"effects"},
    "effects": set(),
    "compilation_cache": set(),
    # What experiment is put together from; nobody else needs them.
    "workdir": {"config", "checkpoint", "data"},
    "preemption": set(),
    "report": set(),
    "isolated": {"experiment", "launch", "compilation_cache", "output"},
    "records": {"experiment", "analysis", "train", "data", "workdir"},
    "comparison": {"analysis", "config", "records"},
    "ablation_report": {"analysis", "records", "workdir"},
    "ablation_plan": {"experiment", "analysis", "config", "data", "workdir", "isolated"},
    "ablation": {
        *("ablation_plan", "ablation_report", "data"),
        *("isolated", "launch", "output", "workdir"),
    },
    "search": {
        *("experiment", "analysis", "registry", "data"),
        *("output", "preemption", "workdir", "config"),
    },
}
# Whole runs are their parts.
ABOVE = {"isolated", "ablation_plan", "ablation", "ablation_report", "search"}
ABOVE |= {"records", "comparison"}
MAY_IMPORT["experiment"] = set(MAY_IMPORT) - ABOVE
MAY_IMPORT["probe"] = {"experiment"} | MAY_IMPORT["experiment"]
MAY_IMPORT["prediction"] = {"experiment"} | MAY_IMPORT["experiment"]
MAY_IMPORT["finetune"] = {"probe"} | MAY_IMPORT["probe"]
MAY_IMPORT["finetune_report"] = {"finetune", "workdir", "analysis"}
# The public face names modules as texts and imports them late.
FILES = sorted(set((ROOT / "flax_cnns").rglob("*.py")) - {ROOT / "flax_cnns/__init__.py"})
CONFIGS = sorted((ROOT / "configs").rglob("*.py"))


def imported(source: str, path: Path) -> set[str]:
    """The modules that a file imports anywhere in it: `from a import b` counts as `a.b`."""
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


def part(path: Path) -> str:
    return path.relative_to(ROOT / "flax_cnns").with_suffix("").parts[0]


def forbidden(source: str, path: Path) -> set[str]:
    ours = [name.split(".") for name in imported(source, path) if name.startswith("flax_cnns")]
    # The whole package, `import flax_cnns`, reaches everything.
    parts = {name[1] if len(name) > 1 else "flax_cnns" for name in ours}
    return parts - MAY_IMPORT[part(path)] - {part(path), "errors", "files", "names"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_what_its_part_may(path):
    assert part(path) in MAY_IMPORT, f"give {part(path)} a row in the table"
    assert forbidden(path.read_text(), path) == set()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_a_config_imports_ml_collections_and_configs(path):
    tops = {name.partition(".")[0] for name in imported(path.read_text(), path)}
    assert tops <= {"ml_collections", "configs", "__future__"}


@pytest.mark.parametrize(
    "line",
    [
        "from flax_cnns.models.registry import create_model",
        "from flax_cnns import registry",
        "import flax_cnns.models.registry as r",
        "from .. import registry",
        "from ..registry import create_model",
        "def late():\n    from flax_cnns import registry",
    ],
)
def test_the_walk_sees_every_way_to_import(line):
    assert forbidden(line, ROOT / "flax_cnns/train/loop.py") == {"registry"}
    assert forbidden(line, ROOT / "flax_cnns/experiment.py") == set()


def test_importing_the_package_leaves_jax_alone():
    """A launcher sets the environment first; JAX reads it when it is imported."""
    command = "import sys, flax_cnns; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], cwd=ROOT, check=False).returncode == 0
