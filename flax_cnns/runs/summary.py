"""Makes the content of `summary.json`, which describes a complete run."""

from __future__ import annotations

import platform
from typing import Any

import flax
import jax

from flax_cnns import tree as pytree
from flax_cnns.runs.plan import RunPlan
from flax_cnns.train import loop


def make_summary(
    plan: RunPlan, outcome: loop.TrainOutcome, host: loop.HostState, test_metrics: dict[str, Any]
) -> dict[str, Any]:
    """Returns the content of `summary.json`."""
    components, device = plan.components, jax.devices()[0]
    dataset, own = components.dataset, components.describe_own_parts()
    best = {"validation/best_accuracy": None, f"validation/best_{plan.best_by}": host.best}
    return {
        "model": components.config.model.name,
        "params": pytree.count(outcome.state.params),
        "dataset": dataset.name,
        "seed": components.config.seed,
        "step": outcome.step,
        "epochs": outcome.step / plan.steps_per_epoch,
        **test_metrics,
        **best,
        "stopped_early": host.stopped,
        "bad_steps": host.bad_steps,
        "normalized_by": dataset.normalized_by,
        "images": {role: len(split) for role, split in dataset.splits.items()},
        "left_out": dict(dataset.left_out),
        "files_of_several_pictures": len(dataset.multi_frame_files),
        "damaged_images": sorted(dataset.damaged),
        "seconds": host.seconds,
        "seconds_to_first_step": outcome.seconds_to_first_step,
        "images_per_second": outcome.images_per_second,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "device": f"{device.platform} {device.device_kind}",
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "flax": flax.__version__,
        },
        **({"own": own} if own else {}),
    }
