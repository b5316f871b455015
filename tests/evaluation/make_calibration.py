"""Writes reference/calibration.npz: what four other libraries measure on made-up predictions.

pip install --no-deps torchmetrics==1.9.0 netcal==1.4.0 torch-uncertainty==0.13.0
pip install lightning einops seaborn scikit-learn
python -m tests.evaluation.make_calibration

torchmetrics and netcal measure ECE. netcal's ECE(equal_intervals=False) has bins of equal mass (its
ACE is another measure). torch-uncertainty measures adaptive and classwise ECE, and AURC by the
trapezoid rule from coverage 1/N; scikit-learn the Brier score. The temperature is PyTorch's L-BFGS
in float64.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.models import foreign

PATH = Path(__file__).parent / "reference" / "calibration.npz"
SIZES = {"even": 450, "odd": 101}  # a multiple of 15 bins, and no multiple
CLASSES = 5


def make_cases() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns {name: (logits f32 [N 5], labels i64 [N])} of a network that is too sure. No two
    confidences are equal, and none is within 1e-6 of an edge of the 15 bins."""
    cases = {}
    for seed, (name, images) in enumerate(SIZES.items()):
        rng = np.random.default_rng(seed)
        logits = rng.normal(size=(images, CLASSES))
        labels = np.argmax(logits + rng.gumbel(size=logits.shape) * 0.7, -1)
        logits = (2.5 * logits).astype(np.float32)
        confidence = softmax(logits).max(-1)
        assert len(np.unique(confidence)) == images
        assert np.abs(confidence[:, None] - np.linspace(0, 1, 16)).min() > 1e-6
        cases[name] = logits, labels
    return cases


def softmax(logits: np.ndarray) -> np.ndarray:
    """In float64, written anew."""
    powers = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def measure_by_others(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    import torch
    from netcal.metrics import ECE
    from sklearn.metrics import brier_score_loss, log_loss
    from torch_uncertainty.metrics.classification import (
        AURC,
        AdaptiveCalibrationError,
        ClasswiseCalibrationError,
    )
    from torchmetrics.functional.classification import multiclass_calibration_error

    probabilities = softmax(logits)
    # Their states are float32 by default.
    torch.set_default_dtype(torch.float64)
    given = torch.tensor(probabilities), torch.tensor(labels)

    def by_class(metric, **fields):
        metric = metric(**fields).set_dtype(torch.float64)
        metric.update(*given)
        return float(metric.compute())

    fields = dict(task="multiclass", num_classes=CLASSES, num_bins=15)
    found = {
        "ece_torchmetrics": float(multiclass_calibration_error(*given, CLASSES, n_bins=15)),
        "ece_netcal": float(ECE(15).measure(probabilities, labels)),
        "adaptive_ece_torch_uncertainty": by_class(AdaptiveCalibrationError, **fields),
        "classwise_ece_torch_uncertainty": by_class(
            ClasswiseCalibrationError, num_classes=CLASSES, num_bins=15
        ),
        "aurc_torch_uncertainty": by_class(AURC),
        "brier_sklearn": brier_score_loss(labels, probabilities, scale_by_half=False),
        "nll_sklearn": log_loss(labels, probabilities),
        "temperature_torch": fit_by_torch(logits, labels),
    }
    if len(labels) % 15 == 0:  # netcal's bins end at quantiles, and differ otherwise
        found["adaptive_ece_netcal"] = float(
            ECE(15, equal_intervals=False).measure(probabilities, labels)
        )
    return found


def fit_by_torch(logits: np.ndarray, labels: np.ndarray) -> float:
    import torch

    given, truth = torch.tensor(logits, dtype=torch.float64), torch.tensor(labels)
    temperature = torch.ones(1, dtype=torch.float64, requires_grad=True)
    options = dict(tolerance_grad=1e-14, tolerance_change=1e-16, line_search_fn="strong_wolfe")
    optimizer = torch.optim.LBFGS([temperature], lr=0.5, max_iter=500, **options)

    def find_loss():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(given / temperature, truth)
        loss.backward()
        return loss

    optimizer.step(find_loss)
    return float(temperature.detach())


def main() -> None:
    foreign.torchvision()  # torchmetrics imports it, and it needs help
    arrays = {}
    for name, (logits, labels) in make_cases().items():
        arrays |= {f"{name}/logits": logits, f"{name}/labels": labels.astype(np.int8)}
        for metric, value in measure_by_others(logits, labels).items():
            print(f"{name} {metric} {value:.9f}")
            arrays[f"{name}/{metric}"] = np.float64(value)
    np.savez_compressed(PATH, **arrays)


if __name__ == "__main__":
    main()
