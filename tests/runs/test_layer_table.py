"""`inspect --cost` and `compare --chart`: tables of layers and charts of networks."""

from __future__ import annotations

import csv

import flax.linen as nn
import pytest
from PIL import Image

from flax_cnns.analysis.plots.accuracy_chart import ChartPoint, make_accuracy_chart
from flax_cnns.errors import UserError
from flax_cnns.names import make_console
from flax_cnns.runs import accuracy_chart, layer_table
from tests.models.foreign import builders
from tests.test_scripts import finish
from tests.tiny_runs import ROOT


class Own(nn.Module):
    """A network without the field input_size."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), name="conv")(x)
        x = nn.ConvTranspose(4, (2, 2), strides=(2, 2), name="up")(x)
        return nn.Dense(2, name="head")(x.mean((1, 2)))


def _text(table, title, capsys):
    layer_table.print_layer_table(table, title, console=make_console(width=160))
    return capsys.readouterr().out


def test_the_table_of_a_run_has_its_image_size(finished, capsys, tmp_path):
    network = layer_table.find_network_of_run(f"{finished[0]}@best")
    assert network.image_shape == (32, 32, 1)
    table = layer_table.make_layer_table(network, batch=2)
    lines = _text(table, network.title, capsys).splitlines()
    assert "on digits" in lines[0] or "lenet5" in lines[0]
    assert lines[1].split()[:3] == ["layer", "kind", "output"]
    assert lines[2].split() == [
        "images",
        "input",
        "[2",
        "32",
        "32",
        "1]",
        "-",
        "-",
        "2,048",
        "8.2",
        "kB",
        "1",
        "1",
    ]
    assert lines[3].split()[:2] == ["c1", "Conv"]
    assert lines[3].split()[-2:] == ["5", "1"]
    assert lines[-1].split()[0] == "total"
    layer_table.write_layer_table(table, tmp_path / "layers.csv")
    rows = list(csv.DictReader((tmp_path / "layers.csv").open()))
    assert [row["layer"] for row in rows] == [row.path for row in table.rows]
    c1 = rows[1]
    assert (c1["output"], c1["parameters"], c1["bytes"]) == ("2x28x28x6", "156", "37632")
    assert [c1[f"receptive_{side}"] for side in ("height", "width")] == ["5", "5"]
    assert [c1[f"start_{side}"] for side in ("height", "width")] == ["0", "0"]
    assert rows[-1]["receptive_height"] == ""


def test_own_networks_need_trust_and_a_size(capsys):
    name = f"{__name__}:Own"
    with pytest.raises(UserError, match="--trust"):
        layer_table.find_network(name, "8x12")
    with pytest.raises(UserError, match="give --size=HEIGHTxWIDTH"):
        layer_table.find_network(name, trust=True)
    network = layer_table.find_network(name, "8x12", trust=True)
    assert network.image_shape == (8, 12, 3)
    text = _text(layer_table.make_layer_table(network), network.title, capsys)
    assert "?: the receptive field is not known behind a transposed convolution" in text


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("vgg61", "", "unknown model 'vgg61'; did you mean 'vgg19', 'vgg16'"),
        ("vgg16", "12by12", "--size: expected SIDE or HEIGHTxWIDTH in pixels, got '12by12'"),
        ("vgg16", "0x12", "--size: expected"),
        ("no.such.module:Name", "", "no.such"),
    ],
)
def test_wrong_networks_and_sizes(name, size, message):
    with pytest.raises(UserError, match=message):
        layer_table.find_network(name, size, trust=True)


def test_images_that_are_too_small():
    network = layer_table.find_network("lenet5", "4")
    with pytest.raises(UserError, match="images of 4x4 are too small: the smallest is 32x32"):
        layer_table.make_layer_table(network)


def test_a_csv_of_networks_gets_what_it_lacks(tmp_path, capsys):
    path = tmp_path / "networks.csv"
    path.write_text(
        "network,accuracy,family,params,macs,size,label\n"
        "lenet5,99.1,old,,,,\n"
        "lenet5,99.3,old,,,64,LeNet on 64 pixels\n"
        "somebody's net,95,,1000,2e6,,\n"
    )
    first, second, third = accuracy_chart.read_networks(path)
    assert first == ChartPoint("lenet5", 99.1, 416_520, 61_706, "old")
    assert (second.label, second.params) == ("LeNet on 64 pixels", 61_706)
    assert second.macs > 4 * first.macs
    assert third == ChartPoint("somebody's net", 95.0, 2e6, 1000, "")
    accuracy_chart.draw_chart(path, tmp_path / "chart.png", "Digits")
    assert Image.open(tmp_path / "chart.png").size > (600, 400)
    assert "counting the operations of lenet5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("network,acuracy\nlenet5,99\n", "unknown column 'acuracy'; did you mean 'accuracy'"),
        ("network,family\nlenet5,a\n", "expected the column 'accuracy'"),
        ("network,accuracy\n", "at least one network"),
        (
            "network,accuracy\nlenet55,99\n",
            "line 2: unknown model 'lenet55'; did you mean 'lenet5'",
        ),
        ("network,accuracy\nlenet5,high\n", "line 2: accuracy: expected a number above 0"),
        ("network,accuracy\nlenet5,100.5\n", "expected percent"),
        ("network,accuracy\nlenet5,99,x\n", "more values than the first line"),
    ],
)
def test_faults_of_a_csv_are_named(tmp_path, text, message):
    path = tmp_path / "networks.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        accuracy_chart.read_networks(path)
    with pytest.raises(UserError, match="cannot read"):
        accuracy_chart.read_networks(tmp_path / "none.csv")


def test_labels_of_crowded_networks_do_not_overlap():
    points = [
        ChartPoint(f"network_number_{i}", 70 + 0.3 * i, 1e9 * (4 + i % 5), 1e6 * (1 + 5 * i), "f")
        for i in range(10)
    ]
    figure = make_accuracy_chart(points, "Crowded")
    figure.canvas.draw()
    (axes,) = figure.axes
    boxes = [text.get_window_extent() for text in axes.texts]
    frame = axes.get_window_extent()
    assert len(boxes) == 10
    assert not [1 for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)


@pytest.mark.oracle
def test_the_committed_accuracies_are_torchvisions():
    pytest.importorskip("torch")
    models = builders.torchvision().models
    with open(ROOT / "experiments/results/imagenet_top1.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if "torchvision" in row["source"]]
    assert len(rows) > 25
    for row in rows:
        weights = models.get_model_weights(row["network"]).IMAGENET1K_V1
        assert weights.meta["_metrics"]["ImageNet-1K"]["acc@1"] == float(row["accuracy"])


@pytest.mark.slow
def test_the_commands(tmp_path):
    code, out, err = finish("inspect", "--model=lenet5", "--cost", "--depth=1")
    assert (code, err) == (0, "")
    assert "61,706" in out
    (tmp_path / "networks.csv").write_text("network,accuracy\nlenet5,99\n")
    png = tmp_path / "chart.png"
    code, out, err = finish("compare", f"--chart={tmp_path}/networks.csv", f"--out={png}")
    assert (code, err) == (0, "")
    assert png.exists()
    for flags, message in (
        (["inspect", "--model=lenet5"], "--model needs --cost"),
        (["compare", "run", "--chart=networks.csv"], "got the run 'run' too"),
    ):
        code, out, err = finish(*flags)
        assert (code, err.count("\n")) == (2, 1), err
        assert message in err
