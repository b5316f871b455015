"""Each family that another library has comes with a table of rules for that library."""

import importlib
import re

import pytest

from flax_cnns.models import registry
from flax_cnns.models.registry import create_model
from flax_cnns.weights import name_maps

WITH_SOURCES = [family for family in registry.FAMILIES if getattr(family, "SOURCES", {})]


@pytest.mark.parametrize("family", WITH_SOURCES, ids=lambda family: family.__name__.split(".")[-1])
def test_a_family_has_rules_for_its_sources_and_no_others(family):
    name = family.__name__.rpartition(".")[2]
    tables = importlib.import_module(f"flax_cnns.weights.{name}").TABLES
    sources = {source: model for model, of in family.SOURCES.items() for source in of}
    assert tables.keys() == sources.keys()
    assert tables.keys() <= name_maps._STYLES.keys() == name_maps._EXPECTED.keys()
    for source, model in sources.items():
        table = tables[source]
        rules = list(table(create_model(model)) if callable(table) else table)
        targets = [target for _, target, *_ in rules if isinstance(target, str)]
        assert any(re.fullmatch(r"head|\\\d", target) for target in targets), "which is the head?"
