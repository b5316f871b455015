"""The examples run and print meaningful results; every code block of docs/extending.md runs."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
PAGE = ROOT / "docs/extending.md"
SECTIONS = re.split(r"^(?=## )", PAGE.read_text(), flags=re.M)[1:]
# A code block, with the comment before it: "needs: torch".
BLOCK = re.compile(r"(?:<!-- needs: (?P<needs>\w+) -->\n)?```python\n(?P<code>.*?)```", re.S)


def blocks(text):
    """Returns [(package that the block needs or "", file that the block is or "", code)]."""
    found = []
    for match in BLOCK.finditer(text):
        file = re.match(r"# (\w+\.py)\n", match["code"])
        found.append((match["needs"] or "", file[1] if file else "", match["code"]))
    return found


def start(arguments, folder, digits_dir):
    """Runs a script in an empty folder and returns its output."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "TFDS_DATA_DIR": digits_dir, "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def numbers(said, pattern):
    return [float(found) for found in re.findall(rf"{pattern} (\d\.\d+)", said)]


# ---- what is listed


def test_every_example_is_listed_and_has_a_test():
    listed = (EXAMPLES / "README.md").read_text()
    for file in [*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.ipynb")]:
        assert f"({file.name})" in listed, file
        assert f'"{file.name}"' in Path(__file__).read_text(), file
    assert "docs/extending.md" in (ROOT / "README.md").read_text()


def test_links_of_the_pages_lead_somewhere():
    for page in (PAGE, EXAMPLES / "README.md"):
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_blocks_are_code():
    found = [block for section in SECTIONS for block in blocks(section)]
    assert len(found) == PAGE.read_text().count("```python")
    for _, file, code in found:
        compile(code, file or "block", "exec")


def test_the_notebook_has_no_outputs():
    cells = json.loads((EXAMPLES / "quickstart.ipynb").read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


# ---- what runs


@pytest.mark.slow
def test_quickstart(tmp_path, digits_dir):
    said = start([EXAMPLES / "quickstart.py"], tmp_path, digits_dir)
    assert numbers(said, "test accuracy")[0] > 0.9
    predicted, true = re.search(r"predicted (.*)\ntrue +(.*)", said).groups()
    right = sum(a == b for a, b in zip(predicted.split(), true.split(), strict=True))
    assert right >= 8
    assert (tmp_path / "runs/quickstart/curves.png").stat().st_size > 10_000
    again = start([EXAMPLES / "quickstart.py"], tmp_path, digits_dir)
    assert "is complete" in again


@pytest.mark.slow
def test_own_network(tmp_path, digits_dir):
    said = start([EXAMPLES / "own_network.py"], tmp_path, digits_dir)
    assert numbers(said, "test accuracy")[0] > 0.9
    assert numbers(said, "on 100 images")[0] > 0.9
    record = json.loads((tmp_path / "runs/own_network/own.json").read_text())
    assert record["model"][0]["name"] == "own_network:Net"


@pytest.mark.slow
def test_own_data(tmp_path, digits_dir):
    ways = [
        "arrays",
        "npz",
        "grain",
        *(["torch"] if importlib.util.find_spec("torch") else []),
        *(["tf"] if importlib.util.find_spec("tensorflow") else []),
    ]
    said = start([EXAMPLES / "own_data.py"], tmp_path, digits_dir)
    for way in ways:
        assert numbers(said, f"{way}: test accuracy")[0] > 0.85, way


@pytest.mark.slow
def test_multilabel(tmp_path, digits_dir):
    said = start([EXAMPLES / "multilabel.py"], tmp_path, digits_dir)
    assert numbers(said, "test macro F1")[0] > 0.7  # predicting every label gives 0.32
    assert numbers(said, "label accuracy")[0] > 0.9  # predicting no label gives 0.81
    logged = (tmp_path / "runs/multilabel/metrics.jsonl").read_text()
    assert "validation/macro_f1" in logged


@pytest.mark.slow
def test_own_regularizers_in_an_ablation(tmp_path, digits_dir):
    name = "own_regularizer_in_an_ablation.py"
    said = start([EXAMPLES / name], tmp_path, digits_dir)
    assert "6/6" in said
    for row in ("plain", "orthogonal", "noise"):
        assert re.search(rf"^\|.*{row}", said, re.M), row
        assert (tmp_path / f"runs/ablation/{row}/seed1/summary.json").is_file()
    logs = [
        (tmp_path / f"runs/ablation/{row}/seed0/metrics.jsonl").read_text()
        for row in ("plain", "orthogonal")
    ]
    assert ["train/Orthogonal" in log for log in logs] == [False, True]


@pytest.mark.slow
def test_graft_a_backbone(tmp_path, digits_dir):
    said = start([EXAMPLES / "graft_a_backbone.py"], tmp_path, digits_dir)
    (fresh,), (grafted,) = (
        numbers(said, "fresh backbone: accuracy"),
        numbers(said, "grafted backbone: accuracy"),
    )
    assert grafted > fresh + 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain_optax_loop.py", "nnx_loop.py"])
def test_loops(name, tmp_path, digits_dir):
    said = start([EXAMPLES / name], tmp_path, digits_dir)
    assert numbers(said, "test accuracy")[0] > 0.9


@pytest.mark.slow
def test_the_notebook(tmp_path, digits_dir):
    cells = json.loads((EXAMPLES / "quickstart.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    (tmp_path / "notebook.py").write_text("\n\n".join(code))
    said = start(["notebook.py"], tmp_path, digits_dir)
    assert numbers(said, "test accuracy")[0] > 0.8


@pytest.mark.slow
@pytest.mark.parametrize(
    "section", filter(blocks, SECTIONS), ids=lambda text: text.split("\n")[0][3:]
)
def test_blocks_of_the_page_run(section, tmp_path, digits_dir):
    """Runs each section in one process, in a folder with the files that the page writes."""
    for text in SECTIONS:
        for _, file, code in blocks(text):
            if file:
                (tmp_path / file).write_text(code)
    code = [
        code
        for needs, file, code in blocks(section)
        if not file and (not needs or importlib.util.find_spec(needs))
    ]
    (tmp_path / "section.py").write_text("\n\n".join([*code, FACTORIES_GO_ON_EXACTLY]))
    start(["section.py"], tmp_path, digits_dir)


# Checks what a run relies on for each function NAME_batches of a section.
FACTORIES_GO_ON_EXACTLY = """
import itertools as _it
import numpy as _np

for _name, _factory in list(globals().items()):
    if _name in ("grain_batches", "torch_batches", "tf_batches"):
        _whole = list(_it.islice(_factory("train", 0, 0, 1), 50))
        for _key in ("image", "label"):
            for _was, _again in zip(_whole[40:], _factory("train", 40, 0, 1)):
                _np.testing.assert_array_equal(_was[_key], _again[_key])
            _halves = zip(_factory("train", 40, 0, 2), _factory("train", 40, 1, 2))
            _both = [_np.concatenate([a[_key], b[_key]]) for a, b in _it.islice(_halves, 3)]
            _np.testing.assert_array_equal(_both, [batch[_key] for batch in _whole[40:43]])
        assert (_whole[0]["image"].shape, _whole[0]["label"].shape) == ((64, 8, 8, 1), (64,))
        _test = [batch["label"] for batch in _factory("test", 0, 0, 1)]
        _np.testing.assert_array_equal(_np.concatenate(_test), labels[1300:])
        print(_name, "goes on exactly")
"""
