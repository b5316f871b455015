"""Activations by layer, at initialization and over a run's checkpoints."""

from __future__ import annotations

import csv

import jax
import numpy as np
import pytest
from PIL import Image

from flax_cnns.analysis.explain.features import features
from flax_cnns.checkpoint import finding
from flax_cnns.data.load import load_dataset
from flax_cnns.errors import UserError
from flax_cnns.runs.build import build_components
from flax_cnns.runs.visualize import activations
from flax_cnns.runs.workdir import read_config
from tests.test_scripts import finish


@pytest.fixture(scope="module")
def specimen(finished):
    return activations.make_specimen_from_run(finished[0], count=40)


def test_the_moments_of_a_run_are_its_initialization_and_its_checkpoints(finished, specimen):
    steps = finding.all_steps(finished[0])
    assert [moment.name for moment in specimen.moments] == [
        "initialization",
        *(f"step {step}" for step in steps),
    ]
    wanted = build_components(read_config(finished[0])).init_variables()
    jax.tree.map(np.testing.assert_array_equal, specimen.moments[0].load(), wanted)
    one = activations.make_specimen_from_run(f"{finished[0]}@latest")
    assert [moment.name for moment in one.moments] == [f"step {steps[-1]}"]


def test_a_picture_and_a_table_of_all_numbers(finished, specimen, tmp_path, capsys):
    said = []
    given = dict(paths=["c1", "head"], say=said.append)
    path = activations.draw_activations(specimen, tmp_path / "x.png", **given)
    with Image.open(tmp_path / "x.png") as picture:
        assert min(picture.size) > 300
    count = len(specimen.moments)
    assert said[-1] == f"{specimen.moments[-1].name}: measured ({count} of {count})"
    text = capsys.readouterr().out
    assert "the first 40 images of the test split\n" in text  # LeNet has no BatchNorm
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * count
    last = {row["layer"]: row for row in rows if row["moment"] == specimen.moments[-1].name}
    images = load_dataset(read_config(finished[0]).data).splits["test"].images[:40]
    loaded = specimen.moments[-1].load()
    pixels = np.concatenate([np.asarray(images) for images, _ in specimen.batches()])
    assert len(pixels) == len(images) == 40
    output = features(specimen.model, loaded, pixels, ["c1"])["c1"]
    np.testing.assert_allclose(float(last["c1"]["mean"]), np.mean(output), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(float(last["c1"]["std"]), np.std(output), rtol=1e-3)
    assert last["c1"]["dead"] == ""  # tanh
    assert float(last["head"]["gradient_norm"]) > 0


def test_a_last_batch_of_few_images_is_joined_to_the_one_before():
    def stream(*sizes):
        for size in sizes:
            mask = np.arange(8) < size
            yield {"image": np.arange(8), "label": np.arange(8), "mask": mask.astype(np.float32)}

    sizes = lambda *given: [len(i) for i, _ in activations._join_last(stream(*given))]  # noqa: E731
    assert sizes(8, 8, 3) == [8, 11]
    assert sizes(8, 8, 4) == [8, 8, 4]
    assert sizes(2) == [2]


def test_wrong_names_are_one_line(finished):
    for given, message in (
        ({"config": object(), "init": "he"}, r"set --config\.model\.init"),
        ({"model": "lenet5", "photos": ["x.png"]}, "takes photos only with --weights"),
    ):
        with pytest.raises(UserError, match=message):
            activations.make_specimen(**given)
    with pytest.raises(UserError, match="has no split 'tets'; did you mean 'test'"):
        activations.make_specimen_from_run(finished[0], split="tets")
    with pytest.raises(UserError, match="unknown kernel_init 'xaver'"):
        activations.make_specimen_from_model("lenet5", "xaver")


@pytest.mark.slow
def test_the_command_with_a_config_and_with_a_network(tmp_path):
    out = tmp_path / "a.png"
    code, text, err = finish("visualize", "activations", "--model=lenet5", f"--out={out}")
    assert code == 0, err
    assert "64 images of N(0, 1), random labels" in text
    assert out.is_file()
    assert out.with_suffix(".csv").is_file()
    for flags, message in (
        (["--config=digits_lenet5", "--model=lenet5"], "expected one of --workdir=RUN"),
    ):
        code, _, err = finish("visualize", "activations", *flags)
        assert code == 2
        assert message in err
    code, _, err = finish("visualize", "filters", "--config=digits_lenet5")
    assert code == 2
    assert "filters takes no --config; activations would" in err
