"""The controller of "Neural Architecture Search with Reinforcement Learning", Zoph & Le 2016.

https://arxiv.org/abs/1611.01578. An LSTM makes the decisions that describe a network, one after the
other, and each decision is the input of the next step (section 3.1). A layer's skip connections are
decided at an anchor (section 3.3): layer j enters layer i with probability
sigmoid(v . tanh(W_prev h_j + W_curr h_i)), where h is the LSTM's output at the layer's anchor.
REINFORCE with a moving baseline raises the probability of decisions with high rewards (section
3.2). Adam with a learning rate of 0.0006, two layers of 35 units, and weights drawn from -0.08 to
0.08 are section 4.1's.

Where the paper is silent, this file decides:

- Choices of the same name share their embeddings and their softmax. So does every anchor with v,
  W_prev and W_curr.
- The input after an anchor is the sum of the chosen layers' h, divided by one plus their number, as
  in ENAS (https://arxiv.org/abs/1802.03268). The first input is a learned vector.
- The baseline starts at the mean reward of the first update. Its decay is 0.9.

There is no bonus for entropy unless `entropy` is set. The paper has none.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from flax_cnns.errors import UserError
from flax_cnns.types import Array, PyTree

INIT_LIMIT = 0.08  # weights start uniform between -0.08 and 0.08


class Categorical(NamedTuple):
    """A decision for one of `size` options, numbered from 0."""

    name: str  # choices of one name share their embeddings and their softmax
    size: int


class Anchor(NamedTuple):
    """Decisions for the skip connections of a layer: 0 or 1 for each earlier anchor."""

    name: str = "skips"


class ControllerState(NamedTuple):
    """What an update changes."""

    params: PyTree
    opt_state: PyTree
    baseline: Array  # f32 []: moving average of the rewards
    updates: Array  # i32 []


class _Rows(NamedTuple):
    """Facts about each step of the LSTM, [T] each."""

    kind: np.ndarray  # number of the choice's name; 0 at anchors
    size: np.ndarray  # options of the choice; 1 at anchors
    anchor: np.ndarray  # number of the anchor; -1 at choices


class _Step(nn.Module):
    """One step: the LSTM reads the last decision, then makes or scores the next one.

    A row i32 [W] holds the decision: a choice in its first column, an anchor's bits in its first
    columns. The carry is (LSTM states, input [U], outputs at the anchors so far [A U]).
    """

    kinds: int
    options: int  # of the largest choice
    units: int
    layers: int

    @nn.compact
    def __call__(self, carry: Any, inputs: Any) -> tuple[Any, tuple[Array, Array, Array]]:
        states, x, anchors = carry
        (kind, size, anchor), given, key = inputs
        init, units = _uniform, self.units
        new_states = []
        for i, (c, h) in enumerate(states, 1):
            # As torch.nn.LSTM: the gates i, f, g, o of [x, h].
            kernel = self.param(f"lstm{i}_kernel", init, (2 * units, 4 * units))
            bias = self.param(f"lstm{i}_bias", init, (4 * units,))
            gates = jnp.split(jnp.concatenate([x, h]) @ kernel + bias, 4)
            enter, keep, leave = (nn.sigmoid(gates[j]) for j in (0, 1, 3))
            c = keep * c + enter * jnp.tanh(gates[2])
            x = leave * jnp.tanh(c)
            new_states.append((c, x))

        softmax = self.param("softmax", init, (self.kinds, units, self.options))
        embedding = self.param("embedding", init, (self.kinds, self.options, units))
        logits = jnp.where(jnp.arange(self.options) < size, x @ softmax[kind], -1e9)
        earlier = jnp.arange(len(anchors)) < anchor
        w_prev = self.param("w_prev", init, (units, units))
        w_curr = self.param("w_curr", init, (units, units))
        v = self.param("v", init, (units,))
        links = jnp.tanh(anchors @ w_prev + x @ w_curr) @ v  # [A]

        if given is None:
            choice_key, link_key = jax.random.split(key)
            row = (jax.random.bernoulli(link_key, nn.sigmoid(links)) & earlier).astype(jnp.int32)
            chosen = jax.random.categorical(choice_key, logits)
            row = jnp.where(anchor < 0, jnp.zeros_like(row).at[0].set(chosen), row)
        else:
            row = given

        log_softmax = nn.log_softmax(logits)
        log_link = nn.log_sigmoid(jnp.stack([-links, links]))  # of 0 and of 1
        log_bits = jnp.where(row > 0, log_link[1], log_link[0])
        log_prob = jnp.where(anchor < 0, log_softmax[row[0]], jnp.sum(log_bits, where=earlier))
        entropy = -jnp.where(
            anchor < 0,
            jnp.sum(jnp.exp(log_softmax) * log_softmax),
            jnp.sum(jnp.exp(log_link) * log_link, where=earlier),
        )
        bits = jnp.where(earlier, row, 0)
        mean = bits @ anchors / (1 + jnp.sum(bits))
        next_input = jnp.where(anchor < 0, embedding[kind, row[0]], mean)
        anchors = jnp.where((jnp.arange(len(anchors)) == anchor)[:, None], x, anchors)
        return (tuple(new_states), next_input, anchors), (row, log_prob, entropy)


def _uniform(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
    return jax.random.uniform(key, shape, dtype, -INIT_LIMIT, INIT_LIMIT)


class ControllerLSTM(nn.Module):
    """The controller's network: makes decisions, or scores given ones."""

    decisions: tuple[Categorical | Anchor, ...]
    units: int = 35
    layers: int = 2

    @nn.compact
    def __call__(self, rows: Array | None, key: Array | None) -> tuple[Array, Array, Array]:
        """Scores rows i32 [T W], or draws them with `key` if `rows` is None.

        Returns (rows, log-probability f32 [], entropy f32 []). The entropy is the sum over the
        steps, given the decisions before each.
        """
        steps, count = list_steps(self.decisions), len(self.decisions)
        kinds = {c.name for c in self.decisions if isinstance(c, Categorical)}
        anchors = max(sum(isinstance(c, Anchor) for c in self.decisions), 1)
        zeros = jnp.zeros(self.units)
        start = self.param("start", _uniform, (self.units,))
        step = nn.scan(
            _Step, variable_broadcast="params", split_rngs={"params": False}, in_axes=0, out_axes=0
        )(len(kinds), int(steps.size.max()), self.units, self.layers, name="step")
        states = tuple((zeros, zeros) for _ in range(self.layers))
        keys = None if key is None else jax.random.split(key, count)
        carry = states, start, jnp.zeros((anchors, self.units))
        _, (rows, log_probs, entropies) = step(carry, (tuple(steps), rows, keys))
        return rows, jnp.sum(log_probs), jnp.sum(entropies)


