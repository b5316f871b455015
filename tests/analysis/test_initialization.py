"""The lectures' experiment against closed forms."""

import jax
import numpy as np
import pytest

from flax_cnns.analysis import initialization
from flax_cnns.analysis.initialization import AS_PRINTED, SETTINGS, Setting, measure_dense_stacks

WIDTH = 512
PRINTED = "He as printed"
# The deck's N(0, 0.01^2) at 4096 units multiplies by 0.01 * sqrt(4096) = 0.64.
SMALL = Setting("tanh", "0.64", lambda inputs: 0.64 / inputs**0.5)


@pytest.fixture(scope="module")
def found():
    settings = (*SETTINGS, *AS_PRINTED, SMALL)
    return measure_dense_stacks(settings, width=WIDTH, images=64)


def _get(found, activation, label):
    return next(found[s] for s in found if s[:2] == (activation, label))


def test_the_settings_are_those_of_the_decks():
    at = {(s.activation, s.label): s.std(4096) for s in (*SETTINGS, *AS_PRINTED)}
    for activation in ("tanh", "relu"):
        stds = [std for (name, _), std in at.items() if name == activation]
        np.testing.assert_allclose(stds, [0.01, 0.05, 1 / 64, np.sqrt(2) / 64, np.sqrt(2048)])
    assert round(at["relu", PRINTED]) == 45


def test_he_keeps_the_mean_square_of_relu(found):
    """Half of the pre-activations' mean square, inputs * std^2 * E[x^2], passes the ReLU. So He
    keeps E[x^2] = 1, Xavier halves it, and as printed it grows by (inputs / 2)^2."""
    for label, factor in (("He", 1.0), ("Xavier", 0.5), (PRINTED, (WIDTH / 2) ** 2)):
        layers = _get(found, "relu", label)
        squares = [layer.mean_square for layer in layers]
        np.testing.assert_allclose(squares, factor ** np.arange(1, 7), rtol=0.35)
        for layer in layers:  # of a rectified normal variable
            np.testing.assert_allclose(layer.mean**2 / layer.mean_square, 1 / np.pi, rtol=0.1)
            assert abs(layer.zeros - 0.5) < 0.05


def test_tanh_shrinks_as_its_expectation_says(found):
    """The pre-activations are normal with 0.64 times the rms of the inputs, and E[tanh^2] of them
    is an integral. For small values tanh(z) = z, so that the factor of a layer goes to 0.64."""
    points, weights = np.polynomial.hermite_e.hermegauss(60)
    rms, wanted = 1.0, []
    for _ in range(6):
        squares = np.tanh(0.64 * rms * points) ** 2
        rms = np.sqrt(np.sum(weights * squares) / np.sqrt(2 * np.pi))
        wanted.append(rms)
    stds = [layer.std for layer in found[SMALL]]
    np.testing.assert_allclose(stds, wanted, rtol=0.05)
    assert 0.6 < wanted[-1] / wanted[-2] < 0.64
    assert wanted[0] < 0.5  # the first layer shrinks more: its inputs are not small


def test_as_printed_tanh_saturates_and_relu_explodes(found):
    for layer in _get(found, "tanh", PRINTED):
        assert layer.counts[[0, -1]].sum() > 0.95 * 64 * WIDTH
    assert _get(found, "relu", PRINTED)[-1].std > 1e13


def test_histograms_hold_all_values_but_zeros(found):
    for setting, layers in found.items():
        low, high = initialization.RANGES[setting.activation]
        for layer in layers:
            assert layer.counts.sum() == round((1 - layer.zeros) * 64 * WIDTH)
            assert (layer.edges[0], layer.edges[-1]) == (low, high)


def test_equal_keys_give_equal_results_and_more_layers_begin_alike():
    (short,) = measure_dense_stacks([SMALL], width=16, layers=2).values()
    (long,) = measure_dense_stacks([SMALL], width=16, layers=3).values()
    assert [layer.std for layer in short] == [layer.std for layer in long[:2]]
    (other,) = measure_dense_stacks([SMALL], width=16, layers=2, key=jax.random.key(1)).values()
    assert short[0].std != other[0].std
