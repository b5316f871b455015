"""Writes reference/*.npz: saliency of captum and pytorch-grad-cam on torchvision's networks.

    pip install --no-deps captum==0.8.0 grad-cam==1.5.7 ttach && pip install opencv-python-headless
    python -m tests.analysis.explain.make_reference

Weights and images are those of `tests/models/foreign`. Maps are raw: no ReLU, no resizing, no
scaling. Of maps as large as the image every third pixel is kept.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.models import foreign

FOLDER = Path(__file__).parent / "reference"
TARGETS = [3, 7]
IG_STEPS = 8
WINDOW, STRIDE = 16, 8


class Network(NamedTuple):
    family: str  # whose CASE in tests/models/foreign has the network
    path: str  # of ours: the module whose maps are weighed
    layer: str  # the same in torchvision's
    rules: bool  # captum has guided backpropagation and deconvnet for it


NETWORKS = {
    "resnet18": Network("resnet", "stage3", "layer3", False),
    "squeezenet1_1": Network("squeezenet", "fire5", "features.7", True),
}


def theirs(network: Network) -> dict[str, np.ndarray]:
    """{method: raw map} of two images, channels last."""
    foreign.torchvision()  # pytorch-grad-cam imports it, and it needs help
    import torch
    from captum import attr
    from pytorch_grad_cam import GradCAMPlusPlus, LayerCAM

    case = foreign.CASES[network.family]
    assert case.build is not None
    live = foreign.load(case.build(), case.source, foreign.gain(case.name))
    model = live.model.eval()
    for module in model.modules():
        if isinstance(module, torch.nn.ReLU):
            module.inplace = False
    images = torch.from_numpy(foreign.images(2, case.size).transpose(0, 3, 1, 2)).contiguous()
    targets, layer = torch.tensor(TARGETS), model.get_submodule(network.layer)

    def pixels(attribution: Any, **given: Any) -> np.ndarray:
        found = attribution(model).attribute(images.clone(), target=targets, **given)
        return found.detach().numpy().transpose(0, 2, 3, 1)

    def weighed(method: Callable) -> np.ndarray:
        with method(model=model, target_layers=[layer]) as cam:
            logits = cam.activations_and_grads(images.clone())
            logits[torch.arange(2), targets].sum().backward()
            seen = cam.activations_and_grads
            maps, gradients = seen.activations[0].numpy(), seen.gradients[0].numpy()
            return cam.get_cam_image(images, layer, None, maps, gradients, False)

    grad_cam = attr.LayerGradCam(model, layer).attribute(images.clone(), target=targets)
    occlusion = attr.Occlusion(model).attribute(
        images.clone(), (3, WINDOW, WINDOW), (3, STRIDE, STRIDE), target=targets
    )
    maps = {
        "gradient": pixels(attr.Saliency, abs=False),
        "gradient_times_input": pixels(attr.InputXGradient),
        "integrated_gradients": pixels(
            attr.IntegratedGradients, n_steps=IG_STEPS, method="riemann_middle"
        ),
        "occlusion": occlusion.detach().numpy()[:, 0, :, :],
        "grad_cam": grad_cam.detach().numpy()[:, 0],
        "grad_cam_plus_plus": weighed(GradCAMPlusPlus),
        "layer_cam": weighed(LayerCAM),
    }
    if network.rules:
        maps["guided_backprop"] = pixels(attr.GuidedBackprop)
        maps["deconvnet"] = pixels(attr.Deconvolution)
    return {name: thin_out(found, case.size) for name, found in maps.items()}


def thin_out(maps: np.ndarray, size: int) -> np.ndarray:
    """Every third pixel of maps as large as the image, smaller maps whole."""
    return (maps[:, ::3, ::3] if maps.shape[1] == size else maps).astype(np.float32)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, network in NETWORKS.items():
        path = FOLDER / f"{name}.npz"
        np.savez_compressed(path, **theirs(network))
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    sys.exit(main())
