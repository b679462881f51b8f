"""What others' formulas say of the same explanations, as a table of its own: estimates, never added up."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from mdl.ledger import Score
from mdl.report.figures import human

# What ours charges, by column, for comparison.
OURS = ("state", "residual")


def published_table(scores: Sequence[Score]) -> Table | None:
    """Ours beside each formula, bits a token; None where no formula applies to any of the scores."""
    names = list(dict.fromkeys(name for s in scores for name in s.published))
    if not names:
        return None
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", overflow="fold", min_width=12)
    for name in (*(f"our {column}" for column in OURS), *names):
        table.add_column(Text(_header(name)), justify="right", no_wrap=True)
    for score in scores:
        if score.published:
            ours = [human(score.column(column)) for column in OURS]
            theirs = [_cell(score, name) for name in names]
            table.add_row(Text(score.explanation), *map(Text, (*ours, *theirs)))
    return table


def _cell(score: Score, name: str) -> str:
    return human(score.published[name].value) if name in score.published else ""


def _header(name: str) -> str:
    """A word a line."""
    return name.replace(", ", " ").replace(" ", "\n").replace("block-", "block-\n")
