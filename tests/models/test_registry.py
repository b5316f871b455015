"""Networks by name: near misses, merged tables, and fast initialization with correct values."""

from __future__ import annotations

import dataclasses
import itertools
import typing
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_cnns
from experiments.benchmarks import learning
from flax_cnns.errors import UserError
from flax_cnns.models import registry
from flax_cnns.models.fields import check_values
from flax_cnns.models.registry import create_model, init_variables, list_models, model_info
from tests.models.published import PUBLISHED


def test_the_public_face_is_the_registry():
    assert flax_cnns.create_model is create_model
    assert flax_cnns.list_models is list_models
    assert flax_cnns.weights.convert.__module__ == "flax_cnns.weights"
    assert all(hasattr(flax_cnns, name) for name in flax_cnns.__all__)
    with pytest.raises(AttributeError, match="no attribute 'create_modle'"):
        _ = flax_cnns.create_modle


def test_list_models_by_pattern():
    assert list_models("lenet5") == ["lenet5"]
    assert "lenet5" in list_models("lenet*")
    assert len(list_models()) == len(set(list_models())) > 300
    assert list_models("nothing*") == []


def test_list_models_sorts_numbers_as_numbers():
    assert list_models("resnet???") == ["resnet18d", "resnet34d", "resnet50d", *_LARGE_RESNETS]
    assert list_models("pyramidnet_110_a*[48]") == ["pyramidnet_110_a48", "pyramidnet_110_a84"]


_LARGE_RESNETS = ["resnet101", "resnet152", "resnet200"]


def test_every_file_with_variants_is_registered():
    files = Path(registry.__file__).parent.glob("*.py")
    families = {file.stem for file in files if "\nVARIANTS = " in file.read_text()}
    registered = {family.__name__.rpartition(".")[2] for family in registry.FAMILIES}
    assert not families - registered, "flax_cnns/models/registry.py: expected a name in FAMILIES"


@pytest.mark.parametrize("name", list_models())
def test_every_model_has_its_info(name, monkeypatch):
    """Checks all fields except `params`, which would need a trace; test_contract.py checks them."""
    monkeypatch.setattr(registry, "init_variables", lambda *_: {"params": {}})
    info = model_info.__wrapped__(name)  # without its cache
    assert info.name == name
    assert name in __import__(f"flax_cnns.models.{info.family}", fromlist=["x"]).VARIANTS
    assert info.paper.title
    assert info.paper.authors
    assert 1980 < info.paper.year < 2100
    assert info.paper.url == "" or info.paper.url.startswith("http")  # lecture slides have none
    assert len(info.input_size) == 3
    assert info.num_classes >= 10
    model = create_model(name)
    assert model.input_size == info.input_size
    assert {"num_classes", "input_size", "dtype", "param_dtype", "axis_name"} <= set(vars(model))


