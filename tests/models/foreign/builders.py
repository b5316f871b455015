"""Builds other libraries' networks, whole or shortened; the families' files use these functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Case(NamedTuple):
    """A comparison of our network with another library's."""

    name: str  # our network
    source: str
    size: int  # height and width of the images
    fields: Mapping[str, Any] = {}  # make our network short
    build: Callable[[], Any] | None = None  # builds theirs, as short; None: the published network
    train: bool = False  # also compares a training step


def torchvision() -> Any:
    from experiments.benchmarks.torch_side import import_torchvision

    return import_torchvision()


def identity(model: Any, *modules: str) -> Any:
    """Replaces blocks that keep the shape by the identity."""
    from torch import nn

    for path in modules:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, nn.Identity())
    return model


def of_torchvision(name: str, *without: str, **given: Any) -> Callable[[], Any]:
    def build() -> Any:
        models = torchvision().models
        return identity(getattr(models, name)(num_classes=10, **given), *without)

    return build


def of_timm(name: str, *without: str) -> Callable[[], Any]:
    def build() -> Any:
        torchvision()  # timm imports torchvision, which must be imported this way first
        import timm

        return identity(timm.create_model(name, num_classes=10), *without)

    return build


def narrow(model: Any, first: int, hidden: int = 64) -> Any:
    """Replaces the fully connected layers of AlexNet or VGG by narrow ones."""
    from torch import nn

    widths = iter([(first, hidden), (hidden, hidden), (hidden, 10)])
    for i, module in enumerate(model.classifier):
        if isinstance(module, nn.Linear):
            model.classifier[i] = nn.Linear(*next(widths))
    return model


def two_stages(model: Any, head: str) -> Any:
    """Cuts off a ResNet with bottlenecks after its second stage."""
    from torch import nn

    setattr(model, head, nn.Linear(512, 10))
    return identity(model, "layer3", "layer4")
