from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.common import get_config
from flax_cnns import create_model
from flax_cnns import tree as pytree
from flax_cnns.analysis.cost import cost
from flax_cnns.errors import UserError
from flax_cnns.train import optimizers, schedules
from flax_cnns.weights import convert
from tests.models import foreign

PARAMS = {
    "stem": {"kernel": jnp.array([1.0, -2.0]), "bias": jnp.array([0.5])},
    "head": {"kernel": jnp.array([3.0]), "bias": jnp.array([-1.0])},
}
GRADS = jax.tree.map(lambda w: 0.1 * w + 0.3, PARAMS)


def make(rate=0.1, params=PARAMS, **fields):
    config = get_config().optimizer
    config.momentum = 0.9
    config.update(fields)
    return optimizers.make_optimizer(config, params, schedules.constant(rate))


def run(optimizer, steps=3, params=PARAMS, grads=GRADS):
    whole = params
    params, frozen = pytree.partition(params, optimizer.trainable)
    grads, _ = pytree.partition(grads, optimizer.trainable)
    state = optimizer.init(whole)
    for step in range(steps):
        updates, state = optimizer.tx.update(grads, state, params, step=jnp.int32(step))
        params = jax.tree.map(jnp.add, params, updates)
    return pytree.merge(params, frozen), state


def by_hand(update, w, g, steps=3):
    """Applies `update(memory, w, g) -> (memory, w)` repeatedly; memory starts as None."""
    memory = None
    for _ in range(steps):
        memory, w = update(memory, w, g)
    return w


def sgd(memory, w, g, *, decay=0.0, nesterov=False):
    g = g + decay * w
    memory = g if memory is None else 0.9 * memory + g
    return memory, w - 0.1 * (g + 0.9 * memory if nesterov else memory)


def test_sgd_with_momentum_nesterov_and_l2():
    for nesterov in (False, True):
        found, _ = run(make(nesterov=nesterov, weight_decay=(0.01,)))
        expected = by_hand(lambda m, w, g: sgd(m, w, g, decay=0.01, nesterov=nesterov), 3.0, 0.6)  # noqa: B023
        np.testing.assert_allclose(found["head"]["kernel"], [expected], rtol=1e-5)


def test_rmsprop_is_tensorflows():
    """The mean of squares starts at 1, epsilon is in the root, the rate is inside the momentum."""

    def tensorflow(memory, w, g):
        ms, mom = memory or (1.0, 0.0)
        ms = 0.8 * ms + 0.2 * g * g
        mom = 0.9 * mom + 0.1 * g / np.sqrt(ms + 0.01)
        return (ms, mom), w - mom

    found, _ = run(make(name="rmsprop", decay_rate=0.8, eps=0.01))
    np.testing.assert_allclose(found["head"]["kernel"], [by_hand(tensorflow, 3.0, 0.6)], rtol=1e-5)


def test_adamw_decouples_what_adam_couples():
    """With a huge epsilon Adam's step is almost 0, so only decoupled decay changes the weights."""
    decoupled, _ = run(make(name="adamw", weight_decay=(0.5,), eps=1e8), steps=1)
    coupled, _ = run(make(name="adam", weight_decay=(0.5,), eps=1e8), steps=1)
    np.testing.assert_allclose(decoupled["head"]["kernel"], [3.0 * (1 - 0.1 * 0.5)], rtol=1e-5)
    np.testing.assert_allclose(coupled["head"]["kernel"], [3.0], rtol=1e-5)


def test_lamb_moves_each_layer_by_its_own_norm():
    found, _ = run(make(name="lamb"), steps=1)
    for layer in ("stem", "head"):
        before, after = PARAMS[layer]["kernel"], found[layer]["kernel"]
        moved = np.linalg.norm(after - before)
        np.testing.assert_allclose(moved, 0.1 * np.linalg.norm(before), rtol=1e-4)


def test_lamb_is_the_papers_algorithm():
    """https://arxiv.org/abs/1904.00962, algorithm 2, with the decay inside the trust ratio."""
    w, g = np.array([1.0, -2.0]), np.array([0.4, 0.1])
    m = v = np.zeros(2)
    for t in range(1, 4):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        r = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8) + 0.3 * w
        w = w - 0.1 * np.linalg.norm(w) / np.linalg.norm(r) * r
    found, _ = run(make(name="lamb", weight_decay=(0.3,)))
    np.testing.assert_allclose(found["stem"]["kernel"], w, rtol=1e-5)


