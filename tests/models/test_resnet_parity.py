"""Our ResNets compute what torchvision's do: one recorded, others side by side if it is installed.

Weights, statistics and images follow from names and shapes (reference_case), so both sides have
them. Compared are logits in evaluation, logits in training, and one norm's statistics after it.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

from flax_cnns import pytree
from flax_cnns.registry import create_model, init_variables
from tests.models import make_reference
from tests.models import reference_case as case


def check(name: str, images: np.ndarray, last_norm: str, last_size: int, torch_side) -> None:
    """`torch_side(variables)` gives PyTorch's outputs; `last_size`: side of the last maps."""
    model = create_model(name, num_classes=10)
    variables = case.fill(jax.eval_shape(lambda: init_variables(model, jax.random.key(0))))

    @jax.jit
    def ours(variables):
        train_logits, state = model.apply(variables, images, train=True, mutable=["batch_stats"])
        return model.apply(variables, images), train_logits, state["batch_stats"]

    logits, train_logits, stats = ours(variables)
    expected = torch_side(variables)
    for got, wanted in [
        (logits, expected["logits"]),
        (train_logits, expected["train_logits"]),
    ]:
        # Against what tells the images apart, not against the logits, which are far from zero.
        spread = np.ptp(wanted, axis=0).max()
        assert np.abs(got - wanted).max() < 3e-4 * spread
    mean, var = (pytree.flatten(stats)[f"{last_norm}/{leaf}"] for leaf in ("mean", "var"))
    np.testing.assert_allclose(mean, expected["mean"], atol=1e-4)
    # PyTorch keeps the unbiased variance of n values, Flax the biased one.
    n = len(images) * last_size**2
    old = variables["batch_stats"]
    for part in f"{last_norm}/var".split("/"):
        old = old[part]
    unbiased = 0.9 * old + (np.asarray(var) - 0.9 * old) * n / (n - 1)
    np.testing.assert_allclose(unbiased, expected["var"], atol=1e-4)


def test_recorded_resnet18():
    recorded = dict(np.load(case.FOLDER / "resnet18.npz"))
    check("resnet18", case.images(2, 64), "stage4/block2/norm2", 2, lambda _: recorded)


@pytest.fixture(scope="module")
def torchvision():
    pytest.importorskip("torch")
    return make_reference.import_torchvision()


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("name", "last"), [("resnet18", "stage4/block2/norm2"), ("resnet50", "stage4/block3/norm3")]
)
def test_torchvision(torchvision, name, last):
    images = case.images(2, 97)  # an odd size: every halving rounds

    def torch_side(variables):
        model = getattr(torchvision.models, name)(num_classes=10)
        make_reference.carry(variables, model)
        norm = case.torch_name(f"batch_stats/{last}/mean").removesuffix(".running_mean")
        return make_reference.outputs(model, images, norm)

    check(name, images, last, 4, torch_side)


@pytest.mark.oracle
def test_cifar_resnet20_out_of_torchvisions_blocks(torchvision):
    """torchvision has no CIFAR ResNet: its basic block, with option A, makes one."""
    from torch import nn
    from torch.nn import functional

    class OptionA(nn.Module):
        def forward(self, x):
            return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, x.shape[1]))

    class CifarResNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
            self.layer1, self.layer2, self.layer3 = (
                nn.Sequential(
                    block(width if stride == 1 else width // 2, width, stride, downsample),
                    block(width, width),
                    block(width, width),
                )
                for width, stride, downsample in [
                    (16, 1, None),
                    (32, 2, OptionA()),
                    (64, 2, OptionA()),
                ]
            )
            self.fc = nn.Linear(64, 10)

        def forward(self, x):
            x = functional.relu(self.bn1(self.conv1(x)))
            return self.fc(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))

    block = torchvision.models.resnet.BasicBlock
    images = case.images(4, 30)

    def torch_side(variables):
        model = CifarResNet()
        make_reference.carry(variables, model)
        return make_reference.outputs(model, images, "layer3.2.bn2")

    check("cifar_resnet20", images, "stage3/block3/norm2", 8, torch_side)
