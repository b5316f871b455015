"""Features by path and saliency, against closed forms on a tiny network."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns import create_model, init_variables, layers
from flax_cnns import tree as pytree
from flax_cnns.analysis.explain import (
    backward_rules,
    cams,
    features,
    gradients,
    perturbations,
    quality,
    targets,
)
from flax_cnns.errors import UserError


class Tiny(nn.Module):
    """Two convolutions, one of them called twice, max pooling, and a dense layer on the means."""

    activation: str = "relu"

    @nn.compact
    def __call__(self, images, *, train=False):
        activate = getattr(nn, self.activation)
        x = activate(nn.Conv(4, (3, 3), name="conv1")(images))
        x = layers.max_pool(x, 2, 2)
        again = nn.Conv(4, (3, 3), name="conv2")
        x = activate(again(activate(again(x))))
        return nn.Dense(5, name="head")(x.mean((1, 2)))


@pytest.fixture(scope="module")
def tiny():
    model = Tiny()
    images = jax.random.normal(jax.random.key(1), (3, 8, 8, 2))
    return model, model.init(jax.random.key(0), images), images


@pytest.fixture(scope="module")
def resnet():
    """A network that scans, its variables, and images."""
    model = create_model("cifar_resnet20", depths=(3, 1, 1), widths=(4, 8, 8), scan=True)
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    return model, init_variables(model, jax.random.key(0)), images


def test_features_of_a_network_that_scans_are_those_of_its_modules(resnet):
    model, variables, images = resnet
    found = features.features(model, variables, images, ["stage1/block3", "stage3", "head", ""])
    logits = model.apply(variables, images, train=False)
    for path in ("head", ""):
        np.testing.assert_allclose(found[path], logits, rtol=1e-4, atol=1e-5)
    kernel, bias = (variables["params"]["head"][name] for name in ("kernel", "bias"))
    by_hand = found["stage3"].mean((1, 2)) @ kernel + bias
    np.testing.assert_allclose(by_hand, logits, rtol=1e-4, atol=1e-5)
    assert found["stage1/block3"].shape == (2, 8, 8, 4)
    outputs = features.list_outputs(model, variables, images)
    parts = ["stem", "stage1", "stage2", "stage3", "head", ""]
    assert [path for path in outputs if "/" not in path] == parts


def test_a_module_that_is_called_twice_has_two_outputs(tiny):
    first, second = ("conv2[0]", "conv2[1]")
    found = features.features(*tiny, [first, second])
    conv = nn.Conv(4, (3, 3))
    params = {"params": tiny[1]["params"]["conv2"]}
    by_hand = conv.apply(params, nn.relu(found[first]))
    np.testing.assert_allclose(found[second], by_hand, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda *a: features.features(*a, ["conv3"]), "no module 'conv3'; did you mean 'conv1'"),
        (lambda *a: features.features(*a, ["conv2"]), r"called 2 times; .*conv2\[0\], conv2\[1\]"),
        (lambda *a: cams.grad_cam(*a, 1, "head"), r"'head' has no spatial maps: .*'conv2\[1\]'"),
        (lambda *a: gradients.gradient(*a, 5), "class 5 is out of range: .* 5 classes, 0 to 4"),
        (lambda m, v, x: cams.cam(m, v, x[:0]), "no images: expected at least one"),
        (lambda *a: gradients.gradient(*a, [0, 1]), "a class for each of 3 images, got 2"),
        (lambda *a: gradients.gradient(*a, "cat"), "expected a class or 3 of them"),
        (lambda m, v, x: gradients.gradient(m, v, x.astype("uint8")), "of floats, .* got uint8"),
        (
            lambda m, v, x: cams.grad_cam(m, v, x[..., :1]),
            r"Tiny cannot take .*\[3, 8, 8, 1\]: For",
        ),
        (lambda *a: cams.cam(*a, lambda logits: logits.sum(1)), "the target must be a class"),
        (lambda *a: perturbations.occlusion(*a, window=9), "at most 8x8 pixels, got 9x9"),
        (lambda *a: perturbations.occlusion(*a, window=2, stride=3), r"window \(2, 2\), got"),
        (lambda *a: quality.deletion(*a, jnp.zeros((3, 4, 4))), r"expected \[3, 8, 8\].*\[3, 4, 4"),
        (
            lambda model, *a: backward_rules.deconvnet(Tiny("gelu"), *a, 1),
            "Tiny has the activation (gelu|tanh): .* defined for ReLU",
        ),
    ],
)
def test_what_cannot_be_explained_is_one_line(tiny, call, message):
    with pytest.raises(UserError, match=message) as raised:
        call(*tiny)
    assert "\n" not in str(raised.value)


def test_cam_is_for_networks_with_global_average_pooling():
    class Flat(nn.Module):
        @nn.compact
        def __call__(self, images, *, train=False):
            x = nn.Conv(3, (3, 3))(images)
            return nn.Dense(4, name="head")(x.reshape(len(x), -1))

    images = jnp.ones((1, 4, 4, 1))
    variables = Flat().init(jax.random.key(0), images)
    with pytest.raises(UserError, match=r"Flat: no module's output.*'head' reads.*take grad_cam"):
        cams.cam(Flat(), variables, images)


@pytest.mark.parametrize("target", [None, 2, [0, 1], (3, 1)])
def test_cam_is_grad_cam_times_the_number_of_pixels(resnet, target):
    """dS/dA_k is w_k / (h w) at every pixel where the head reads means."""
    maps = cams.cam(*resnet, target)
    weighted = cams.grad_cam(*resnet, target, "stage3")
    np.testing.assert_allclose(maps, 4 * weighted, rtol=1e-4, atol=1e-5 * np.abs(maps).max())


def test_cam_of_a_network_whose_means_are_rounded():
    class Half(nn.Module):
        @nn.compact
        def __call__(self, images, *, train=False):
            x = nn.relu(nn.Conv(8, (3, 3), dtype=jnp.bfloat16, name="conv")(images))
            return nn.Dense(5, dtype=jnp.bfloat16, name="head")(x.mean((1, 2)))

    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
    variables = Half().init(jax.random.key(0), images)
    maps = nn.relu(nn.Conv(8, (3, 3)).apply({"params": variables["params"]["conv"]}, images))
    wanted = maps @ variables["params"]["head"]["kernel"][:, 1]
    found = cams.cam(Half(), variables, images, 1)
    np.testing.assert_allclose(found, wanted, atol=0.02 * np.abs(wanted).max())


def test_pre_activation_maps_are_those_after_the_last_relu():
    """There, no module's output is what the head averages."""
    model = create_model("cifar_preact110", depths=(1, 1, 1), widths=(4, 4, 4))
    variables = init_variables(model, jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    found = cams.maps_and_gradients(model, variables, images, 1)
    assert found.maps.shape == (2, 4, 4, 4)
    norm = cams.choose_path(model, variables, images)
    before = features.features(model, variables, images, [norm])[norm]
    np.testing.assert_allclose(found.maps, nn.relu(before), rtol=1e-5, atol=1e-6)
    assert before.min() < 0
    maps, weighted = (
        cams.cam(model, variables, images, 1),
        cams.grad_cam(model, variables, images, 1),
    )
    np.testing.assert_allclose(maps, 16 * weighted, rtol=1e-4, atol=1e-5 * np.abs(maps).max())


def test_the_gate_of_an_attention_is_no_global_pooling():
    class Gated(nn.Module):
        @nn.compact
        def __call__(self, images, *, train=False):
            x = nn.Conv(3, (3, 3), name="conv")(images)
            gated = x * nn.sigmoid(nn.Dense(3, name="gate")(x.mean((1, 2))))[:, None, None]
            return nn.Dense(2, name="head")(gated.reshape(len(x), -1))

    images = jax.random.normal(jax.random.key(1), (1, 4, 4, 1))
    variables = Gated().init(jax.random.key(0), images)
    default = cams.grad_cam(Gated(), variables, images, 1)
    np.testing.assert_array_equal(default, cams.grad_cam(Gated(), variables, images, 1, "conv"))


def test_integrated_gradients_are_complete(resnet):
    """Also of images in bfloat16: gradients are summed in float32."""
    model, variables, images = resnet
    rounded = images.astype(jnp.bfloat16)
    found = gradients.integrated_gradients(model, variables, rounded, 3, steps=300)
    images = rounded.astype(jnp.float32)
    logits = lambda x: model.apply(variables, x, train=False)[:, 3]  # noqa: E731
    wanted = logits(images) - logits(0 * images)
    np.testing.assert_allclose(found.sum((1, 2, 3)), wanted, atol=1e-3 * np.abs(wanted).max())


def test_targets(tiny):
    model, variables, images = tiny
    logits = np.asarray(model.apply(variables, images))
    rows = np.arange(3)
    for target, wanted in [
        (None, logits.max(1)),
        (2, logits[:, 2]),
        ([0, 1, 4], logits[rows, [0, 1, 4]]),
        ((1, [0, 1, 4]), logits[:, 1] - logits[rows, [0, 1, 4]]),
        (lambda logits: logits.sum(1), logits.sum(1)),
    ]:
        goal = targets.make_target(target, *tiny)
        found = targets.compute_scores(*tiny, goal)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_smooth_grad_is_the_mean_of_noisy_gradients(tiny):
    plain = gradients.gradient(*tiny, 1)
    found = gradients.smooth_grad(*tiny, 1, key=jax.random.key(0), samples=3, noise=0.0)
    np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-7)
    noisy = [gradients.smooth_grad(*tiny, 1, key=jax.random.key(n), samples=2) for n in (0, 0, 1)]
    np.testing.assert_array_equal(noisy[0], noisy[1])
    assert not np.allclose(noisy[0], noisy[2])
    assert not np.allclose(noisy[0], plain)


