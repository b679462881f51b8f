"""The table of `README.md`, and `results.json`."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import click
import numpy as np

from experiments.compiled_programs.cases import MEAN, ZERO
from experiments.compiled_programs.contest import HORIZONS, PRUNED, totals, verdict

HEADINGS = ("program", "ablation", "N", "seeds", "wins", "truth, bits", "shortest rivals", "margin, bits")


def report(cells: Path, out: Path) -> None:
    """Print the table, and write results.json: every total of every cell."""
    found = [json.loads(path.read_text()) for path in sorted(cells.glob("*.json"))]
    lines = table(found)
    click.echo("\n".join(lines))
    click.echo(summary(found))
    (out / "results.json").write_text(json.dumps({"table": lines, "cells": found}, indent=1) + "\n")


def table(cells: list[dict[str, Any]]) -> list[str]:
    """A row for each program, ablation and N: medians over seeds, margins from the least to the largest."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + " --- |" * len(HEADINGS)]
    for program in dict.fromkeys(cell["program"] for cell in cells):
        own = [cell for cell in cells if cell["program"] == program]
        for ablation in (ZERO, MEAN):
            for place, horizon in enumerate(HORIZONS):
                verdicts = [verdict(cell, ablation, place) for cell in own]
                rivals = Counter(v["rival"] for v in verdicts)
                names = ", ".join(f"{name} {n}" for name, n in rivals.most_common())
                margins = [v["margin"] for v in verdicts]
                size = float(np.median([v["total"] for v in verdicts]))
                lines.append(
                    f"| {program} | {ablation} | {horizon:.0e} | {len(own)} | {sum(v['wins'] for v in verdicts)} | "
                    f"{size:,.0f} | {names} | {min(margins):,.0f} to {max(margins):,.0f} |"
                )
    return lines


def summary(cells: list[dict[str, Any]]) -> str:
    """How many of all cells the truth wins, and how many circuits pruned by bits are shorter than it."""
    asked = [(cell, a, place) for cell in cells for a in (ZERO, MEAN) for place in range(len(HORIZONS))]
    wins = sum(verdict(*one)["wins"] for one in asked)
    smaller = sum(any(n.startswith(PRUNED) for n in cell[a]["scores"]) for cell in cells for a in (ZERO, MEAN))
    beaten = sum(
        verdict(cell, a, place)["rival"].startswith(PRUNED) and not verdict(cell, a, place)["wins"]
        for cell, a, place in asked
    )
    dense = sum("weights" in totals(cell[ZERO]["scores"], 0) for cell in cells)
    return (
        f"The truth is the shortest, or within a byte of the shortest, in {wins} of {len(asked)}; beaten by itself "
        f"with fewer edges in {beaten}; descent left fewer edges in {smaller} of {2 * len(cells)} circuits; {dense} "
        "cells have the dense yardsticks."
    )
