"""README.md's table is what the tests say, and no row is missing."""

from __future__ import annotations

from table import ROWS, claims, heading, in_readme, markdown


def test_every_row_has_exactly_one_cheat_and_there_is_one_more():
    found = claims()
    assert [c.row for c in found] == list(range(1, ROWS + 2))
    assert {c.verdict for c in found} == {"refused", "charged"}
    assert heading(found) == "27 of 27 (and 1 more)"


def test_the_readme_has_the_table_of_the_tests():
    assert in_readme() == markdown(claims()), "run `make cheats`"
