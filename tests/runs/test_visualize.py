"""Pictures of what a network sees: of a run, and of published weights."""

from __future__ import annotations

import csv
import re

import flax.linen as nn
import jax
import numpy as np
import pytest
from PIL import Image

from flax_cnns import create_model, init_variables
from flax_cnns.analysis.explain import gradients
from flax_cnns.analysis.explain import quality as measures
from flax_cnns.analysis.explain.targets import make_target
from flax_cnns.analysis.plots import maps as plots
from flax_cnns.data.load import load_dataset
from flax_cnns.errors import UserError
from flax_cnns.runs import subject as subjects
from flax_cnns.runs.load import load_run
from flax_cnns.runs.visualize import channels, quality, saliency, units
from flax_cnns.runs.visualize.initialization import draw_initialization
from flax_cnns.runs.workdir import read_config
from flax_cnns.weights import preprocessing
from tests.test_scripts import finish
from tests.tiny_runs import ROOT


@pytest.fixture(scope="module")
def subject(finished):
    return subjects.make_subject_from_run(finished[0], count=3)


def test_the_images_of_a_run_are_its_test_images_and_the_logits_its_own(finished, subject):
    test = load_dataset(read_config(finished[0]).data).splits["test"]
    np.testing.assert_allclose(subject.pixels, test.images[:3] / 255, atol=1e-6)
    assert list(subject.names) == [f"image {n} ({k})" for n, k in enumerate(test.labels[:3])]
    loaded = load_run(finished[0])
    wanted = loaded.network.apply(
        loaded.variables, loaded.preprocessing(test.images[:3]), train=False
    )
    inputs = subject.normalize(subject.pixels)
    found = subject.model.apply(subject.variables, inputs, train=False)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_photos_take_the_place_of_test_images(finished, tmp_path):
    pixels = np.arange(1024, dtype=np.uint8).reshape(32, 32)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    found = subjects.make_subject_from_run(finished[0], photos=[str(tmp_path / "photo.png")])
    assert list(found.names) == ["photo.png"]
    np.testing.assert_allclose(found.pixels[0, ..., 0], pixels / 255, atol=2e-2)


def test_a_librarys_preprocessing_of_pixels_is_its_own(tmp_path):
    """`normalize(pixels)` is what `preprocessing(photo)` gives."""
    Image.effect_noise((260, 300), 80).convert("RGB").save(tmp_path / "noise.png")
    photo = tmp_path / "noise.png"
    for name, source in (("resnet50", "torchvision"), ("keras_resnet50", "keras")):
        row = preprocessing(name, source)
        plain = row._replace(mean=(0.0,), std=(255.0,), scale=1.0, channels="RGB")
        scaling = subjects.LibraryScaling(row.mean, row.std, row.scale, row.channels == "BGR")
        np.testing.assert_allclose(scaling(plain(photo)), row(photo), rtol=1e-4, atol=1e-4)


@pytest.fixture
def drawn(monkeypatch):
    """The arguments of the functions that draw."""
    calls = []
    for name in ("draw_saliency", "draw_tiles"):
        monkeypatch.setattr(plots, name, lambda *a, n=name, **k: calls.append((n, a, k)))
    return calls


def test_saliency_of_every_method(subject, drawn, tmp_path):
    others = ("guided_backprop", "deconvnet", "cam")  # LeNet has tanh and two dense layers
    methods = [name for name in saliency.METHODS if name not in (*others, "rise")]
    found = saliency.draw_saliency(subject, tmp_path / "x.png", methods=methods)
    ((_, (pixels, maps, names, _, title), _),) = drawn
    logits = subject.model.apply(subject.variables, subject.normalize(pixels), train=False)
    predicted = [str(k) for k in np.argmax(logits, 1)]
    assert found == predicted
    assert names == [f"{name}\nexplained: {k}" for name, k in zip(subject.names, predicted)]
    assert "lenet5 on digits" in title
    assert list(maps) == methods
    for name, each in maps.items():
        assert each.shape == (3, 32, 32), name
        assert (each >= 0).all(), name
        assert each.any(), name