@pytest.mark.parametrize("name", ["lenet5", "cifar_resnet20", "dsn", "convnext_atto"])
def test_model_info(name):
    """A slow test in test_contract.py checks all networks."""
    info = model_info(name)
    family = import_module(f"flax_cnns.models.{info.family}")
    assert (info.paper, info.params) == (family.PAPER, PUBLISHED[name].params)
    assert info.sources == getattr(family, "SOURCES", {}).get(name, ())


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("wrn_16_4", dict(dropout=1.5), "dropout must be a number from 0 to below 1, got 1.5"),
        ("cifar_resnet20", dict(drop_path="0.5"), "drop_path must be a number from 0 to below 1"),
        ("fractalnet_20", dict(dropout=0.5), "dropout must be a sequence, each a number"),
        (
            "fractalnet_20",
            dict(dropout=(float("nan"),)),
            "dropout must be a sequence, each a number",
        ),
        (
            "simpnet_5m",
            dict(dropout=3),
            "must be a number from 0 to below 1, or a sequence",
        ),
        ("simpnet_5m", dict(dropout=(0.1, float("nan"))), "below 1, or a sequence, each a number"),
        (
            "simpnet_5m",
            dict(saf_rate=float("nan")),
            "saf_rate must be a number from 0 to below 1",
        ),
        (
            "densenet121",
            dict(growth_rate=0),
            "must be a whole number above 0, or a seq",
        ),
        ("fractalnet_20", dict(columns=0), "columns must be a whole number above 0, got 0"),
        (
            "cifar_resnet20",
            dict(depths=(0, 1)),
            "depths must be a sequence, each a whole number",
        ),
        ("wrn_16_4", dict(width_mult=0.5), "width_mult must be a whole number above 0, got 0.5"),
        ("resnet50", dict(scan=1), "scan must be True or False, got 1"),
        ("resnet50", dict(norm=None), "norm must be a string, got None"),
        ("mobilenet_v2", dict(width_mult=0), "width_mult must be a number above 0, got 0"),
        (
            "mobilenet_v2",
            dict(momentum=2.0),
            "must be a number from 0 to below 1, got 2.0",
        ),
        (
            "efficientnet_b0",
            dict(epsilon=float("nan")),
            "must be a number above 0, got nan",
        ),
        ("efficientnet_b0", dict(activation="relu"), "activation must be a function or a module"),
        ("mobilenet_v1_100", dict(depths=(1, 2)), "expected a depth and a width for each stage"),
        ("nasnet_a_mobile", dict(aux=-1), "aux must be a whole number above 0, got -1"),
        (
            "nasnet_a_mobile",
            dict(stem_cells=-1),
            "a whole number of at least 0, got -1",
        ),
        ("nasnet_a_mobile", dict(zero_pools=("mx",)), "zero_pools may hold 'max' and 'mean'"),
        (
            "densenet121",
            dict(compression=2.0),
            "compression must be above 0 and at most 1, got 2.0",
        ),
        ("resnext50_32x4d", dict(width=8), "32 groups do not divide the 0 channels"),
        ("legacy_senet154", dict(width=16), "64 groups do not divide the 32 channels"),
        ("cifar_preact110", dict(depths=(1, 1)), "expected a depth and a width for each stage"),
    ],
)
def test_fields_that_make_no_sense(name, fields, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(lambda: init_variables(create_model(name, **fields), jax.random.key(0)))


SENSELESS = (-1, 2**63, float("nan"), float("inf"), 10**400, "x", None, [], (), True, 1.5, [1, "x"])
SENSELESS += (object(), {}, [[1], [None]], [2**63] * 3, b"x")


@pytest.mark.parametrize("name", ["densenet121", "nin_cifar10", "mobilenet_v2", "simpnet_5m"])
def test_any_value_of_any_field_is_taken_or_refused_in_one_line(name):
    refused = []
    known = {field.name for field in dataclasses.fields(create_model(name))} - {"name", "parent"}
    for field, value in itertools.product(known, SENSELESS):
        try:
            hash(create_model(name, **{field: value}))
        except UserError as error:
            refused.append((field, str(error)))
    assert {field for field, _ in refused} == known
    assert all(field in line and "\n" not in line for field, line in refused)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("pyramidnet_110_a48", dict(depth=2**63), "number above 0, at most 100,000, got 92233"),
        ("simpnet_5m", dict(saf_rate=[0.1, 1.0, 0.2]), "each a number from 0 to below 1, got"),
        (
            "cifar_resnet20",
            dict(depths=()),
            "must be a sequence of one or more, each a whole",
        ),
        ("googlenet", dict(table=[["a", [1, -1]]]), "each a whole number above 0"),
        ("mobilenet_v2", dict(table=[[1, 16, 1]]), r"each Row\(expansion, width, depth, stride\)"),
        (
            "squeezenet1_1",
            dict(conv1=(64, 3, 0, 0)),
            r"must be \(a whole number above 0, a whole",
        ),
    ],
)
def test_values_inside_sequences_are_checked(name, fields, message):
    with pytest.raises(UserError, match=message):
        create_model(name, **fields)


@pytest.mark.parametrize("hint", [tuple, Sequence, typing.Tuple, typing.Sequence])  # noqa: UP006
def test_a_bare_sequence_holds_anything(hint):
    """Annotations that name no type of elements, in networks of the user's own."""
    network = type("Own", (), {"__annotations__": {"sizes": hint, "options": tuple[dict, ...]}})
    assert check_values("Own", network, {"sizes": [1, "a"]}) == {"sizes": (1, "a")}
    with pytest.raises(UserError, match=r"^Own: sizes must be a sequence, got 3$"):
        check_values("Own", network, {"sizes": 3})
    with pytest.raises(UserError, match=r"^Own: options must be a sequence, each a value of dict"):
        check_values("Own", network, {"options": 3})


def test_rows_of_a_table_may_come_from_json():
    model = create_model("mobilenet_v2", table=[[1, 16, 1, 1], [6, 24, 2, 2]])
    assert model.table[1].width == 24
    hash(model)


def test_what_may_be_absent():
    model = create_model("pnasnet5large", depths=(1, 0), width=16, stem_width=16)
    assert model.depths == (1, 0)
    assert create_model("all_cnn_c", last_padding=0).last_padding == 0
    assert create_model("vgg16", num_classes=None).num_classes is None


def test_every_learning_case_is_a_network_of_ours():
    for name, case in learning.CASES.items():
        create_model(name, **case.fields)