def test_summaries_over_channels():
    maps = jnp.array([[[[3.0, -4.0]]]])
    found = {how: gradients.summarize_channels(maps, how).item() for how in ("max", "sum", "norm")}
    assert found == {"max": 4.0, "sum": 7.0, "norm": 5.0}
    assert gradients.summarize_channels(maps, "signed").item() == -1.0
    with pytest.raises(UserError, match="expected max, sum, norm, signed, got 'mean'"):
        gradients.summarize_channels(maps, "mean")


def by_hand(x, kernels, rule):
    """The gradient by x of w2 . relu(w1 relu(x)), with another rule at each ReLU; NumPy."""
    first, second = kernels
    before1, hidden = x, np.maximum(x, 0)
    before2 = first @ hidden
    signal = second.copy()
    for before, back in ((before2, first.T), (before1, np.eye(len(x)))):
        signal = np.where(signal > 0, signal, 0) if rule != "gradient" else signal
        signal = np.where(before > 0, signal, 0) if rule != "deconvnet" else signal
        signal = back @ signal
    return signal


def test_backward_rules_by_hand():
    class TwoReLUs(nn.Module):
        @nn.compact
        def __call__(self, images, *, train=False):
            x = nn.relu(images.reshape(len(images), -1))
            x = nn.relu(nn.Dense(6, use_bias=False, name="hidden")(x))
            return nn.Dense(1, use_bias=False, name="head")(x)

    images = jax.random.normal(jax.random.key(3), (1, 2, 2, 2))
    variables = TwoReLUs().init(jax.random.key(4), images)
    params = variables["params"]
    kernels = np.asarray(params["hidden"]["kernel"]).T, np.asarray(params["head"]["kernel"])[:, 0]
    x = np.asarray(images).ravel()
    seen = {}
    for rule, method in (
        ("gradient", gradients.gradient),
        ("guided", backward_rules.guided_backprop),
        ("deconvnet", backward_rules.deconvnet),
    ):
        seen[rule] = np.asarray(method(TwoReLUs(), variables, images, 0)).ravel()
        np.testing.assert_allclose(seen[rule], by_hand(x, kernels, rule), rtol=1e-5, atol=1e-7)
    assert not np.allclose(seen["guided"], seen["deconvnet"])
    assert not np.allclose(seen["guided"], seen["gradient"])