def test_rules_choose_decay_and_rate():
    found, _ = run(
        make(
            weight_decay=((r".*/kernel", 0.1), (".*", 0.0)),
            lr_mult=((r"params/stem/.*", 0.0), (".*", 2.0)),
        ),
        steps=1,
    )
    np.testing.assert_array_equal(found["stem"]["kernel"], PARAMS["stem"]["kernel"])
    np.testing.assert_allclose(found["head"]["kernel"], [3.0 - 0.2 * (0.6 + 0.3)], rtol=1e-6)
    np.testing.assert_allclose(found["head"]["bias"], [-1.0 - 0.2 * 0.2], rtol=1e-6)


def test_frozen_parameters_take_no_memory_and_do_not_move():
    optimizer = make(trainable=((r"params/head/.*", True), (".*", False)), weight_decay=(0.1,))
    found, state = run(optimizer)
    for name in ("kernel", "bias"):
        np.testing.assert_array_equal(found["stem"][name], PARAMS["stem"][name])
        assert not np.array_equal(found["head"][name], PARAMS["head"][name])
    momentum = [x for x in jax.tree.leaves(state) if x.ndim]
    assert len(momentum) == 2


def test_clipping_bounds_the_global_norm():
    found, _ = run(make(clip_norm=0.01, momentum=0.0), steps=1)
    moved = jax.tree.map(lambda a, b: a - b, found, PARAMS)
    norm = np.sqrt(sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(moved)))
    np.testing.assert_allclose(norm, 0.1 * 0.01, rtol=1e-4)


def test_plateau_divides_after_patience_validations_without_a_better_one():
    optimizer = make()
    state = optimizer.init(PARAMS)
    rates = []
    for error in [0.5, 0.4, 0.4, 0.45, 0.41, 0.3, 0.29]:
        state = optimizers.update_plateau(state, error, patience=2, factor=0.1, min_delta=1e-3)
        rates.append(float(optimizer.learning_rate(jnp.int32(0), state)))
    # After 0.4, two errors that are not better lower the rate; then one more, then a better one.
    np.testing.assert_allclose(rates, [0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.01], rtol=1e-5)
    assert np.isclose(float(optimizers._plateau_states(state)[0].best), 0.29)


def test_a_negative_error_that_stays_is_not_better():
    state = make().init(PARAMS)
    for error in (-2.0, -2.0, -2.0005):
        state = optimizers.update_plateau(
            state, error, patience=2, factor=0.1, min_delta=1e-3, signed=True
        )
    (plateau,) = optimizers._plateau_states(state)
    assert (plateau.best, plateau.wait) == (-2.0, 0)
    assert np.isclose(plateau.scale, 0.1)
    state = optimizers.update_plateau(
        state, -2.1, patience=2, factor=0.1, min_delta=1e-3, signed=True
    )
    assert np.isclose(optimizers._plateau_states(state)[0].best, -2.1)


def test_a_nan_error_is_not_better():
    state = make().init(PARAMS)
    for _ in range(2):
        state = optimizers.update_plateau(
            state, float("nan"), patience=2, factor=0.1, min_delta=0.0
        )
    (plateau,) = optimizers._plateau_states(state)
    assert not np.isfinite(plateau.best)
    assert np.isclose(plateau.scale, 0.1)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (dict(name="sdg"), "did you mean 'sgd'"),
        (dict(trainable=((".*", False),)), "every parameter is frozen"),
        (dict(trainable=((".*", 1.0),)), "True or False"),
        (dict(trainable=((r"params/haed/.*", True), (".*", False))), "params/head/"),
        (dict(lr_mult=((r"params/head/.*", 1.0),)), "no rule decides params/stem"),
    ],
)
def test_misuse(fields, said):
    with pytest.raises(UserError, match=said):
        make(**fields)


