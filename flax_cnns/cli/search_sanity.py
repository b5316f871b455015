"""`search sanity`: the checks of a config that come before any search, by the command's flags."""

from __future__ import annotations

from typing import Any

from absl import flags

FLAGS = flags.FLAGS
EXIT_NOT_SANE = 1  # something is wrong with the config


def check_sanity(config: Any) -> int:
    """Makes the checks and prints what they say. Returns the exit code."""
    from flax_cnns.studies.search import sanity
    from flax_cnns.studies.search.sanity.page import format_terminal

    checks = FLAGS.checks or sanity.CHECKS
    report = sanity.check_sanity(config, FLAGS.workdir or None, checks=checks, steps=FLAGS.steps)
    print(format_terminal(report.findings))
    return 0 if report.is_sane else EXIT_NOT_SANE
