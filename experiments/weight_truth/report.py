"""Wins of the truth by toy, its crossing with one part against the prediction, and the picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.weight_truth.contest import NOTHING, TRUTH, WEIGHTS, WHOLE, verdict

RIVALS = ("singular directions", "input columns", "neurons", "random parts", "two merged", "one split")
ORDER = (TRUTH, WHOLE, *RIVALS, WEIGHTS, NOTHING)  # of colours, the same in every panel


def read(cells: Path) -> dict[str, list[dict[str, Any]]]:
    """Cells by toy, in the order of seeds."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(cells.glob("*.json")):
        cell = json.loads(path.read_text())
        found.setdefault(cell["case"], []).append(cell)
    return {name: sorted(group, key=lambda c: c["seed"]) for name, group in found.items()}


def summary(group: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one toy."""
    verdicts = [verdict(cell) for cell in group]
    losses: dict[str, int] = {}
    for v in verdicts:
        for name in v["lost_to"]:
            losses[name] = losses.get(name, 0) + 1
    crossings = [cell["crossing"] for cell in group]
    predicted = [cell["predicted"] for cell in group]
    return {
        "seeds": len(group),
        "wins": sum(v["wins"] for v in verdicts),
        "lost_to": losses,
        "lost_by_bits": max((-min(v["margins"].values()) for v in verdicts if v["lost_to"]), default=0.0),
        "crossing": _median(crossings),
        "predicted": _median(predicted),
        "whole_from_one": sum(c == 0.0 for c in crossings),
        "beats_nothing_from": _median([_overtakes(cell, NOTHING) for cell in group]),
        "margin_bits": {name: _median([v["margins"].get(name) for v in verdicts]) for name in _rivals(verdicts)},
        "cosines": {name: _median([c["cosines"].get(name) for c in group]) for name in group[0]["cosines"]},
    }


def _rivals(verdicts: list[dict[str, Any]]) -> list[str]:
    return sorted({name for v in verdicts for name in v["margins"]})


def _median(values: list[float | None]) -> float | None:
    """None counts as infinite; None if that is the median."""
    found = float(np.median([np.inf if v is None else v for v in values]))
    return None if np.isinf(found) else found


def _overtakes(cell: dict[str, Any], other: str) -> float | None:
    """The N from which the truth is shorter than another for good; None: never."""
    behind = np.flatnonzero(np.array(cell["totals"][TRUTH]) >= np.array(cell["totals"][other]))
    if not len(behind):
        return 1.0
    return None if behind[-1] == len(cell["grid"]) - 1 else float(cell["grid"][behind[-1] + 1])


def report(cells: Path, out: Path) -> None:
    """Print the table, and leave results.json and totals.png."""
    found = {name: summary(group) for name, group in read(cells).items()}
    table = Table(
        "toy",
        "wins / seeds",
        "lost to",
        "by at most, bits",
        "N* measured",
        "N* predicted",
        "shorter than nothing from N",
    )
    for name, s in found.items():
        lost = ", ".join(f"{k} {v}" for k, v in s["lost_to"].items()) or "-"
        start = _shown(s["crossing"]) + (
            f" (one part from N = 1: {s['whole_from_one']})" if s["whole_from_one"] else ""
        )
        table.add_row(
            name,
            f"{s['wins']} / {s['seeds']}",
            lost,
            f"{s['lost_by_bits']:.1f}",
            start,
            _shown(s["predicted"]),
            _shown(s["beats_nothing_from"]),
        )
    Console(width=150).print(table)
    (out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    _picture(read(cells), out / "totals.png")


def _shown(value: float | None) -> str:
    return "never" if value is None else f"{value:.3g}"


def _picture(cells: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Total(N) of the first seed of each toy, over that of the truth."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 4
    rows = -(-len(cells) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 3 * rows), squeeze=False)
    for axis, (name, group) in zip(axes.flat, cells.items(), strict=False):
        cell = group[0]
        grid, truth = np.array(cell["grid"]), np.array(cell["totals"][TRUTH])
        for number, label in enumerate(ORDER):
            if label not in cell["totals"]:
                continue
            totals = cell["totals"][label]
            strong = label in (TRUTH, WHOLE)
            style: dict[str, Any] = {
                "color": f"C{number}",
                "linewidth": 2.5 if strong else 1.2,
                "linestyle": ":" if label in (NOTHING, WEIGHTS) else "-",
            }
            axis.plot(grid, np.array(totals) / truth, label=label, **style)
        axis.set(xscale="log", ylim=(0.5, 2.5), title=name, xlabel="N", ylabel="total / truth's")
    for axis in axes.flat[len(cells) :]:
        axis.set_visible(False)
    shown: dict[str, Any] = {}
    for axis in axes.flat:
        handles, labels = axis.get_legend_handles_labels()
        shown |= dict(zip(labels, handles, strict=True))
    figure.legend(list(shown.values()), list(shown), loc="lower center", ncols=5)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)