BLOCKS = {
    "stage1": {f"block{i}": {"kernel": jnp.array([0.5, -float(i)])} for i in range(1, 5)},
    "head": {"kernel": jnp.array([3.0])},
}
BLOCK_GRADS = jax.tree.map(lambda w: jnp.cos(3 * w), BLOCKS)


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_a_stack_moves_as_its_blocks_would(name):
    """Rules match the names of the blocks; LAMB uses the norm of each block."""
    fields = dict(
        name=name,
        weight_decay=((r"params/stage1/block[23]/kernel", 0.3), (r".*", 0.01)),
        lr_mult=((r"params/stage1/block4/.*", 0.0), (r".*/block1/.*", 3.0), (r".*", 1.0)),
        trainable=((r"params/head/.*", False), (r".*", True)),
        clip_norm=1.0,
    )
    expected = run(make(params=BLOCKS, **fields), params=BLOCKS, grads=BLOCK_GRADS)
    stacked, grads = pytree.stack_blocks(BLOCKS), pytree.stack_blocks(BLOCK_GRADS)
    found = run(make(params=stacked, **fields), params=stacked, grads=grads)
    assert found[0]["stage1"]["block2-4"]["kernel"].shape == (3, 2)
    found = pytree.unstack_blocks(found)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    close = partial(np.testing.assert_allclose, rtol=1e-6)
    jax.tree.map(close, found, expected)
    assert np.array_equal(
        found[0]["stage1"]["block4"]["kernel"], BLOCKS["stage1"]["block4"]["kernel"]
    )


@pytest.mark.oracle
def test_patience_is_one_more_than_torchs():
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=4)
    state = make().init(PARAMS)
    for _ in range(13):
        theirs.step(1.0)
        state = optimizers.update_plateau(state, 1.0, patience=5, factor=0.1, min_delta=1e-4)
        (plateau,) = optimizers._plateau_states(state)
        assert float(plateau.scale) == pytest.approx(optimizer.param_groups[0]["lr"])


def test_layer_decay_goes_down_from_the_head():
    order = ["", "stem/conv", "stem/norm", "stage1/proj", "stage1/block1/conv1", "stage1/block1"]
    order += ["stage1/block2/conv1", "fire.2/a/b", "norm", "aux1/head", "head"]
    assert optimizers.layer_decay(order, 0.5) == [
        (r"params/stage1/block1/.*", 0.5**3),  # before the rest of stage1
        (r"params/stage1/block2/.*", 0.5**2),
        (r"params/[^/]+", 0.5**5),
        (r"params/stem/.*", 0.5**5),
        (r"params/stage1/.*", 0.5**4),
        (r"params/fire\.2/.*", 0.5),
        (r"params/norm/.*", 1.0),
        (r"params/aux1/.*", 1.0),
        (r"params/head/.*", 1.0),
    ]


def exponents(name, **fields):
    model = create_model(name, **fields)
    order = [layer.path for layer in cost(model, (1, *model.input_size)).layers]
    return optimizers.layer_exponents(order, getattr(model, "layer_groups", ()))


def test_layer_decay_of_a_transformer_is_beits():
    """get_num_layer_for_vit with 3 blocks: the head and the last norm are layer 4 of 4."""
    found = exponents("vit_tiny_patch16_224", depth=3, width=12, input_size=(32, 32, 3))
    assert found == {
        "": 4,  # class token, positions
        "patches": 4,
        **{f"encoder/block{i}": 4 - i for i in range(1, 4)},
        "norm": 0,
        "head": 0,
    }


def test_layer_decay_of_convnext_is_timms():
    depths = (1, 1, 2, 1)
    found = exponents("convnext_tiny", depths=depths, width=8, input_size=(32, 32, 3))
    blocks = [f"stage{i}/block{j}" for i, n in enumerate(depths, 1) for j in range(1, n + 1)]
    own = {block: 5 - i for i, block in enumerate(blocks)}
    down = {f"downsample{i}": own[f"stage{i + 1}/block1"] for i in (1, 2, 3)}
    assert found == {"stem": 6, **own, **down, "norm": 0, "head": 0}


@pytest.mark.parametrize(
    ("order", "groups", "expected"),
    [  # as in the families' `layer_groups`
        (
            ["stem/conv", "block1/layer1", "transition1/norm", "block2/layer1", "norm", "head"],
            (),
            [3, 2, 2, 1, 0, 0],
        ),
        (["stem", "stage1/block1", "top/conv", "head"], (("top", "below"),), [2, 1, 1, 0]),
        (["stem", "s/reduction", "s/normal1", "head"], (("s/reduction", "above"),), [2, 1, 1, 0]),
        (["conv1", "conv2", "fc6", "head"], (), [3, 2, 1, 0]),
    ],
)
def test_layers_of_layer_decay(order, groups, expected):
    assert list(optimizers.layer_exponents(order, groups).values()) == expected


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["mobilenetv3_small_100"])
def test_layer_decay_is_timms(name):
    """Each tensor of timm's network is filled with its exponent. After the conversion, each of our
    leaves must be filled with our exponent."""
    torch = pytest.importorskip("torch")
    foreign.torchvision()
    from timm.models._manipulate import group_parameters

    with torch.device("meta"):
        model = foreign.build(name, "timm")
    layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    most = max(layers.values())
    shapes = {path: leaf.shape for path, leaf in model.state_dict().items()}
    given = {
        path: np.broadcast_to(np.float32(most - layers.get(path, most)), shape)
        for path, shape in shapes.items()
    }
    theirs = pytree.flatten(convert(name, given, "timm")["params"])
    found = exponents(name)
    parts = sorted(found, key=lambda part: -part.count("/"))
    ours = {
        path: next(found[part] for part in parts if path.startswith(f"{part}/")) for path in theirs
    }
    assert ours == {path: int(leaf.flat[0]) for path, leaf in theirs.items()}