def list_steps(decisions: Sequence[Categorical | Anchor]) -> _Rows:
    """Returns facts about each step. Raises UserError if one name has choices of two sizes."""
    sizes: dict[str, int] = {}
    for decision in decisions:
        if isinstance(decision, Categorical) and sizes.setdefault(decision.name, decision.size) != (
            decision.size
        ):
            raise UserError(
                f"choice {decision.name!r} has {sizes[decision.name]} and {decision.size} options;"
                " give choices of different sizes different names"
            )
    if not sizes or min(sizes.values()) < 1:
        raise UserError(f"expected one or more choices with options, got {list(decisions)}")
    names, anchors = list(sizes), itertools.count()
    rows = [
        (names.index(d.name), d.size, -1) if isinstance(d, Categorical) else (0, 1, next(anchors))
        for d in decisions
    ]
    return _Rows(*np.array(rows, np.int32).T)


class Controller:
    """Samples and learns the decisions of a space.

    Decisions are flat, i32 [D]: a number for each choice, and for the anchor of layer i one bit for
    each of the i anchors before it, in the order of `decisions`.

    decisions: the choices and anchors, in their order.
    learning_rate: of Adam.
    baseline_decay: of the moving average of the rewards.
    entropy: weight of the entropy in the objective; 0, as in the paper: none.
    """

    def __init__(
        self,
        decisions: Sequence[Categorical | Anchor],
        *,
        learning_rate: float = 6e-4,
        baseline_decay: float = 0.9,
        entropy: float = 0.0,
        units: int = 35,
        layers: int = 2,
    ):
        self.decisions = tuple(decisions)
        self.learning_rate, self.baseline_decay = learning_rate, baseline_decay
        self.entropy = entropy
        anchor = list_steps(self.decisions).anchor
        self._width = max(int(anchor.max()) + 1, 1)
        places = [(t, j) for t, i in enumerate(anchor) for j in range(1 if i < 0 else i)]
        self._places = tuple(np.array(places).T)  # (steps, columns) of the flat decisions
        self.network = ControllerLSTM(self.decisions, units, layers)
        self.optimizer = optax.flatten(optax.adam(learning_rate))  # compiles faster
        # On a CPU these small programs take longer to compile than to run. The compiled `sample`
        # and `score` cannot be called inside other compiled functions; what they compile can.
        options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        jit = partial(jax.jit, compiler_options=options)
        self.sample = jit(self.draw)
        self.score = jit(self.compute_log_prob)
        self._sample_many = jit(jax.vmap(self.draw, (None, 0)))
        self._update = jit(self._compute_update)

    def init(self, seed: int) -> ControllerState:
        """Returns the state before the first update."""
        key, _ = jax.random.split(jax.random.key(seed))
        shapes = jax.eval_shape(self.network.init, key, None, key)["params"]
        # All parameters have the same distribution; one draw compiles faster than one for each.
        leaves, structure = jax.tree.flatten(shapes)
        ends = list(itertools.accumulate(leaf.size for leaf in leaves))
        values = np.asarray(_uniform(key, (ends[-1],)))
        parts = [
            jnp.asarray(part.reshape(leaf.shape))
            for part, leaf in zip(np.split(values, ends[:-1]), leaves)
        ]
        params = jax.tree.unflatten(structure, parts)
        return ControllerState(params, self.optimizer.init(params), jnp.float32(0), jnp.int32(0))

    def draw(self, params: PyTree, key: Array) -> tuple[Array, Array]:
        """Draws decisions i32 [D]. Returns them and their log-probability f32 []."""
        rows, log_prob, _ = self._apply(params, None, key)
        return rows[self._places], log_prob

    def compute_log_prob(self, params: PyTree, decisions: Array) -> tuple[Array, Array]:
        """Returns (log-probability, sum of the steps' entropies), f32 [], of decisions i32 [D]."""
        shape = len(self.decisions), self._width
        rows = jnp.zeros(shape, jnp.int32).at[self._places].set(decisions)
        _, log_prob, entropy = self._apply(params, rows, None)
        return log_prob, entropy

    def _apply(
        self, params: PyTree, rows: Array | None, key: Array | None
    ) -> tuple[Array, Array, Array]:
        return cast(tuple[Array, Array, Array], self.network.apply({"params": params}, rows, key))

    def sample_trials(
        self, state: ControllerState, seed: int, numbers: Sequence[int]
    ) -> list[tuple[int, ...]]:
        """Returns the decisions of the trials with these numbers.

        They depend on the state's parameters, the seed and the trial's number alone.
        """
        _, key = jax.random.split(jax.random.key(seed))
        keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.asarray(numbers))
        decisions, _ = self._sample_many(state.params, keys)
        return [tuple(row) for row in np.asarray(decisions).tolist()]

    def update(self, state: ControllerState, decisions: Any, rewards: Any) -> ControllerState:
        """Takes one step of REINFORCE on M trials: decisions [M D] and rewards [M].

        A single trial, [D] and [], is a batch of one. The baseline is the moving average before
        this update. In the first update it is the mean of `rewards`, so that with one trial the
        first update changes no parameter. Raises UserError for rewards that are not finite.
        """
        decisions, rewards = np.atleast_2d(decisions), np.atleast_1d(rewards)
        if not np.isfinite(rewards).all():
            raise UserError(f"expected finite rewards, got {rewards.tolist()}")
        return self._update(
            state, jnp.asarray(decisions, jnp.int32), jnp.asarray(rewards, jnp.float32)
        )

    def compute_loss(
        self, params: PyTree, decisions: Array, rewards: Array, baseline: Array
    ) -> Array:
        """Returns the loss whose gradient is minus the REINFORCE estimate of the reward's."""
        log_probs, entropies = jax.vmap(self.compute_log_prob, (None, 0))(params, decisions)
        return -jnp.mean((rewards - baseline) * log_probs + self.entropy * entropies)

    def _compute_update(
        self, state: ControllerState, decisions: Array, rewards: Array
    ) -> ControllerState:
        mean = jnp.mean(rewards)
        baseline = jnp.where(state.updates == 0, mean, state.baseline)
        grads = jax.grad(self.compute_loss)(state.params, decisions, rewards, baseline)
        changes, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        decay = self.baseline_decay
        return ControllerState(
            optax.apply_updates(state.params, changes),
            opt_state,
            decay * baseline + (1 - decay) * mean,
            state.updates + 1,
        )

    def replay(self, seed: int, batches: Iterable[tuple[Any, Any]]) -> ControllerState:
        """Returns the state after updates with recorded (decisions [M D], rewards [M])."""
        state = self.init(seed)
        for decisions, rewards in batches:
            state = self.update(state, decisions, rewards)
        return state


def search_with_controller(
    controller: Controller,
    evaluate: Callable[[tuple[int, ...]], float],
    *,
    trials: int,
    seed: int,
    batch_size: int = 1,
) -> list[tuple[tuple[int, ...], float]]:
    """Samples, evaluates and learns. Returns (decisions, reward) of each trial, in order."""
    state, done = controller.init(seed), list[tuple[tuple[int, ...], float]]()
    for first in range(0, trials, batch_size):
        numbers = range(first, min(first + batch_size, trials))
        # Always whole batches, so that one program serves all.
        decisions = controller.sample_trials(state, seed, range(first, first + batch_size))
        batch = [(d, float(evaluate(d))) for d, _ in zip(decisions, numbers)]
        done += batch
        if len(batch) == batch_size:
            state = controller.update(state, *map(list, zip(*batch)))
    return done
