"""The controller against torch's LSTM, enumeration and differences, SciPy, and a known optimum."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from flax_cnns.errors import UserError
from flax_cnns.studies.search.nas.controller import (
    Anchor,
    Categorical,
    Controller,
    search_with_controller,
)

# Two choices of different sizes and an anchor for each of three layers; 2 * 3 * ... * 2^(0+1+2).
LAYERS = (Categorical("height", 2), Categorical("count", 3), Anchor()) * 3
# Level 0 compiles several times faster.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SIZES = [2, 3, 2, 3, 2, 2, 3, 2, 2]  # of the flat decisions


@functools.cache
def make_tiny():
    """A space of 2 * 3 * 2 * 3 * 2 = 72 networks of two layers, with weights far from uniform."""
    controller = Controller(LAYERS[:6], learning_rate=0.02)
    params = jax.tree.map(lambda p: 12 * p, controller.init(1).params)
    every = np.array(list(itertools.product(*(range(n) for n in SIZES[:5]))))
    program = jit(jax.vmap(controller.compute_log_prob, (None, 0)))

    def score(params):
        """Returns the log-probabilities and entropies of all networks, f64 [72] each."""
        return [np.asarray(x, float) for x in program(params, every)]

    return controller, params, every, score


def test_log_probabilities_are_those_of_torch():
    torch = pytest.importorskip("torch")
    controller = Controller(LAYERS)
    params = jax.tree.map(lambda p: 10 * p, controller.init(0).params)
    step = {name: np.asarray(value) for name, value in params["step"].items()}
    lstm = torch.nn.LSTM(35, 35, 2)
    for layer in (0, 1):
        x_kernel, h_kernel = np.split(step[f"lstm{layer + 1}_kernel"], 2)
        getattr(lstm, f"weight_ih_l{layer}").data = torch.tensor(x_kernel.T)
        getattr(lstm, f"weight_hh_l{layer}").data = torch.tensor(h_kernel.T)
        getattr(lstm, f"bias_ih_l{layer}").data = torch.tensor(step[f"lstm{layer + 1}_bias"])
        getattr(lstm, f"bias_hh_l{layer}").data.zero_()

    decisions = [1, 2, 0, 1, 1, 1, 0, 0, 1]  # layer 3 takes layer 2 alone
    flat, x, state = iter(decisions), np.asarray(params["start"]), None
    outputs, total = [], 0.0
    for decision in LAYERS:
        h, state = lstm(torch.tensor(x)[None, None], state)
        h = h.detach().numpy()[0, 0]
        if isinstance(decision, Categorical):
            kind, chosen = ["height", "count"].index(decision.name), next(flat)
            logits = torch.tensor(h @ step["softmax"][kind, :, : decision.size])
            total += float(torch.log_softmax(logits, 0)[chosen])
            x = step["embedding"][kind, chosen]
        else:
            bits = [next(flat) for _ in outputs]
            for h_j, bit in zip(outputs, bits):
                p = 1 / (
                    1 + np.exp(-step["v"] @ np.tanh(step["w_prev"].T @ h_j + step["w_curr"].T @ h))
                )
                total += np.log(p if bit else 1 - p)
            taken = [h_j for h_j, bit in zip(outputs, bits) if bit]
            x = np.sum([np.zeros(35), *taken], axis=0).astype(np.float32) / (1 + len(taken))
            outputs.append(h)
    assert total < -5
    np.testing.assert_allclose(controller.score(params, jnp.array(decisions))[0], total, rtol=1e-5)


def test_probabilities_sum_to_one_and_the_entropy_is_theirs():
    _, params, every, score = make_tiny()
    log_probs, entropies = score(params)
    p = np.exp(log_probs)
    assert len(every) == 72
    assert p.sum() == pytest.approx(1, abs=1e-5)
    assert p.max() > 5 * p.min()
    assert p @ entropies == pytest.approx(-(p @ log_probs), rel=1e-5)


def test_samples_have_their_probabilities():
    controller, params, every, score = make_tiny()
    log_probs, _ = score(params)
    keys = jax.random.split(jax.random.key(0), 10_000)
    drawn, drawn_log_probs = jit(jax.vmap(controller.draw, (None, 0)))(params, keys)
    number = {tuple(row): i for i, row in enumerate(every.tolist())}
    indices = np.array([number[tuple(row)] for row in np.asarray(drawn).tolist()])
    np.testing.assert_allclose(drawn_log_probs, log_probs[indices], atol=1e-4)
    expected = np.exp(log_probs) / np.exp(log_probs).sum() * len(indices)
    assert stats.chisquare(np.bincount(indices, minlength=72), expected).pvalue > 1e-3


def test_reinforce_is_the_gradient_of_the_expected_reward():
    """Summed over all 72 networks, with their probabilities, whatever the baseline is. The gradient
    is that of differences of the expected reward, in random directions and in its own."""
    controller, params, every, score = make_tiny()
    rng = np.random.default_rng(0)
    rewards = rng.uniform(size=72)
    p = np.exp(score(params)[0])
    leaves, structure = jax.tree.flatten(params)

    def expect_reward(direction, size):
        moved = [x + np.float32(size) * d for x, d in zip(leaves, direction)]
        return np.exp(score(jax.tree.unflatten(structure, moved))[0]) @ rewards

    def measure_slope(direction):
        size = 0.03 / np.sqrt(sum((d**2).sum() for d in direction))
        return (expect_reward(direction, size) - expect_reward(direction, -size)) / (2 * size)

    gradient = jit(jax.grad(controller.compute_loss))
    directions = [[rng.normal(size=x.shape).astype(np.float32) for x in leaves] for _ in range(5)]
    for baseline in (0.0, 0.7):
        # The loss is a mean over its trials; these count with their probability.
        weighted = (72 * p * (rewards - baseline) + baseline).astype(np.float32)
        grads = gradient(params, every, weighted, np.float32(baseline))
        estimate = [-np.asarray(leaf, float) for leaf in jax.tree.leaves(grads)]
        scale = np.sqrt(sum((g**2).sum() for g in estimate))
        assert scale > 1e-2
        for direction in (estimate, *directions):
            length = np.sqrt(sum((d**2).sum() for d in direction))
            expected = sum((g * d).sum() for g, d in zip(estimate, direction)) / length
            assert measure_slope(direction) / length == pytest.approx(
                expected, rel=1e-2, abs=1e-3 * scale
            )


def test_it_finds_the_best_of_a_toy_and_the_baseline_follows_the_rewards():
    """The reward is the fraction of decisions that equal those of one network."""
    controller, best = make_tiny()[0], (1, 2, 0, 1, 1)

    def evaluate(decisions):
        return np.mean(np.equal(decisions, best))

    trials = search_with_controller(controller, evaluate, trials=240, seed=0, batch_size=4)
    rewards = [reward for _, reward in trials]
    assert np.mean(rewards[:40]) < 0.6
    assert np.mean(rewards[-40:]) > 0.95

    # The state after the log is the state of the search, to the bit.
    batches = [tuple(zip(*trials[i : i + 4])) for i in range(0, 240, 4)]
    state, again = controller.replay(0, batches), controller.init(0)
    for decisions, reward in batches:
        again = controller.update(again, decisions, reward)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(again)):
        np.testing.assert_array_equal(a, b)
    numbers = [236, 237, 238, 239]
    before = controller.replay(0, batches[:59])
    assert controller.sample_trials(before, 0, numbers) == [d for d, _ in trials[236:]]
    baseline = np.mean(rewards[:4])
    for i in range(0, 240, 4):
        baseline = 0.9 * baseline + 0.1 * np.mean(rewards[i : i + 4])
    assert state.baseline == pytest.approx(baseline, rel=1e-5)


def test_errors():
    with pytest.raises(UserError, match="choice 'a' has 3 and 4 options"):
        Controller([Categorical("a", 3), Categorical("a", 4)])
    with pytest.raises(UserError, match="expected one or more choices"):
        Controller([Anchor()])
    controller = make_tiny()[0]
    with pytest.raises(UserError, match="expected finite rewards"):
        controller.update(controller.init(0), [[0, 0, 0, 0, 0]], [np.nan])