def test_layer_decay_multiplies_lr_mult_in_a_stack_too():
    config = get_config().optimizer
    config.momentum, config.layer_decay = 0.0, 0.5
    config.lr_mult = ((r".*/block3/.*", 10.0), (r".*", 1.0))
    order = [f"stage1/block{i}" for i in range(1, 5)] + ["head"]
    params, grads = pytree.stack_blocks(BLOCKS), pytree.stack_blocks(BLOCK_GRADS)
    optimizer = optimizers.make_optimizer(config, params, schedules.constant(1.0), order=order)
    found = pytree.unstack_blocks(run(optimizer, 1, params, grads)[0])
    factors = {"block1": 1 / 16, "block2": 1 / 8, "block3": 10 / 4, "block4": 1 / 2}
    for name, factor in factors.items():
        moved = found["stage1"][name]["kernel"] - BLOCKS["stage1"][name]["kernel"]
        expected = -factor * BLOCK_GRADS["stage1"][name]["kernel"]
        np.testing.assert_allclose(moved, expected, rtol=1e-5)
    np.testing.assert_allclose(
        found["head"]["kernel"], BLOCKS["head"]["kernel"] - BLOCK_GRADS["head"]["kernel"], rtol=1e-6
    )


def test_a_stack_is_frozen_whole_or_not_at_all():
    stacked = pytree.stack_blocks(BLOCKS)
    optimizer = make(params=stacked, trainable=((r".*/stage1/.*", False), (r".*", True)))
    assert optimizer.trainable["stage1"]["block2-4"]["kernel"] is False
    with pytest.raises(UserError, match=r"'stage1/block2-4/kernel'.*model\.scan=False"):
        make(params=stacked, trainable=((r".*/block[12]/.*", False), (r".*", True)))


def test_muon_is_optaxs_for_kernels_and_sgd_for_the_rest():
    key = jax.random.key(0)
    kernel = jax.random.normal(key, (3, 3, 4, 6))
    stack = jnp.stack([kernel, 2 * kernel])
    params = {"conv": {"kernel": kernel, "bias": jnp.ones(6)}, "head": {"kernel": jnp.ones((6, 2))}}
    grads = jax.tree.map(lambda leaf: leaf + 0.3, params)
    found, state = run(make(name="muon", nesterov=True, params=params), params=params, grads=grads)

    matrix = kernel.reshape(36, 6)
    theirs = optax.contrib.muon(0.1, beta=0.9, nesterov=True)
    w, inner = {"kernel": matrix}, theirs.init({"kernel": matrix})
    for _ in range(3):
        updates, inner = theirs.update({"kernel": matrix + 0.3}, inner, w)
        w = optax.apply_updates(w, updates)
    np.testing.assert_allclose(found["conv"]["kernel"].reshape(36, 6), w["kernel"], atol=1e-5)
    plain, _ = run(make(nesterov=True, params=params), params=params, grads=grads)
    np.testing.assert_array_equal(found["conv"]["bias"], plain["conv"]["bias"])
    np.testing.assert_array_equal(found["head"]["kernel"], plain["head"]["kernel"])
    assert jax.tree.leaves(state)

    # In a stack of blocks, each block's kernel is a matrix of its own.
    stacked = {"stage1": {"block1-2": {"kernel": stack}}}
    found, _ = run(make(name="muon", params=stacked), params=stacked, grads=stacked, steps=1)
    for i in range(2):
        one = {"conv": {"kernel": stack[i]}}
        alone, _ = run(make(name="muon", params=one), params=one, grads=one, steps=1)
        block = found["stage1"]["block1-2"]["kernel"][i]
        np.testing.assert_allclose(block, alone["conv"]["kernel"], atol=1e-5)