class Brightness(nn.Module):
    """Logits: the sums of the upper and of the lower half of the image."""

    @nn.compact
    def __call__(self, images, *, train=False):
        half = images.shape[1] // 2
        return jnp.stack([images[:, :half].sum((1, 2, 3)), images[:, half:].sum((1, 2, 3))], 1)


def test_occlusion_of_a_sum_is_the_sum_below_the_window():
    images = jnp.arange(16.0).reshape(1, 4, 4, 1)
    found = perturbations.occlusion(Brightness(), {}, images, 0, window=2)
    upper = [[10, 18], [0, 0]]  # 0 + 1 + 4 + 5, 2 + 3 + 6 + 7
    np.testing.assert_allclose(found[0], np.kron(upper, np.ones((2, 2))))
    overlapping = perturbations.occlusion(Brightness(), {}, images, 0, window=3, stride=1)
    assert overlapping.shape == (1, 4, 4)
    corner = images[0, :2, :3, 0].sum()  # the only window that hides the first pixel
    np.testing.assert_allclose(overlapping[0, 0, 0], corner)


def test_rise_finds_the_half_that_counts():
    images = jnp.ones((1, 8, 8, 1))
    upper = lambda logits: logits[:, 0]  # noqa: E731
    given = dict(key=jax.random.key(0), masks=300, cells=4)
    found = perturbations.rise(Brightness(), {}, images, upper, **given)
    again = perturbations.rise(Brightness(), {}, images, upper, **given)
    np.testing.assert_array_equal(found, again)
    assert found[0, :4].mean() > 1.02 * found[0, 4:].mean()
    constant = perturbations.rise(Brightness(), {}, images, lambda x: 0 * x[:, 0] + 3.0, **given)
    assert constant.mean() == pytest.approx(3.0, rel=0.05)  # a mask's mean is `keep`


