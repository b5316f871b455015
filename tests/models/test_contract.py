"""What every network promises, on a few small networks per family, and the count of every variant.

The networks are in networks.py, the counts in published.py. Each network is traced once per kind of
call, with the smallest images that it takes; nothing is compiled.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.extend.core
import jax.numpy as jnp
import pytest

from flax_cnns import tree as pytree
from flax_cnns.errors import UserError
from flax_cnns.models.registry import create_model, list_models, model_info
from tests.models.counting import count_params
from tests.models.networks import NETWORKS, Network
from tests.models.published import PUBLISHED, UNVERIFIED
from tests.models.shapes import FAMILY_OF, blank_model, cost_of

ROWS = {row.name: row for rows in NETWORKS.values() for row in rows}
# Fields that change no parameter; the options of a network must cover those that it has.
OPTIONS = {
    *("dropout", "aux_dropout", "input_dropout", "saf_rate", "drop_path", "shake_drop"),
    *("level", "scan", "remat", "momentum", "epsilon", "zero_init"),
}


def by_family(names: Iterable[str]) -> list[Any]:
    """Makes test parameters with ids that begin with the family.

    conftest.py sends them to the worker that runs the family's own tests.
    """
    return [pytest.param(name, id=f"{FAMILY_OF.get(name)}/{name}") for name in names]


every_network = pytest.mark.parametrize("name", by_family(ROWS))


class Call(NamedTuple):
    """A traced call: shapes of its results, and its program."""

    out: Any
    variables: Any  # after the call, by path, with what it sows
    program: Any  # the jaxpr


def small(row: Network, **fields: Any) -> nn.Module:
    """Makes a row's network with few layers, for its smallest images; kernels start at 0."""
    channels = create_model(row.name).input_size[-1]
    given = {"input_size": (row.smallest, row.smallest, channels), "num_classes": 5}
    return blank_model(row.name, **given | dict(row.fields) | fields)


def images_of(model: nn.Module, height: int = 0, width: int = 0, more: int = 0) -> Any:
    h, w, channels = model.input_size
    return jax.ShapeDtypeStruct((2, height or h, width or w, channels + more), jnp.float32)


def traced(function: Any, *args: Any) -> Call:
    program, (out, variables) = jax.make_jaxpr(function, return_shape=True)(*args)
    return Call(out, pytree.flatten(variables), program.jaxpr)


KEY = jax.eval_shape(lambda: jax.random.key(0))
STREAMS = {name: KEY for name in ("params", "dropout", "shared")}


@cache
def initialized(name: str) -> Call:
    """Initializes as a run does: one key, `train=False`."""
    model = small(ROWS[name])
    return traced(lambda key, x: model.init_with_output(key, x), KEY, images_of(model))


@cache
def trained(name: str) -> Call:
    """Initializes in training, in bfloat16 and with all options of the network turned on."""
    row = ROWS[name]
    model = small(row, dtype="bfloat16", **row.options)

    def run(rngs, x):
        return model.init_with_output(rngs, x, train=True)

    return traced(run, STREAMS, images_of(model))


@cache
def evaluated(name: str) -> Call:
    """Evaluates without a random stream."""
    model = small(ROWS[name])

    def run(variables, x):
        return model.apply(variables, x, mutable=["aux_logits", "batch_stats"])

    return traced(run, pytree.unflatten(initialized(name).variables), images_of(model))


