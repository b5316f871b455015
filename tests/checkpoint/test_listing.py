"""The listing of experiments.inspect: it shows the tree, reads no array, and verifies."""

import io
import json

import numpy as np
import orbax.checkpoint as ocp
import pytest
from rich.console import Console

from flax_cnns.checkpoint import manager, reading
from flax_cnns.checkpoint.listing import print_listing
from flax_cnns.checkpoint.manager import Checkpoints
from flax_cnns.errors import UserError
from flax_cnns.weights import preprocessing
from tests.checkpoint.graft.test_graft import make_bomb
from tests.checkpoint.test_manager import flip_a_bit

HEAD = {"kernel": np.ones((4, 3), np.float32), "bias": np.ones(3, np.float16)}
STATE = {
    "params": {"stem": {"kernel": np.random.default_rng(0).normal(size=(50, 20))}, "head": HEAD},
    "batch_stats": {"norm2": {"mean": np.ones(2)}, "norm10": {"mean": np.ones(2)}},
    "step": np.int32(7),
}


@pytest.fixture
def run(tmp_path):
    with Checkpoints(tmp_path / "run/checkpoints") as checkpoints:
        for step, accuracy in ((7, 0.9), (9, 0.5)):
            found = {"validation/accuracy": accuracy}
            checkpoints.save(step, STATE, host={}, metrics=found)
    (tmp_path / "run/summary.json").write_text('{"test/step": 7}')
    return tmp_path / "run"


def listing(source, **options):
    file = io.StringIO()
    print_listing(source, **options, console=Console(file=file, width=100))
    return [line.rstrip() for line in file.getvalue().splitlines()]


def misuse(source, **options):
    with pytest.raises(UserError) as raised:
        listing(source, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_the_tree_is_listed_and_no_array_read(run, monkeypatch):
    monkeypatch.setattr(reading, "read_leaves", None)
    lines = listing(run)
    on_disk = reading.count_bytes_on_disk(run)
    assert lines[:3] == [
        f"{run}/checkpoints/7/state",
        "step 7 (tested for summary.json), validation/accuracy 0.9",
        "steps of the run: 7, 9; best 7",
    ]
    assert lines[3:-2] == [
        "path          shape     dtype    numbers      size",
        "batch_stats/                           4  32 bytes",
        "  norm2/                               2  16 bytes",
        "    mean      [2]       float64        2  16 bytes",
        "  norm10/                              2  16 bytes",
        "    mean      [2]       float64        2  16 bytes",
        "params/                            1,015    8.1 kB",
        "  stem/                            1,000    8.0 kB",
        "    kernel    [50, 20]  float64    1,000    8.0 kB",
        "  head/                               15  54 bytes",
        "    bias      [3]       float16        3   6 bytes",
        "    kernel    [4, 3]    float32       12  48 bytes",
        "step          []        int32          1   4 bytes",
    ]
    assert lines[-2].startswith("6 leaves, 1,020 numbers, 8.1 kB in memory, ")
    assert 8000 < on_disk < 100_000
    assert lines[-1] == "CRC32s: yes (--verify compares them)"


def test_a_part_of_the_tree(run):
    assert [line.split()[0] for line in listing(run, depth=1)[4:-2]] == [
        "batch_stats/",
        "params/",
        "step",
    ]
    lines = listing(f"{run}@9", pattern="params/head/.*")
    assert lines[1] == "step 9 (named), validation/accuracy 0.5"
    assert [line.split()[0] for line in lines[4:-2]] == ["params/", "head/", "bias", "kernel"]
    assert lines[-2].startswith("2 of 6 leaves, 15 numbers, 54 bytes in memory")


def test_verifying(run, monkeypatch):
    monkeypatch.setattr("flax_cnns.checkpoint.reading.MAX_PORTION_BYTES", 50)  # several reads
    assert listing(run, verify=True)[-1] == "CRC32s: compared, all equal"
    flip_a_bit(run / "checkpoints/7")
    assert listing(run)[-1] == "CRC32s: yes (--verify compares them)"
    assert "checkpoints/7/state is damaged: " in misuse(run, verify=True)
    assert listing(f"{run}@9", verify=True)[-1] == "CRC32s: compared, all equal"


def test_a_checkpoint_made_elsewhere(tmp_path):
    ocp.PyTreeCheckpointer().save(tmp_path / "theirs", {"layers": [HEAD]})
    lines = listing(tmp_path / "theirs")
    assert lines[0] == str(tmp_path / "theirs")
    assert lines[2].split() == ["layers/", "15", "54", "bytes"]
    assert lines[-1] == "CRC32s: none, so a flipped bit would not be noticed"
    lines = listing(tmp_path / "theirs", verify=True)
    assert lines[-1] == "CRC32s: none, so a flipped bit would not be noticed; all were read"


def test_a_converted_checkpoint_says_what_it_was_trained_on(tmp_path):
    seen = preprocessing("tf_efficientnet_lite0", "efficientnet_lite")._asdict()
    about = dict(model="lite", source="somebody", preprocessing=seen)
    manager.write_tree(tmp_path / "theirs", {"params": {"head": HEAD}}, about)
    lines = listing(tmp_path / "theirs", verify=True)
    assert lines[:2] == [
        f"{tmp_path}/theirs/state",
        "somebody's lite was trained on RGB images of 224 pixels with"
        " data.mean=(0.498, 0.498, 0.498), data.std=(0.502, 0.502, 0.502)",
    ]
    assert lines[-1] == "CRC32s: compared, all equal"
    # A file of this name from other software is ignored.
    for other in ({"model": "lite"}, about | {"preprocessing": {"size": 224}}):
        (tmp_path / "theirs/about.json").write_text(json.dumps(other))
        assert "trained on" not in listing(tmp_path / "theirs")[1]


def test_a_tree_in_memory():
    lines = listing({"params": {"head": HEAD}})
    assert lines[0] == "the given tree"
    assert lines[-1] == "2 leaves, 15 numbers, 54 bytes in memory"


def test_a_small_file_that_declares_huge_arrays_is_listed_and_not_read(tmp_path):
    make_bomb(tmp_path, {"w": np.ones(4, np.float32)})
    assert "4.4 TB in memory" in listing(tmp_path)[-2]
    assert "declares arrays of 4,398,046,511,104 bytes" in misuse(tmp_path, verify=True)


def test_mistakes(run):
    assert "matches no whole path" in misuse(run, pattern="params/head")
    assert "the nearest path is 'params/head/" in misuse(run, pattern="params/haed/.*")
    assert "'(' is not a regular expression" in misuse(run, pattern="(")
    assert "--depth: expected 0 (everything) or more, got -1" in misuse(run, depth=-1)
    assert "it has best, latest, 7, 9" in misuse(f"{run}@8")
    assert "did you mean 'run'?" in misuse(run.parent / "runs")