def test_deletion_and_insertion_of_a_sum():
    """Class 0 has the probability 1 / (1 + exp(lower - upper))."""
    images = jnp.array([[[[3.0], [1.0]], [[0.0], [0.0]]]])
    maps = images[..., 0]
    sigmoid = lambda x: 1 / (1 + np.exp(-np.array(x)))  # noqa: E731
    found = quality.deletion(Brightness(), {}, images, maps, 0, steps=4)
    curve = sigmoid([4.0, 1.0, 0.0, 0.0, 0.0])
    np.testing.assert_allclose(found, np.trapezoid(curve, dx=0.25), rtol=1e-5)
    found = quality.insertion(Brightness(), {}, images, maps, 0, steps=4, fill=0.0)
    curve = sigmoid([0.0, 3.0, 4.0, 4.0, 4.0])
    np.testing.assert_allclose(found, np.trapezoid(curve, dx=0.25), rtol=1e-5)
    worse = quality.deletion(Brightness(), {}, images, -maps, 0, steps=4)
    assert worse > quality.deletion(Brightness(), {}, images, maps, 0, steps=4)


def test_randomization_goes_from_the_head_down_one_layer_at_a_time(resnet):
    model, variables, images = resnet
    steps = list(quality.randomize(model, variables, images, jax.random.key(7)))
    order = [layer for layer, _ in steps]
    assert order[0] == "head"
    assert order[-1].startswith("stem/")
    assert len(order) == len(set(order)) == 1 + 2 * (1 + 2 * 5)  # head; conv and norm of each layer
    before = features.unroll(model, variables).variables
    old = pytree.flatten(before)
    for (layer, changed), lower in zip(steps, [*order[1:], None]):
        new = pytree.flatten(changed)
        if "norm" not in layer:  # a norm's scale and bias start from the same values
            path = f"params/{layer}/kernel"
            assert not np.allclose(new[path], old[path]), layer
        if lower and "norm" not in lower:
            path = f"params/{lower}/kernel"
            np.testing.assert_array_equal(new[path], old[path])


def test_rank_correlation_is_spearmans_of_absolute_values():
    maps = jnp.array([[[1.0, -2.0, 3.0]], [[1.0, 1.0, 1.0]]])
    found = quality.rank_correlation(maps, -2 * maps)
    assert found[0] == pytest.approx(1.0)
    assert np.isnan(found[1])
    assert quality.rank_correlation(maps, -maps, absolute=False)[0] == pytest.approx(-1.0)