def test_unknown_names_get_the_near_miss():
    with pytest.raises(UserError, match=r"unknown model 'resnet5'; did you mean .*'resnet50'"):
        create_model("resnet5")
    with pytest.raises(UserError, match="unknown model 'lenet'; did you mean 'lenet5'"):
        model_info("lenet")
    with pytest.raises(
        UserError,
        match=r"no field 'num_clases'; did you mean 'num_classes'\? \(it .*axis_name",
    ):
        create_model("resnet18", num_clases=10)
    with pytest.raises(UserError, match="lenet5 has no field 'depth_of_field'; it takes axis_name"):
        create_model("lenet5", depth_of_field=1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(dtype="bfloat61"), "unknown dtype 'bfloat61'; did you mean 'bfloat16'"),
        (dict(dtype="int8"), "unknown dtype 'int8'"),
        (dict(param_dtype=3.0), "unknown param_dtype 3.0"),
        (dict(num_classes=0), "num_classes must be a positive number or None, got 0"),
        (dict(num_classes=10.0), "num_classes must be a positive number or None, got 10.0"),
        (
            dict(input_size=(32, 32)),
            r"must be \(height, width, channels\), got \(32, 32\)",
        ),
        (dict(input_size=32), r"input_size must be \(height, width, channels\), got 32"),
    ],
)
def test_senseless_values(fields, message):
    with pytest.raises(UserError, match=message):
        create_model("resnet18", **fields)


def test_fields_may_come_from_json():
    model = create_model("cifar_resnet20", depths=[1, 1, 1], input_size=[8, 8, 3], dtype="bfloat16")
    assert model.depths == (1, 1, 1)
    assert model.input_size == (8, 8, 3)
    assert model.dtype == jnp.bfloat16 == create_model("lenet5", dtype=jnp.bfloat16).dtype
    hash(model)


def test_init_is_another_name_of_kernel_init():
    """It cannot be a field, since `init` is a method of every linen module."""
    assert create_model("resnet18", init="lecun").kernel_init == "lecun"
    paper = create_model("resnet18", init="paper", depths=(1,), width=2, num_classes=None)
    init_variables(paper, jax.random.key(0), (1, 8, 8, 3))
    with pytest.raises(UserError, match="unknown kernel_init 'papre'; did you mean 'paper'"):
        init_variables(paper.clone(kernel_init="papre"), jax.random.key(0), (1, 8, 8, 3))


def test_a_name_in_two_families_is_refused():
    one = SimpleNamespace(__name__="one", VARIANTS={"net": partial(nn.Dense)})
    two = SimpleNamespace(__name__="two", VARIANTS={"net": partial(nn.Dense)})
    with pytest.raises(ValueError, match="'net' is in one and two"):
        registry.merge_variants([one, two])


_SMALL = dict(depths=(1, 1, 1), widths=(4, 4, 8), input_size=(8, 8, 3))


@pytest.mark.parametrize(
    ("name", "fields", "most"),
    [("lenet5", {}, 1000), ("cifar_resnet20", _SMALL, 1000), ("cifar_resnet20", _SMALL, 0)],
)
def test_init_variables_gives_the_values_of_init(name, fields, most, monkeypatch):
    monkeypatch.setattr(registry, "MAX_FUSED_LEAVES", most)
    model = create_model(name, **fields)
    expected = model.init(jax.random.key(3), jnp.zeros((1, *model.input_size)))
    ours = init_variables(model, jax.random.key(3))
    assert set(ours) == {"params", "batch_stats"}
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(close, {"batch_stats": {}, **expected}, ours)


class Sower(nn.Module):
    """A network that sows variables that do not belong to its state."""

    input_size: tuple[int, int, int] = (4, 4, 1)

    @nn.compact
    def __call__(self, images, *, train=False):
        x = nn.Dense(2, name="head")(images.mean((1, 2)))
        self.sow("aux_logits", "aux", x)
        self.sow("intermediates", "x", x)
        return x


def test_init_variables_leaves_out_what_is_sown():
    variables = init_variables(Sower(), jax.random.key(0), (2, 4, 4, 5))
    assert set(variables) == {"params", "batch_stats"}
    assert variables["params"]["head"]["kernel"].shape == (5, 2)


class Boxed(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        start = nn.with_partitioning(nn.initializers.ones, (None, "model"))
        return nn.Dense(2, kernel_init=start)(x)


def test_init_variables_opens_boxes():
    variables = init_variables(Boxed(), jax.random.key(0), (1, 3))
    assert variables["params"]["Dense_0"]["kernel"].shape == (3, 2)


def test_init_variables_under_eval_shape():
    model = create_model("resnet152")
    shapes = jax.eval_shape(lambda key: init_variables(model, key), jax.random.key(0))
    assert shapes["params"]["head"]["kernel"].shape == (2048, 1000)
