"""docs/networks.md agrees with the tables that it is made from."""

from __future__ import annotations

import re
from pathlib import Path

from flax_cnns.models.registry import list_models
from tests import parity
from tests.models.page import RESULTS, make_page, read_table
from tests.models.published import PUBLISHED

PAGE = Path(__file__).parents[2] / "docs/networks.md"


def test_the_page_is_that_of_the_tables():
    message = "write it again: python -m tests.models.page > docs/networks.md"
    assert PAGE.read_text() == make_page(), message


def test_every_network_is_a_row_with_its_parameters():
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([\d,]+) \|", PAGE.read_text(), re.MULTILINE)
    shown = {name: int(number.replace(",", "")) for name, number in rows}
    assert len(rows) == len(shown)
    assert set(shown) == set(list_models())
    assert shown == {name: row.params for name, row in PUBLISHED.items()}  # test_contract.py counts


def test_recorded_comparisons_are_of_networks_as_they_are_and_passed():
    for row in read_table("parity"):
        assert int(row["params"]) == PUBLISHED[row["network"]].params, row
        assert float(row["difference"]) <= 1e-4 < float(row["control"]), row


def test_comparisons_are_entered_in_place_of_older_ones(tmp_path):
    path, old = tmp_path / "parity.csv", parity.TABLE.read_text()
    path.write_text(old)
    row = "keras_resnet50,Keras,25583592,224,7.0e-06,1.8e-01\n"
    assert row in old
    result = parity.Result("keras_resnet50", "keras", 25583592, 224, 1.0, 1.0, 8e-6, 0.2, "", 0.0)
    parity.update_table([result], path)
    assert path.read_text() == old.replace(row, row.replace("7.0e-06,1.8e-01", "8.0e-06,2.0e-01"))


def test_a_recorded_accuracy_stands_in_the_page_that_it_names():
    for row in read_table("accuracy"):
        text = (RESULTS / row["page"]).read_text()
        assert row["network"] in list_models()
        assert f"{row['accuracy']} %" in text, row
        assert row["network"] in text, row
