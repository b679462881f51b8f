"""What a verification found, as a table: a line a score, and every figure that does not agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

SHOWN_FIGURES = 8  # of those that do not agree, a score


def print_findings(findings: Sequence[Any], console: Console, everything: bool) -> None:
    """Print findings with `score`, `figure`, `claimed`, `found` and `agrees`; all of them, or in summary."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for header in ("score", "figure", "claimed", "found", ""):
        table.add_column(header, header_style="dim", overflow="fold")
    verdict: str | Text
    for score in dict.fromkeys(f.score for f in findings):
        mine = [f for f in findings if f.score == score]
        wrong = [f for f in mine if not f.agrees]
        if not wrong and not everything:
            table.add_row(score, f"{len(mine)} figures", "", "", Text("agree", style="green"))
        shown = mine if everything else wrong[:SHOWN_FIGURES]
        for f in shown:
            verdict = Text("agrees", style="green") if f.agrees else Text("DISAGREES", style="bold red")
            table.add_row(f.score, f.figure, _figure(f.claimed), _figure(f.found), verdict)
        if len(wrong) > len(shown):
            table.add_row(score, f"and {len(wrong) - len(shown)} more", "", "", Text("DISAGREE", style="bold red"))
    console.print(table)
    disagree = sum(not f.agrees for f in findings)
    verdict = "all agree" if not disagree else f"{disagree} DISAGREE"
    console.print(f"{len(findings):,} figures recomputed from decoded messages: {verdict}")


def _figure(value: Any) -> str:
    text = f"{value:.9g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 40 else text[:37] + "..."
