"""Our networks compute what other libraries' do: recorded always, live if they are installed."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from flax_cnns import tree as pytree
from flax_cnns.errors import UserError
from flax_cnns.models import registry
from flax_cnns.models.registry import create_model, init_variables
from flax_cnns.weights import convert, name_maps
from flax_cnns.weights import resnet as resnet_rules
from tests import parity
from tests.models import cases, foreign, make_reference

WITH_SOURCE = sorted(
    family.__name__.rpartition(".")[2]
    for family in registry.FAMILIES
    if getattr(family, "SOURCES", {})
)


def test_every_family_with_an_independent_implementation_has_a_case():
    assert sorted(foreign.CASES) == WITH_SOURCE


# These compile for seconds. The others cover every kind of name map and every library.
LONG = {"convnext", "efficientnet", "googlenet", "inception_resnet", "inception_v3", "inception_v4"}
LONG |= {"mobilenet_v1", "mobilenet_v3", "nasnet", "pnasnet", "resnext", "senet", "wide_resnet"}
LONG |= {"xception"}
LONG |= {"densenet", "resnet", "vgg"}  # have quick cases in NumPy


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=[pytest.mark.slow] if family in LONG else [])
        for family in foreign.CASES
    ],
)
def test_recorded(family):
    case = foreign.CASES[family]
    tensors, wanted = cases.load(
        cases.FOLDER / f"{family}.npz", case.source, foreign.gain(case.name)
    )
    got, apply = cases.run_ours(case, tensors)
    cases.check_outputs(got, wanted)
    # The comparison fails if one tensor of each kind is drawn again.
    variables = convert(case.name, tensors, case.source, **case.fields, say=pytest.fail)
    last = {}
    for path in pytree.flatten(variables):
        if "/aux" not in path:
            last[path.rpartition("/")[2]] = path  # the last one, which no later layer can hide
    for path in last.values():
        flat = pytree.flatten(variables)
        flat[path] = foreign.redraw(
            f"again.{path}", flat[path].shape, "keras", foreign.gain(case.name)
        )
        wrong = np.asarray(apply(pytree.unflatten(flat)))
        with pytest.raises(AssertionError):
            cases.check_outputs(cases.Outputs(wrong), cases.Outputs(wanted.logits))


@pytest.mark.slow
@pytest.mark.oracle
@pytest.mark.parametrize("family", foreign.CASES)
def test_live(family):
    case = foreign.CASES[family]
    pytest.importorskip("keras" if case.source == "keras" else "torch")
    tensors, wanted = cases.run_theirs(case)
    recorded, outputs = cases.load(
        cases.FOLDER / f"{family}.npz", case.source, foreign.gain(case.name)
    )
    assert {n: a.shape for n, a in tensors.items()} == {n: a.shape for n, a in recorded.items()}
    np.testing.assert_allclose(outputs.logits, wanted.logits, rtol=1e-3)
    cases.check_outputs(cases.run_ours(case, tensors)[0], wanted)


@pytest.mark.oracle
def test_cifar_resnet20_out_of_torchvisions_blocks():
    """torchvision has no CIFAR ResNet; its basic block with option A makes one."""
    pytest.importorskip("torch")
    from torch import nn
    from torch.nn import functional

    block = foreign.torchvision().models.resnet.BasicBlock

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

    live, x = foreign.load(CifarResNet(), "torchvision"), foreign.images(4, 30)
    model = create_model("cifar_resnet20")
    shapes = pytree.flatten(jax.eval_shape(lambda: init_variables(model, jax.random.key(0))))
    rules = resnet_rules.torch_rules(create_model("resnet18"))
    given = (rules, live.tensors, "torchvision", shapes, "cifar_resnet20")
    variables = name_maps.make_tree(name_maps.apply_rules(*given), shapes, "cifar_resnet20")
    got = np.asarray(jax.jit(model.apply)(variables, x))
    cases.check_outputs(cases.Outputs(got), cases.Outputs(foreign.logits(live, x, "torchvision")))


@pytest.mark.parametrize("error", [UserError("no torch"), ModuleNotFoundError("no torch")])
def test_a_missing_library_is_reported_in_one_line(error, monkeypatch, tmp_path, capsys):
    def build(*_):
        raise error

    monkeypatch.setattr(foreign, "build", build)
    with pytest.raises(SystemExit, match="2"):
        parity.main(["alexnet", "--results", str(tmp_path / "parity.json")])
    assert "cannot import torchvision: no torch; --help shows" in capsys.readouterr().err


def test_make_reference_names_what_it_knows(capsys):
    with pytest.raises(SystemExit, match="2"):
        make_reference.main(["vgg11"])
    assert "unknown: vgg11; known: " in capsys.readouterr().err
