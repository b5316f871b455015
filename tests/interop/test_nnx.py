"""Networks as NNX modules: numbers of one network per group, and conversion both ways."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze

from flax_cnns import create_model
from flax_cnns import tree as pytree
from flax_cnns.errors import UserError
from flax_cnns.interop.nnx import pop_aux_logits, to_linen, to_nnx, to_state
from flax_cnns.models.registry import init_variables
from tests import nnx as beside
from tests.models.shapes import blank_model


class Case(NamedTuple):
    fields: dict[str, Any]
    draws: bool = True  # whether training depends on the keys
    heads: int = 0


TABLE = (("mixed4a", (4, 4, 4, 4, 4, 4)), ("mixed4d", (4, 4, 4, 4, 4, 4)))
CASES = {
    "lenet5": Case(dict(), draws=False),
    # Blocks are scanned, and skipped by the stream "shared".
    "cifar_resnet20": Case(dict(depths=(3,), widths=(4,), drop_path=0.5, scan=True)),
    "googlenet_tv_aux": Case(dict(table=TABLE, input_size=(16, 16, 3), dropout=0.5), heads=2),
    "densenet_40_12": Case(dict(depth=7, growth_rate=4, dropout=0.3)),
    "shakeshake_26_2x32d": Case(dict(depths=(1,), width=4, level="batch")),
    "vit_tiny_patch16_224": Case(
        dict(patch=8, width=8, heads=2, depth=3, scan=True, dropout=0.3, drop_path=0.5)
    ),
    "convnext_atto": Case(dict(depths=(1, 3), width=8, scan=True, drop_path=0.5)),
}
QUICK = ("lenet5", "cifar_resnet20")


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in CASES
        if name != "googlenet_tv_aux"  # the test below compares its program
    ],
)
def test_the_numbers_are_those_of_linen(name):
    """Logits, loss, gradients and new statistics are bit-identical: the programs are the same."""
    case = CASES[name]
    model = create_model(name, **dict(input_size=(16, 16, 3), num_classes=3) | case.fields)
    if name == "lenet5":
        model = create_model(name, num_classes=3)
    variables = init_variables(model, jax.random.key(0))
    random = np.random.default_rng(0)  # zeros in heads and branches would hide random draws
    add_noise = lambda leaf: leaf + random.normal(0, 0.1, leaf.shape).astype(np.float32)  # noqa: E731
    variables = variables | {"params": jax.tree.map(add_noise, variables["params"])}
    images = jax.random.normal(jax.random.key(1), (4, *model.input_size))
    args = variables, beside.make_keys(), images
    linen, through_nnx = (
        jax.jit(partial(run, model), compiler_options={"xla_backend_optimization_level": 0})
        for run in (beside.run_linen, beside.run_nnx)
    )
    expected, found = linen(*args), through_nnx(*args)
    assert len(found["heads"]) == case.heads
    chex.assert_trees_all_equal(found, expected)
    before, after = (pytree.flatten(tree["batch_stats"]) for tree in (variables, found))
    stay = {path for path in before if (before[path] == after[path]).all()}
    assert len(stay) <= len(before) / 2  # statistics of skipped blocks
    again = [
        float(through_nnx(variables, beside.make_keys(seed), images)["loss"]) for seed in (1, 2)
    ]
    assert (len({*again, float(found["loss"])}) > 1) == case.draws


def test_auxiliary_heads_trace_to_the_program_of_linen():
    name = "googlenet_tv_aux"
    model = blank_model(name, num_classes=3, **CASES[name].fields | dict(table=TABLE[:1]))
    shapes = jax.eval_shape(partial(init_variables, model), jax.random.key(0))
    args = model, shapes, beside.make_keys(), jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
    linen, through_nnx = (beside.trace(run, *args) for run in (beside.run_linen, beside.run_nnx))
    assert linen == through_nnx
    assert {path for path in linen[1] if path.startswith("heads/")} == {"heads/0"}


@pytest.mark.slow
def test_the_command_for_all_networks_sees_another_program(monkeypatch, capsys):
    assert beside.main(["lenet5"]) == 0
    assert "same     0.0e+00" in capsys.readouterr().out
    negative = lambda model, variables, *args: beside.run_linen(  # noqa: E731
        model, jax.tree.map(jnp.negative, variables), *args
    )
    monkeypatch.setattr(beside, "run_nnx", negative)
    assert beside.main(["lenet5"]) == 1
    assert "ANOTHER" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        beside.main(["lenet"])
    assert "unknown model 'lenet'; did you mean 'lenet5'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def variables():
    """A network that scans gives NumPy arrays of named blocks, as in a checkpoint."""
    shapes = jax.eval_shape(lambda: init_variables(network(), jax.random.key(0)))
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), shapes)


def network(**fields):
    given = dict(depths=(3,), widths=(4,), input_size=(8, 8, 3), num_classes=3, scan=True)
    return blank_model("cifar_resnet20", **given | fields)


def same(ours, theirs):
    chex.assert_trees_all_equal(ours, theirs)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(ours))


def test_values_go_in_and_come_out_to_the_bit(variables):
    module = to_nnx(network(), variables)
    same(to_linen(module), variables)
    same(to_linen(to_state(variables)), variables)
    kernel = module.stage1["block2"]["conv1"]["kernel"]
    assert isinstance(kernel, nnx.Param)
    assert isinstance(module.stem["norm"]["mean"], nnx.BatchStat)
    # The module has copies: the NumPy arrays may change.
    array = np.ones(4, np.float32)
    state = to_state({"params": {"scale": array}})
    array[:] = 2
    assert to_linen(state) == {"params": {"scale": pytest.approx(np.ones(4))}, "batch_stats": {}}


def test_a_module_holds_named_blocks_and_takes_stacks(variables):
    stacked = pytree.stack_blocks(variables)
    assert "block2-3" in stacked["params"]["stage1"]
    for given in (stacked, freeze(variables)):
        same(to_linen(to_nnx(network(), given)), variables)
    # In training, too, statistics are under the names of blocks.
    images = jnp.zeros((2, 8, 8, 3))

    def train(variables):
        module = to_nnx(network(), variables)
        module(images, train=True, mutable=["batch_stats"])
        return to_linen(module)

    assert jax.eval_shape(train, stacked) == jax.eval_shape(
        lambda: jax.tree.map(jnp.asarray, variables)
    )


def test_a_state_updates_a_module(variables):
    module = to_nnx(network(), jax.tree.map(np.zeros_like, variables))
    state = to_state(variables)
    expected = nnx.state(module, (nnx.Param, nnx.BatchStat))
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    nnx.update(module, state)
    same(to_linen(module), variables)
    same(to_linen(nnx.state(module, nnx.Param))["params"], variables["params"])


class Grafted(nnx.Module):
    def __init__(self, variables, rngs):
        headless = {"params": {k: v for k, v in variables["params"].items() if k != "head"}}
        self.body = to_nnx(network(num_classes=None), variables | headless)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, images, **options):
        return self.head(self.body(images, **options))


def test_a_network_inside_a_module_of_ones_own(variables):
    module = Grafted(variables, nnx.Rngs(0))
    assert jax.eval_shape(module, jnp.zeros((2, 8, 8, 3))).shape == (2, 2)
    found = to_linen(module)
    assert set(found) == {"params", "batch_stats"}
    assert set(found["params"]) == {"body", "head"}
    same(found["batch_stats"], {"body": variables["batch_stats"]})


def test_keys_and_what_was_sown_stay_outside(variables):
    module = to_nnx(network(), variables, nnx.Rngs(dropout=0, shared=1))
    kind = nnx.variable_type_from_name("aux_logits", allow_register=True)
    module.aux1 = nnx.data({"logits": kind((jnp.ones((2, 3)),))})
    same(to_linen(module), variables)
    (logits,) = pop_aux_logits(module)
    assert logits.shape == (2, 3)
    assert pop_aux_logits(module) == []
    assert set(to_linen(to_state(variables | {"mine": {"a": np.ones(2)}}))) == {*variables, "mine"}


def test_a_loop_of_nnx_learns_and_moves(variables):
    """As in docs/extending.md, traced: the optimizer takes the module and changes only params."""
    module = to_nnx(network(drop_path=0.5), variables, nnx.Rngs(shared=0))
    optimizer = nnx.Optimizer(module, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)

    @nnx.jit
    def step(module, optimizer, images):
        loss = lambda module: jnp.square(  # noqa: E731
            module(images, train=True, mutable=["batch_stats"])
        ).mean()
        value, grads = nnx.value_and_grad(loss)(module)
        optimizer.update(module, grads)
        return value

    shape = nnx.eval_shape(step, module, optimizer, jnp.zeros((2, 8, 8, 3)))
    assert shape.shape == ()


def test_what_is_refused(variables):
    with pytest.raises(UserError, match=r'expected \{"params": .*\}, got \[\'stem\'\]'):
        to_nnx(network(), {"stem": {}})
    with pytest.raises(
        UserError, match=r"expected nnx.Rngs\(dropout=0, shared=1\) or None, got int"
    ):
        to_nnx(network(), variables, 0)
    images = jnp.zeros((2, 8, 8, 3))
    module = to_nnx(network(drop_path=0.5), variables, nnx.Rngs(0))
    with pytest.raises(UserError, match=r'rngs=\{"shared": key\}'):
        module(images, train=True, mutable=["batch_stats"])
    with pytest.raises(UserError, match=r'norm: expected .*mutable=\["batch_stats"\]'):
        to_nnx(network(), variables)(images, train=True)