@pytest.fixture(scope="module")
def measured(subject, tmp_path_factory):
    """(table, lines, picture) of two methods, one of which LeNet's tanh forbids."""
    lines: list[str] = []
    picture = tmp_path_factory.mktemp("quality") / "q.png"
    methods = ["guided_backprop", "gradient"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(quality, "POINTS", 3)
        monkeypatch.setattr(quality, "STEPS", 4)
        monkeypatch.setattr(quality, "_PRINT_EVERY", 0.0)
        table = quality.draw_quality(subject, picture, methods=methods, say=lines.append)
        yield table, lines, picture


def test_quality_of_methods_and_baselines(measured, subject):
    table, lines, picture = measured
    assert list(table.scores) == ["guided_backprop", "gradient", quality.EDGES, quality.RANDOM]
    assert table.layers[0] == "head"
    assert table.layers[-1] == "c1"
    found = table.scores["gradient"]
    images = subject.normalize(jax.numpy.asarray(subject.pixels))
    maps = saliency.METHODS["gradient"](
        subject, images, make_target(None, subject.model, subject.variables, images), None, None
    )
    wanted = measures.deletion(subject.model, subject.variables, images, maps, steps=4)
    np.testing.assert_allclose(found.values["deletion"], wanted, rtol=1e-5)
    key = jax.random.key(0)
    *_, (_, random) = measures.randomize(subject.model, subject.variables, images, key)
    given = (subject.model, random, images, table.targets)
    other = gradients.summarize_channels(gradients.gradient(*given))
    np.testing.assert_allclose(
        found.similarity[-1], measures.rank_correlation(maps, other), atol=1e-5
    )
    difference = found.values["road"] - table.scores[quality.EDGES].values["road"]
    assert table.compare("gradient", quality.EDGES, "road").mean == pytest.approx(difference.mean())
    # A method that a network forbids is one line and a row with the reason.
    assert "the activation tanh" in table.scores["guided_backprop"].reason
    assert any(line.startswith("guided_backprop: not measured") for line in lines)
    assert any(re.search(r"gradient: road; 7 of 13 parts, about \d+ s left", x) for x in lines)
    rows = list(csv.DictReader(picture.with_suffix(".csv").open()))
    kinds = [(row["method"], row["measure"]) for row in rows if row["method"] == "gradient"]
    assert [kind for _, kind in kinds] == [*["similarity"] * 3, *quality.MEASURES]
    row = next(row for row in rows if (row["method"], row["measure"]) == kinds[-1])
    assert float(row["minus_edges"]) == pytest.approx(difference.mean(), rel=1e-4)
    assert "tanh" in rows[0]["reason"]
    text = picture.with_suffix(".md").read_text()
    assert "| gradient | " in text
    assert "3 images" in text
    with Image.open(picture) as drawn:
        assert min(drawn.size) > 400
    assert sorted(path.name for path in picture.parent.iterdir()) == ["q.csv", "q.md", "q.png"]


def test_quality_goes_on_from_saved_methods(measured, subject, tmp_path, monkeypatch):
    table, *_ = measured
    folder, lines = tmp_path / "rows", []
    given = dict(folder=folder, say=lines.append)
    quality.measure_quality(subject, ["gradient"], **given)
    monkeypatch.setitem(saliency.METHODS, "gradient", None)  # would fail if it were called
    again = quality.measure_quality(subject, ["gradient"], **given)
    assert "already measured: gradient" in lines
    wanted = table.scores["gradient"]
    np.testing.assert_allclose(again.scores["gradient"].similarity, wanted.similarity)
    monkeypatch.setitem(saliency.METHODS, "gradient", lambda *a: np.ones((3, 32, 32)))
    changed = quality.measure_quality(subject, ["gradient"], seed=1, **given)
    assert np.isnan(changed.scores["gradient"].similarity).all()
    (folder / "gradient.json").write_text("{")
    quality.measure_quality(subject, ["gradient"], seed=1, **given)


def test_quality_removes_only_its_own_rows(tmp_path):
    for name in ("gradient.json", "row-0.npz"):  # the second is of a loss landscape
        (tmp_path / name).touch()
    quality._SavedScores(tmp_path, "").remove(["gradient", "grad_cam"])
    assert [path.name for path in tmp_path.iterdir()] == ["row-0.npz"]


@pytest.mark.parametrize(
    ("values", "beaten"),
    [
        ([0.3, 0.4, 0.5], ["insertion", "road"]),
        ([-0.3, -0.4, -0.5], ["deletion"]),
        ([0, 1, -1], []),
    ],
)
def test_a_method_beats_a_baseline_where_the_paired_interval_excludes_zero(values, beaten):
    zero = np.array([0.2, 0.9, 0.4])
    scores = {
        name: quality.MethodScores(np.zeros((0, 0)), dict.fromkeys(quality.MEASURES, found))
        for name, found in (("own", zero + values), (quality.EDGES, zero), (quality.RANDOM, zero))
    }
    table = quality.QualityTable("t", [], scores, np.zeros(3, int))
    assert table.find_beaten("own", quality.EDGES) == beaten
    row = quality.format_markdown(table).splitlines()[4]
    assert (", ".join(beaten) or "in nothing") in row


def test_features_and_filters(subject, drawn, tmp_path):
    assert channels.draw_features(subject, tmp_path / "x.png", "s2") == "s2"
    assert channels.draw_filters(subject, tmp_path / "y.png") == "c1/kernel"
    (_, (maps, _, _, title), _), (_, (filters, *_), how) = drawn
    assert len(maps) == 6
    assert maps[0].shape == (14, 14)
    assert "s2 of" in title
    kernel = subject.variables["params"]["c1"]["kernel"]
    np.testing.assert_array_equal(filters[2], kernel[:, :, 0, 2])
    assert how == {"signed": True}


def test_filters_are_those_of_the_convolution_that_is_called_first(drawn, tmp_path):
    class Depthwise(nn.Module):
        @nn.compact
        def __call__(self, images, *, train=False):
            x = nn.Conv(2, (3, 3), name="stem")(images)
            x = nn.Conv(2, (3, 3), feature_group_count=2, name="depthwise")(x)
            return nn.Dense(3, name="head")(x.mean((1, 2)))

    variables = Depthwise().init(jax.random.key(0), np.zeros((1, 8, 6, 1)))
    nothing = np.zeros((0, 8, 6, 1))
    given = ("own", Depthwise(), variables, nothing, [], lambda x: x, ["a"] * 3)
    assert channels.draw_filters(subjects.Subject(*given), tmp_path / "x.png") == "stem/kernel"


def test_filters_of_three_channels_are_colors(drawn, tmp_path):
    model = create_model("cifar_resnet20", depths=(1, 1, 1), widths=(4, 4, 4))
    variables = init_variables(model, jax.random.key(0))
    subject = subjects.Subject(
        "random", model, variables, np.zeros((0, 32, 32, 3)), [], lambda x: x, ["a"] * 10
    )
    assert channels.draw_filters(subject, tmp_path / "x.png") == "stem/conv/kernel"
    ((_, (tiles, *_), _),) = drawn
    assert tiles[0].shape == (3, 3, 3)
    assert 0 <= np.min(tiles) < np.max(tiles) <= 1
    with pytest.raises(UserError, match="expected at least one photo"):
        channels.draw_features(subject, tmp_path / "x.png")


@pytest.mark.parametrize(
    ("paths", "named", "given", "message"),
    [
        ("s2x", [0], {}, "no module 's2x'; did you mean 's2'"),
        (["c1", "s2"], [0, 6], {}, "unit 6 is out of range: 'c1' has 6"),
        ("", ["33"], {}, "no class '33'"),
        ("s2", ["3"], {}, "'s2' has numbered units, got '3'"),
        ("", [0], {"objective": "neuron"}, "the network's output has no maps"),
        ("", range(10), {"count": 7}, "10 units x 7 images do not fit"),
        ("s2", [0], {"directions": np.ones((2, 5))}, "6 channels, the direction has 5"),
        ("s2", [0], {"kind": "furier"}, "unknown parameters 'furier'; did you mean 'fourier'"),
    ],
)
def test_units_that_cannot_be_drawn_are_one_line(subject, tmp_path, paths, named, given, message):
    with pytest.raises(UserError, match=message):
        units.draw_units(subject, tmp_path / "x.png", paths, named, **given)


@pytest.mark.parametrize(("side", "octaves"), [(32, 1), (45, 2), (64, 3)])
def test_a_small_photo_is_dreamed_in_fewer_octaves(subject, side, octaves):
    assert units._choose_octaves(subject, (side, side, 1), "s2", tile=224) == octaves


def test_what_hardly_matters_is_faded():
    image, importance = np.full((2, 2, 3), 0.2), np.array([[0.0, 1.0], [2.0, 2.0]])
    faded = units.fade(image, importance)[..., 0]
    np.testing.assert_allclose(faded, [[1.0, 0.6], [0.2, 0.2]])


@pytest.mark.slow
def test_units_and_dreams_are_drawn(subject, drawn, tmp_path):
    said = []
    given = dict(steps=2, say=said.append)
    scores = units.draw_units(subject, tmp_path / "x.png", "s2", [0, 5], **given)
    assert len(scores) == 2
    assert [line.partition(":")[0] for line in said] == ["s2", "s2"]
    ((_, (tiles, labels, *_), _),) = drawn
    assert labels == ["unit 0", "unit 5"]
    assert tiles[0].shape == (32, 32, 1)
    rows = dict(count=2, diverse=1.0, **given)
    units.draw_units(subject, tmp_path / "x.png", ["s2", "s2"], [0], **rows)
    maco = dict(kind="maco", crops=2, size=40, **given)
    units.draw_units(subject, tmp_path / "x.png", "", ["3"], **maco)
    directions = np.eye(6, dtype=np.float32)[[5]]
    again = units.draw_units(subject, tmp_path / "x.png", "s2", [], directions=directions, **given)
    assert again == pytest.approx(scores[1:], rel=1e-4)
    (_, (_, labels, *_), how), (_, (faded, names, *_), _), (_, (_, _, *_), _) = drawn[1:]
    assert labels == ["s2 unit 0"] * 4
    assert how == {"columns": 2}
    assert names == ["3"]
    assert faded[0].shape == (40, 40, 1)
    units.draw_dream(subject, tmp_path / "y.png", "s2", steps=1, octaves=1)
    Image.new("L", (160, 80), 90).save(tmp_path / "photo.png")
    given = dict(photo=tmp_path / "photo.png", steps=1, octaves=1)
    units.draw_dream(subject, tmp_path / "z.jpg", "s2", **given)
    sizes = [Image.open(tmp_path / name).size for name in ("y.png", "z.jpg")]
    assert sizes == [(32, 32), (160, 80)]
    with pytest.raises(UserError, match="use a suffix such as"):
        units.draw_dream(subject, tmp_path / "z.what", "s2", steps=1, octaves=1)


def test_an_unknown_method_is_one_line(subject, tmp_path):
    with pytest.raises(UserError, match="unknown method 'gradcam'; did you mean 'grad_cam'"):
        saliency.draw_saliency(subject, tmp_path / "x.png", methods=["gradcam"])


def test_the_code_of_the_page_runs(finished):
    page = (ROOT / "docs/visualize.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.S)
    names: dict = {}
    exec(block.replace("runs/digits", str(finished[0])), names)
    shapes = [names[name].shape for name in ("maps", "heat", "gradient")]
    assert shapes == [(2, 14, 14, 6), (2, 5, 5), (2, 32, 32, 1)]


def test_pictures_are_written(tmp_path):
    pixels = np.linspace(0, 1, 2 * 8 * 8).reshape(2, 8, 8, 1)
    plots.draw_saliency(
        pixels, {"gradient": pixels[..., 0]}, ["a", "b"], tmp_path / "a.png", "title"
    )
    colors = np.random.default_rng(0).random((9, 5, 5, 3))
    plots.draw_tiles(list(colors), [str(i) for i in range(9)], tmp_path / "b.png")
    plots.draw_tiles([pixels[0] - 0.5], ["one"], tmp_path / "c.png", signed=True)
    for name in ("a", "b", "c"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert min(picture.size) > 60


@pytest.mark.slow
def test_the_command(finished, tmp_path):
    out = tmp_path / "map.png"
    flags = [f"--workdir={finished[0]}", "--methods=gradient", "--images=2", f"--out={out}"]
    code, text, err = finish("visualize", "saliency", *flags)
    assert code == 0, err
    assert f"written to {out}" in text
    assert out.is_file()
    code, _, err = finish("visualize", "dream", f"--workdir={finished[0]}")
    assert code == 2
    assert "expected --path" in err


def test_the_experiment_on_initial_weights_names_the_decks_error(tmp_path, capsys):
    found = draw_initialization(tmp_path / "x.png", layers=2, width=8, as_printed=True)
    text = capsys.readouterr().out
    assert "He as printed" in text
    assert "must be randn(Din, Dout) * np.sqrt(2 / Din)" in text
    assert "the standard deviation of the weights is 2 instead of 0.5" in text
    assert len(found) == 10
    with Image.open(tmp_path / "x.png") as picture:
        assert min(picture.size) > 60
