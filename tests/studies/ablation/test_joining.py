"""Reports of several pieces of an ablation, made from their report.csv."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from scipy import stats

from flax_cnns.analysis.plots import forest
from flax_cnns.errors import UserError
from flax_cnns.studies.ablation import joining

FIELDS = ["row", "seeds", "complete", "failed", "diverged", "interrupted", "damaged", "missing"]
FIELDS += ["accuracy", "gap", "parameters", "macs", "seconds_per_step", "seconds"]
FIRST = {
    "none": [0.90, 0.91, 0.92],
    "mixup": [0.91, 0.922, 0.934],  # differences 0.010, 0.012, 0.014
    "lone": [0.95, None, None],
}
SECOND = {
    "none": [0.80, 0.82, 0.81],  # another baseline, for the rows below
    "cutout": [0.81, 0.82, 0.83],  # differences 0.01, 0.00, 0.02
}


def write_piece(path, rows, *, parameters=100, **changes):
    """Writes a report.csv with the columns that a join reads; `changes`: {column: text}."""
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        out = csv.DictWriter(file, [*FIELDS, *(f"accuracy_seed{s}" for s in range(3))], restval="0")
        out.writeheader()
        for name, values in rows.items():
            missing = sum(value is None for value in values)
            line = {"row": name, "seeds": 3, "complete": 3 - missing, "failed": missing}
            line |= {"parameters": parameters, "gap": 0.07, "macs": "", "seconds_per_step": ""}
            line |= {f"accuracy_seed{s}": value for s, value in enumerate(values)}
            out.writerow(line | changes)
    return path


@pytest.fixture
def pieces(tmp_path):
    return [
        write_piece(tmp_path / "a" / "report.csv", FIRST),
        write_piece(tmp_path / "b" / "report.csv", SECOND),
    ]


def read(path):
    with path.open() as file:
        return {(line["piece"], line["row"]): line for line in csv.DictReader(file)}


def test_rows_are_compared_within_their_piece_and_corrected_over_all(pieces, tmp_path, monkeypatch):
    drawn = {}
    keep = lambda rows, png, **words: drawn.update(rows=rows, **words)  # noqa: E731
    monkeypatch.setattr(forest, "draw_forest", keep)
    a, b = (path.as_posix() for path in pieces)
    joining.join(pieces, tmp_path / "joined", margin=3.0, power=1.0)
    rows = read(tmp_path / "joined/report.csv")
    assert list(rows) == [(a, "none"), (a, "mixup"), (a, "lone"), (b, "none"), (b, "cutout")]
    p_mixup = stats.ttest_1samp([0.010, 0.012, 0.014], 0).pvalue
    p_cutout = stats.ttest_1samp([0.01, 0.0, 0.02], 0).pvalue
    expected = [0.012, p_mixup, 2 * p_mixup]
    mixup, cutout = rows[a, "mixup"], rows[b, "cutout"]
    names = ("difference", "p", "p_holm")
    np.testing.assert_allclose([float(mixup[name]) for name in names], expected)
    np.testing.assert_allclose([float(cutout[name]) for name in names], [0.01, p_cutout, p_cutout])
    assert (rows[a, "lone"]["p"], rows[a, "lone"]["failed"]) == ("", "2")
    assert float(mixup["p_equivalent"]) < 0.01 < float(cutout["p_equivalent"])
    assert int(mixup["seeds_needed"]) < int(cutout["seeds_needed"])
    markdown = (tmp_path / "joined/report.md").read_text()
    assert "3 rows × 3 seeds in 2 pieces, each with its own baseline `none`." in markdown
    assert "| mixup | 1 | 3 of 3 | 92.20 [89.22, 95.18] |" in markdown
    assert "| **+1.20 [+0.70, +1.70]** | 0.009 | 0.018 | equivalent" in markdown
    assert "| cutout | 2 | 3 of 3 |" in markdown
    assert f"1. `{a}`\n2. `{b}`\n" in markdown
    assert "Not all seeds are complete: lone (2 failed)." in markdown
    assert [row.name for row in drawn["rows"]] == ["mixup (1)", "lone (1)", "cutout (2)"]
    assert drawn["rows"][2].seeds == pytest.approx([1.0, 0.0, 2.0])
    assert drawn["title"] == "against none (1): 91.00 %, n=3; none (2): 81.00 %, n=3"


def test_a_joined_report_can_be_joined_again(pieces, tmp_path, monkeypatch):
    written = joining.join(pieces, tmp_path / "joined")
    assert all(path.stat().st_size > 100 for path in written)
    monkeypatch.setattr(forest, "draw_forest", lambda *_, **words: None)
    more = write_piece(tmp_path / "c.csv", {"none": FIRST["none"], "erase": SECOND["cutout"]})
    joining.join([tmp_path / "joined/report.csv", more], tmp_path / "again")
    joining.join([*pieces, more], tmp_path / "at_once")
    for name in ("report.csv", "report.md"):
        again, at_once = (tmp_path / folder / name for folder in ("again", "at_once"))
        assert again.read_text() == at_once.read_text().replace("at_once", "again")
    markdown = (tmp_path / "again/report.md").read_text()
    assert f"3. `{more.as_posix()}`; its baseline has the values of piece 1" in markdown


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (FIRST, {}, "row mixup is in .*a/report.csv and in .*c.csv: a row may be in one piece"),
        ({"plain": [0.9] * 3}, {}, r"the baseline \(the first row\) is none there, plain here"),
        (SECOND, {"parameters": 7}, "network has 100 parameters there, 7 here"),
        (SECOND, {"accuracy_seed1": 81.0}, "line 2 is damaged: expected accuracy from 0 to 1, got"),
        (SECOND, {"accuracy_seed1": "inf"}, "line 2 is damaged: expected finite values"),
        (SECOND, {"seeds": "x"}, "line 2 is damaged: invalid literal"),
        ({}, {}, "c.csv has no rows"),
    ],
)
def test_what_cannot_be_joined(pieces, tmp_path, rows, changes, message):
    other = write_piece(tmp_path / "c.csv", rows, **changes)
    with pytest.raises(UserError, match=message):
        joining.join([pieces[0], other], tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


def test_other_files_and_the_folder_of_an_ablation(pieces, tmp_path):
    (tmp_path / "trials.csv").write_text("row,trial\nnone,0\n")
    for file, message in (
        ("lost.csv", "cannot read .*lost.csv: No such file"),
        ("trials.csv", "expected the report.csv of an ablation; it has no column 'seeds'"),
        ("a/report.csv", "a/report.csv is given twice"),
    ):
        with pytest.raises(UserError, match=message):
            joining.join([pieces[0], tmp_path / file], tmp_path / "joined")
    with pytest.raises(UserError, match="has no seeds of 'accurcy'; did you mean 'accuracy'"):
        joining.join(pieces, tmp_path / "joined", metric="accurcy")
    (tmp_path / "a" / "ablation.json").write_text("{}")
    with pytest.raises(UserError, match="its own report would be replaced"):
        joining.join(pieces, tmp_path / "a")