def equations(jaxpr: Any) -> Iterator[Any]:
    """Yields all equations of a program and of its inner programs."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def is_random(jaxpr: Any) -> bool:
    """Returns whether a program draws random numbers, or calls back to Python."""
    names = {equation.primitive.name for equation in equations(jaxpr)}
    return any(re.match("random_|rng_|threefry", name) or "callback" in name for name in names)


def is_sown(path: str) -> bool:
    return path.startswith("aux_logits/")


def test_every_family_has_a_row():
    where = "tests/models/networks.py: expected"
    assert set(NETWORKS) == set(FAMILY_OF.values()), f"{where} exactly one entry per family"
    for family, rows in NETWORKS.items():
        assert {FAMILY_OF.get(row.name) for row in rows} == {family}, (
            f"{where} only networks of the family {family}"
        )
    classes = {(FAMILY_OF[name], type(create_model(name))) for name in FAMILY_OF}
    here = {(FAMILY_OF[name], type(create_model(name))) for name in ROWS}
    assert here == classes, f"{where} a network for each class of a family"


def test_every_variant_has_published_numbers():
    assert set(PUBLISHED) == set(list_models()), (
        "tests/models/published.py: expected one row per variant"
    )
    assert set(UNVERIFIED) < set(PUBLISHED)


@pytest.mark.parametrize("name", by_family(PUBLISHED))
def test_published_numbers(name):
    row = PUBLISHED[name]
    assert count_params(create_model(name)) == row.params, row.source


COUNTED = [name for name, row in PUBLISHED.items() if row.gmacs is not None]
CHEAPEST = {
    min(f, key=lambda n: PUBLISHED[n].gmacs)
    for f in ([n for n in COUNTED if FAMILY_OF[n] == family] for family in NETWORKS)
    if f
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            id=f"{FAMILY_OF[name]}/{name}",
            marks=[] if name in CHEAPEST else [pytest.mark.slow],
        )
        for name in COUNTED
    ],
)
def test_published_macs(name):
    """Traces the whole network."""
    row, whole = PUBLISHED[name], cost_of(name)
    assert whole.params == row.params, row.source
    source = row.gmacs_source or row.source
    assert whole.macs / 1e9 == pytest.approx(row.gmacs, rel=row.within), source


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", by_family([n for n in PUBLISHED if n not in COUNTED or n in CHEAPEST][::3])
)
def test_model_info_counts_what_is_published(name):
    """Traces every block of a third of the networks for which only `count_params` counted so far.

    `count_params` traces one block of each kind; `test_published_macs` traces the others whole.
    """
    assert model_info(name).params == PUBLISHED[name].params


@every_network
def test_a_row_says_what_can_be_changed_without_a_parameter_more(name):
    model, options = create_model(name), ROWS[name].options
    fields = {field.name for field in dataclasses.fields(model)} & OPTIONS
    assert fields <= set(options), f"tests/models/networks.py, {name}: expected options"
    kept = {field: value for field, value in options.items() if getattr(model, field) == value}
    assert not kept, f"tests/models/networks.py, {name}: options that change nothing"


@every_network
def test_logits_and_parameters_are_float32(name):
    """With the smallest images."""
    logits = evaluated(name).out
    assert (logits.shape, logits.dtype) == ((2, 5), jnp.float32)
    variables = initialized(name).variables
    assert {leaf.dtype for leaf in variables.values()} == {jnp.dtype("float32")}
    assert {path.partition("/")[0] for path in variables} <= {"params", "batch_stats"}


@every_network
def test_bfloat16_computes_and_leaves_logits_and_parameters_in_float32(name):
    call = trained(name)
    assert (call.out.shape, call.out.dtype) == ((2, 5), jnp.float32)
    wrong = [path for path, leaf in call.variables.items() if leaf.dtype != jnp.float32]
    assert not wrong
    products = [
        equation.outvars[0].aval.dtype
        for equation in equations(call.program)
        if re.match(r"conv\d|conv_general|dot_general", equation.primitive.name)
    ]
    assert products.count(jnp.bfloat16) > products.count(jnp.float32)  # only heads


@every_network
def test_training_and_options_change_no_parameter(name):
    kept = {path: leaf for path, leaf in trained(name).variables.items() if not is_sown(path)}
    assert kept == initialized(name).variables


@every_network
def test_auxiliary_heads_act_in_training_only(name):
    heads = ROWS[name].aux
    sown = {path: leaf for path, leaf in trained(name).variables.items() if is_sown(path)}
    assert set(sown) == {f"aux_logits/{head}/logits/0" for head in heads}
    assert {(leaf.shape, leaf.dtype) for leaf in sown.values()} <= {((2, 5), jnp.dtype("float32"))}
    assert not any(is_sown(path) for path in evaluated(name).variables)
    built = {path.split("/")[1] for path in initialized(name).variables}
    assert {module for module in built if module.startswith("aux")} == set(heads)


@every_network
def test_evaluation_is_deterministic(name):
    """Draws nothing, needs no random stream, and returns the statistics unchanged."""
    program = evaluated(name).program
    assert not is_random(program)
    _, *after = program.outvars
    assert set(after) <= set(program.invars)


def test_a_program_that_draws_is_seen():
    drop = nn.Dropout(0.5, deterministic=False)
    call = traced(lambda key, x: (drop.apply({}, x, rngs={"dropout": key}), {}), KEY, jnp.ones(3))
    assert is_random(call.program)


@every_network
def test_without_classes_it_gives_features(name):
    model = small(ROWS[name], num_classes=None)
    call = traced(lambda key, x: model.init_with_output(key, x), KEY, images_of(model))
    assert (call.out.shape, call.out.dtype) == ((2, ROWS[name].features), jnp.float32)
    body = re.compile(r"(?!\w+/(head|aux))")
    whole = initialized(name).variables
    assert call.variables == {path: leaf for path, leaf in whole.items() if body.match(path)}


@every_network
def test_images_that_it_cannot_take(name):
    model, smallest = small(ROWS[name]), ROWS[name].smallest
    variables = pytree.unflatten(initialized(name).variables)
    evaluate = partial(jax.eval_shape, model.apply, variables)
    channels = model.input_size[-1]
    message = f"expected images of {channels} channels, got {channels + 1}"
    with pytest.raises(UserError, match=message):
        evaluate(images_of(model, more=1))
    message = f"too small: the smallest is {smallest}x{smallest}|expected images of {smallest}x"
    for shorter in (dict(height=smallest - 1), dict(width=smallest - 1)) if smallest > 1 else ():
        with pytest.raises(UserError, match=message):
            evaluate(images_of(model, **shorter))
