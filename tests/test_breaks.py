from tests import breaks


def test_every_deliberate_break_still_finds_its_line():
    """`python -m tests.breaks` checks that tests notice the breaks, in a quarter of an hour."""
    assert [each.what for each in breaks.BREAKS if breaks.is_stale(each)] == []


def test_each_package_has_a_break():
    packages = {path.parent.name for path in (breaks.ROOT / "flax_cnns").glob("*/__init__.py")}
    broken = {each.file.split("/")[1] for each in breaks.BREAKS}
    assert packages <= broken
