"""ACDC's published curves in bits: which circuit pays for its edges, for how many prompts; what its threshold means.

python -m experiments.acdc_curves.run FOLDER [--out results.json]

FOLDER holds the 32 json files of Automatic-Circuit-Discovery's `experiments/results/plots_data`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from mdl.codes.edges import list_bits
from mdl.units import nats_to_bits

HERE = Path(__file__).parent
HORIZONS = (100, 1_000, 10_000)  # prompts
EDGES = {"docstring": 1_377, "ioi": 32_923, "greaterthan": 32_923}  # as ACDC counts a model's edges
THRESHOLD_HORIZON = 1_000


@dataclass(frozen=True)
class Curve:
    """**Arguments:** `edges` [n] and `kl_nats` [n] of the circuits of a curve, without its two ends at infinity;
    `score` [n]: the threshold, regularisation or rank that gave each; `possible`: the graph's edges."""

    file: str
    weights: str
    ablation: str
    task: str
    metric: str
    method: str
    edges: np.ndarray
    kl_nats: np.ndarray
    score: np.ndarray
    possible: int

    def total_bits(self, prompts: int) -> np.ndarray:
        """k log2 E - log2 k! + prompts * KL / ln 2, in bits, of every circuit."""
        graph: np.ndarray = list_bits(self.possible, self.edges)
        return graph + prompts * nats_to_bits(self.kl_nats)

    def best(self, prompts: int) -> int:
        """Which circuit is shortest."""
        return int(self.total_bits(prompts).argmin())


def read_curve(path: Path) -> Curve | None:
    """A file's curve; None where it has no KL over a graph of known size (tracr's are scored by an L2 error)."""
    place: list[str] = []
    content = json.loads(path.read_text())
    while "n_edges" not in content:
        name = next(iter(content))
        place.append(name)
        content = content[name]
    weights, ablation, task, metric, method = place
    if task not in EDGES:
        return None
    edges, kl, score = (np.array(content[key], np.float64) for key in ("n_edges", "test_kl_div", "score"))
    real = np.isfinite(edges) & np.isfinite(kl) & np.isfinite(score)
    return Curve(path.name, weights, ablation, task, metric, method, edges[real], kl[real], score[real], EDGES[task])


def rescored(curves: list[Curve]) -> Iterator[dict[str, Any]]:
    """Of every curve, the shortest circuit at each number of prompts; the null is its smallest circuit's KL."""
    for curve in curves:
        row: dict[str, Any] = {
            "curve": " ".join((curve.task, curve.method, curve.metric)),
            "ablation": curve.ablation.removesuffix("_ablation"),
            "weights": curve.weights,
            "smallest": int(curve.edges.min()),
        }
        for prompts in HORIZONS:
            best = curve.best(prompts)
            row[f"k at {prompts:,}"] = int(curve.edges[best])
            row[f"bits at {prompts:,}"] = round(float(curve.total_bits(prompts)[best]))
        yield row


@dataclass(frozen=True)
class Row:
    """One line of the table, for one task: k and bits at each horizon; the null at the first; thresholds in nats."""

    task: str
    k: tuple[int, ...]
    bits: tuple[int, ...]
    null_edges: int
    null_bits: int
    predicted_threshold: float
    best_threshold: float


def row_of(curve: Curve) -> Row:
    """A task's line, from ACDC's own curve.

    The threshold's meaning: an edge that costs log2(E / k) bits is worth it if it saves as many over N prompts, so that
    tau = ln 2 log2(E / k) / N nats.
    """
    best = [curve.best(n) for n in HORIZONS]
    totals = [curve.total_bits(n) for n in HORIZONS]
    smallest = int(curve.edges.argmin())
    at = curve.best(THRESHOLD_HORIZON)
    return Row(
        curve.task,
        tuple(int(curve.edges[i]) for i in best),
        tuple(round(float(t[i])) for t, i in zip(totals, best, strict=True)),
        int(curve.edges[smallest]),
        round(float(totals[0][smallest])),
        math.log(curve.possible / curve.edges[at]) / THRESHOLD_HORIZON,
        float(curve.score[at]),
    )


def headline(curves: list[Curve]) -> list[Row]:
    """ACDC with KL, resampled ablation, trained weights: docstring, IOI, greater-than."""
    wanted = [
        c
        for c in curves
        if (c.method, c.metric, c.ablation, c.weights) == ("ACDC", "kl_div", "random_ablation", "trained")
    ]
    return sorted((row_of(c) for c in wanted), key=lambda row: list(EDGES).index(row.task))


def print_headline(rows: list[Row], console: Console) -> None:
    """The table of the three tasks, and the thresholds below it."""
    table = Table(title="Shortest circuit, bits (graph by the list code + N x KL)", title_justify="left", box=None)
    columns = (
        "task",
        *(f"N = {n:,}" for n in HORIZONS),
        "smallest at N = 100",
        "tau nats, meaning",
        "best on the grid",
    )
    for name in columns:
        table.add_column(name, justify="left" if name == "task" else "right")
    for row in rows:
        cells = [f"k = {k}: {bits:,}" for k, bits in zip(row.k, row.bits, strict=True)]
        null = f"k = {row.null_edges}: {row.null_bits:,}"
        table.add_row(row.task, *cells, null, f"{row.predicted_threshold:.4f}", f"{row.best_threshold:.4f}")
    console.print(table, "")


def print_rows(title: str, rows: list[dict[str, Any]], console: Console) -> None:
    """Rows of one kind as a table."""
    table = Table(title=title, title_justify="left", box=None)
    for key in rows[0]:
        table.add_column(key, justify="left" if isinstance(rows[0][key], str) else "right")
    for row in rows:
        table.add_row(*(f"{v:,}" if isinstance(v, int) else str(v) for v in row.values()))
    console.print(table, "")


def differences(rows: list[Row]) -> list[str]:
    """What does not agree with `expected.json`, in words; empty if all does."""
    expected = json.loads((HERE / "expected.json").read_text())["rows"]
    found = {row.task: asdict(row) for row in rows}
    wrong = []
    for task, values in expected.items():
        for key, value in values.items():
            got = found[task][key] if task in found else None
            got = list(got) if isinstance(got, tuple) else round(got, 4) if isinstance(got, float) else got
            if got != value:
                wrong.append(f"{task}: {key} is {got} in place of {value}")
    return wrong


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Where the rows are left as JSON.")
def main(folder: Path, out: Path | None) -> None:
    """Print every table and compare the first with what was printed elsewhere."""
    files = sorted(folder.glob("*.json"))
    curves = [curve for curve in map(read_curve, files) if curve is not None]
    if not curves:
        raise click.ClickException(f"{folder} holds none of ACDC's curves; give the folder of its plots_data")
    console = Console(width=150, highlight=False)
    rows = headline(curves)
    print_headline(rows, console)
    rest = list(rescored(curves))
    print_rows(f"{len(curves)} of {len(files)} curves (the others have no KL)", rest, console)
    wrong = differences(rows)
    console.print("\n".join(wrong) if wrong else "The first table agrees with expected.json.")
    if out is not None:
        out.write_text(json.dumps({"tasks": [asdict(r) for r in rows], "curves": rest}, indent=1) + "\n")
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
