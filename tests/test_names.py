"""Unusual names of files and classes are shown literally and break nothing."""

import io
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flax_cnns.analysis.plots.confusion import draw_confusion
from flax_cnns.analysis.plots.predictions import draw_predictions
from flax_cnns.checkpoint.manager import Checkpoints
from flax_cnns.names import escape_unencodable, escape_unprintable, open_log
from flax_cnns.runs import tables

ROOT = Path(__file__).parents[1]
NAMES = ["[red]", "a[/b]", "$x_1$", "caf\udce9", "\u732b", ":smile:", r"\frac{$ $"]
SHOWN = ["[red]", "a[/b]", "$x_1$", r"caf\xe9", "\u732b", ":smile:", r"\frac{$ $"]


def test_printable():
    assert [escape_unprintable(name) for name in NAMES] == SHOWN
    assert escape_unprintable("a\x1b[31m\tb\nc\x9b\ud800") == "a\\x1b[31m\tb\nc\\x9b\\ud800"


def test_tables_show_names_as_they_are(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # strict, unlike pytest's stream
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("COLUMNS", "300")
    classes = [{"class": n, "examples": 2, "accuracy": 0.5, "precision": None} for n in NAMES]
    counts = (np.eye(len(NAMES), dtype=int) + 1).tolist()
    found = dict(split="test", step=3, checkpoint="best", examples=9, loss=1.0, accuracy=0.5)
    tables.print_evaluation({**found, "classes": classes, "confusion": counts})
    damaged = ["a[/b]/caf\udce9.png"]
    summary = dict(model="[b]lenet", dataset="[i] data[/i]", params=5, damaged_images=damaged)
    tables.print_summary(summary)
    tables.print_predictions("a[/b]", NAMES, [[(name, 1.0)] for name in NAMES])
    out.flush()
    said = out.buffer.getvalue().decode()
    for name in SHOWN:
        # In a row and a column of the confusion matrix, a row of the classes, twice in the last
        # table.
        assert said.count(name) >= 5, name
    assert "[b]lenet on" in said
    assert "data[/i]" in said
    assert r"cannot be decoded: a[/b]/caf\xe9.png" in said


def test_any_locale_prints_names(monkeypatch):
    for errors in ("strict", "surrogateescape"):  # the latter if LANG=C
        out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors=errors)
        monkeypatch.setattr(sys, "stdout", out)
        escape_unencodable()
        print("a\xb7", "caf\udce9", flush=True)
        assert out.buffer.getvalue() == b"a\\xb7 caf\\xe9\n"


def test_pictures_show_names_as_they_are(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # warnings about letters that the font lacks
        draw_confusion(np.eye(len(NAMES)), NAMES, tmp_path / "[c].png", title=NAMES[-1])
        photo = (NAMES[-1], Image.new("RGB", (9, 9)), (0, 0, 9, 9))
        draw_predictions([photo], [[(name, 0.1) for name in NAMES]], tmp_path / "p.png", NAMES[3])
    assert sorted(os.listdir(tmp_path)) == ["[c].png", "p.png"]


def test_every_console_is_made_by_the_one_that_takes_no_markup():
    files = [*(ROOT / "flax_cnns").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")]
    makers = [f.name for f in files if re.search(r"\bConsole\(", f.read_text(encoding="utf-8"))]
    assert makers == ["names.py"]


def test_a_log_takes_every_name(tmp_path):
    with open_log(tmp_path / "log.txt") as log:
        print("".join(NAMES), file=log)
    assert (tmp_path / "log.txt").read_text(encoding="utf-8") == "".join(SHOWN) + "\n"


@pytest.mark.slow
def test_a_script_by_its_path_in_a_locale_without_letters(tmp_path):
    """experiments/inspect.py has the name of a module of Python's standard library."""
    place = tmp_path / "gr\u00fc\u00dfe [b]"
    with Checkpoints(place / "checkpoints") as checkpoints:
        checkpoints.save(1, {"w": np.ones(3)}, host={})
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, ROOT / "experiments/inspect.py", place, "--verify"],
        capture_output=True,
        env=os.environ | locale | {"PYTHONPATH": ""},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert b"e [b]/checkpoints/1/state" in done.stdout
    assert b"CRC32s: compared, all equal" in done.stdout


def test_every_script_leaves_its_folder_before_it_imports():
    for script in (ROOT / "experiments").glob("*.py"):
        lines = script.read_text(encoding="utf-8").partition("import annotations\n")[2]
        if "__main__" in lines:
            assert lines.startswith("\nimport sys\n\nif not __package__:"), script
