"""Trains a network.

flax-cnns train --workdir=runs/digits
flax-cnns train --workdir=runs/x --config=configs/cifar10_resnet110.py:smoke
flax-cnns train --workdir=runs/y --config.schedule.learning_rate=1e-3 --config.seed=1

If you repeat the command, the run continues where it stopped, bit-exactly. If the data changed
since the run began, the command ends with an error; with --accept-changed-data it continues.
"""

from __future__ import annotations

from absl import flags

from flax_cnns.cli.flags import define_accept, define_config

_WORKDIR = flags.DEFINE_string("workdir", None, "The run's directory.", required=True)
_CONFIG = define_config("digits_lenet5")
_ACCEPT = define_accept()
_PROFILE = flags.DEFINE_string(
    "profile",
    "",
    "FIRST:LAST, such as 100:110: trace these steps for TensorBoard and Perfetto, and write a"
    " summary of where their time goes. This changes nothing else.",
)
_CHECK = flags.DEFINE_bool(
    "check",
    False,
    "Only check, on all processes, what the run needs: versions, workdir, devices, data, one step."
    " Changes nothing. The exit code is 0 or 2.",
)


def train(argv: list[str]) -> int | None:
    if _CHECK.value:
        from flax_cnns.runs.preflight import check_run
        from flax_cnns.runtime import launch

        code = check_run(_CONFIG.value, _WORKDIR.value)
        launch.exit_if_distributed(code)  # an ordinary exit would wait for the slowest process
        return code
    from flax_cnns.runs.train import run  # imported here, so that a mistyped flag imports no JAX

    del argv
    run(
        _CONFIG.value,
        _WORKDIR.value,
        accept_changed_data=_ACCEPT.value,
        profile=_PROFILE.value,
    )
    return None
