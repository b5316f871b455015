"""Writes reference/resnet18.npz: what torchvision computes from the weights of reference_case.

    pip install torch==2.13.0 pillow && pip install --no-deps torchvision==0.28.0
    python -m tests.models.make_reference

`logits` with running statistics and `train_logits` with the batch's, [2 10] each; `mean` and `var`:
the last norm's statistics after that training step, [512] each.
"""

from __future__ import annotations

import jax
import numpy as np

from experiments.benchmarks.torch_side import import_torchvision
from flax_cnns import pytree
from flax_cnns.registry import create_model, init_variables
from tests.models import reference_case as case


def carry(variables: dict, model) -> None:
    """Our variables into a torch model; what one side has and the other lacks raises."""
    import torch

    state = {
        case.torch_name(path): torch.from_numpy(case.torch_layout(np.asarray(array)))
        for path, array in pytree.flatten(variables).items()
    }
    counters = {key: value for key, value in model.state_dict().items() if key.endswith("tracked")}
    model.load_state_dict(state | counters, strict=True)


def outputs(model, images: np.ndarray, last_norm: str) -> dict[str, np.ndarray]:
    """Logits in evaluation, logits in training, and the last norm's statistics after it."""
    import torch

    x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    with torch.no_grad():
        out = {"logits": model.eval()(x), "train_logits": model.train()(x)}
    norm = model.get_submodule(last_norm)
    out |= {"mean": norm.running_mean, "var": norm.running_var}
    return {key: value.numpy().copy() for key, value in out.items()}


def main() -> None:
    shapes = jax.eval_shape(
        lambda: init_variables(create_model("resnet18", num_classes=10), jax.random.key(0))
    )
    model = import_torchvision().models.resnet18(num_classes=10)
    carry(case.fill(shapes), model)
    case.FOLDER.mkdir(exist_ok=True)
    np.savez(case.FOLDER / "resnet18.npz", **outputs(model, case.images(2, 64), "layer4.1.bn2"))


if __name__ == "__main__":
    main()
