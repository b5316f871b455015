"""Raw maps equal captum's and pytorch-grad-cam's, on the same weights, to 1e-4 of their maximum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns import create_model
from flax_cnns.analysis.explain import backward_rules, cams, gradients, perturbations
from flax_cnns.weights import convert
from tests.analysis.explain import make_reference
from tests.analysis.explain.make_reference import IG_STEPS, NETWORKS, STRIDE, TARGETS, WINDOW
from tests.models import cases, foreign

METHODS = {
    "gradient": gradients.gradient,
    "gradient_times_input": gradients.gradient_times_input,
    "integrated_gradients": lambda *a: gradients.integrated_gradients(*a, steps=IG_STEPS),
    "occlusion": lambda *a: perturbations.occlusion(*a, window=WINDOW, stride=STRIDE),
    "guided_backprop": backward_rules.guided_backprop,
    "deconvnet": backward_rules.deconvnet,
}
WEIGHED = {
    "grad_cam": cams.grad_cam,
    "grad_cam_plus_plus": cams.grad_cam_plus_plus,
    "layer_cam": cams.layer_cam,
}


# ResNet-18 alone takes as long as all other tests of this folder.
@pytest.fixture(
    scope="module",
    params=["squeezenet1_1", pytest.param("resnet18", marks=pytest.mark.slow)],
)
def network(request):
    """(the row of NETWORKS, model, variables, images [2 H W 3], the recorded maps)."""
    row = NETWORKS[request.param]
    case = foreign.CASES[row.family]
    tensors, _ = cases.load(
        cases.FOLDER / f"{row.family}.npz", case.source, foreign.gain(case.name)
    )
    variables = convert(case.name, tensors, case.source, **case.fields)
    model = create_model(case.name, **case.fields, num_classes=10)
    images = jnp.asarray(foreign.images(2, case.size))
    with np.load(make_reference.FOLDER / f"{request.param}.npz") as kept:
        return row, model, variables, images, dict(kept)


def test_maps_are_those_of_captum_and_pytorch_grad_cam(network):
    row, model, variables, images, recorded = network
    assert len(recorded) >= 7
    for name, wanted in recorded.items():
        if name in WEIGHED:
            found = WEIGHED[name](model, variables, images, TARGETS, row.path)
        else:
            found = METHODS[name](model, variables, images, TARGETS)
        found = make_reference.thin_out(np.asarray(found), images.shape[1])
        assert found.shape == wanted.shape, name
        error = np.abs(found - wanted).max() / np.abs(wanted).max()
        assert error <= 1e-4, (name, error)


@pytest.mark.oracle
@pytest.mark.parametrize("name", NETWORKS)
def test_the_record_is_what_they_compute(name):
    pytest.importorskip("torch")
    foreign.torchvision()
    pytest.importorskip("captum")
    pytest.importorskip("pytorch_grad_cam")
    live = make_reference.theirs(NETWORKS[name])
    with np.load(make_reference.FOLDER / f"{name}.npz") as kept:
        assert set(kept) == set(live)
        for method, wanted in kept.items():
            np.testing.assert_allclose(live[method], wanted, atol=1e-5 * np.abs(wanted).max())


def test_a_disturbed_weight_is_noticed(network):
    row, model, variables, images, recorded = network
    flat, tree = jax.tree.flatten(variables)
    changed = jax.tree.unflatten(tree, [flat[0] + 0.1, *flat[1:]])
    found = cams.grad_cam(model, changed, images, TARGETS, row.path)
    assert np.abs(found - recorded["grad_cam"]).max() > 1e-3 * np.abs(recorded["grad_cam"]).max()
