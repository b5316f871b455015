"""The lectures' checks before any search: data, initial loss, layers, overfitting, rate, capacity.

    report = check_sanity(config, "runs/sanity")
    print(report.is_sane, *report.findings, sep="\\n")

`bench` builds the network, data and steps of a config. `inputs`, `initial` and `trainings` measure:
they return plain numbers. `verdict` says what the numbers mean, and `page` and `pictures` show it.
"""

from flax_cnns.studies.search.sanity.check import CHECKS, SanityReport, check_sanity
from flax_cnns.studies.search.sanity.findings import SanityFinding

__all__ = ["CHECKS", "SanityFinding", "SanityReport", "check_sanity"]
