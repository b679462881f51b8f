"""The table of cheats, read off the marks of the tests: no text exists twice."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
README = HERE.parents[1] / "README.md"
BEGIN, END = "<!-- cheats -->\n", "<!-- end of cheats -->"
ROWS = 27


@dataclass(frozen=True)
class Claim:
    """A mark `cheat(row, name, counter, verdict)`; rows beyond the 27th are more than was asked."""

    row: int
    name: str
    counter: str
    verdict: str


def claims(folder: Path = HERE) -> list[Claim]:
    """Of every test in the folder, by row."""
    return sorted((c for path in sorted(folder.glob("test_*.py")) for c in _claims_of(path)), key=lambda c: c.row)


def _claims_of(path: Path) -> Iterator[Claim]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        for mark in getattr(node, "decorator_list", ()):
            if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.cheat":
                yield Claim(*[ast.literal_eval(argument) for argument in mark.args])


def heading(found: list[Claim]) -> str:
    """ "27 of 27 (and 1 more)"."""
    asked = {c.row for c in found if c.row <= ROWS}
    return f"{len(asked)} of {ROWS} (and {len(found) - len(asked)} more)"


def markdown(found: list[Claim]) -> str:
    """The table as README.md has it."""
    lines = [f"| {c.row} | {c.name} | {c.counter} | {c.verdict} |" for c in found]
    return "\n".join(["| # | cheat | what counters it | verdict |", "| --- | --- | --- | --- |", *lines, ""])


def in_readme() -> str:
    """What stands between the markers."""
    text = README.read_text(encoding="utf-8")
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)]


def write_readme(table: str) -> None:
    text = README.read_text(encoding="utf-8")
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    README.write_text(text[:start] + table + text[end:], encoding="utf-8")
