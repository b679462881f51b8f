"""Three estimates of what an explanation costs to state: two-part, prequential, variational; at equal N and fidelity.

    python -m experiments.static_bits.run [--only token-table] [--orders 2] [--picture]

What results.json has is not worked out again: delete it, or the entries in question, to start anew. Every result is
written as soon as it is there. `--picture` draws total(N)/N from what is there, and works out nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from estimators.fidelity import Bench
from estimators.first_use import static_bits
from estimators.prequential import Block, Prequential, Stream, prequential
from estimators.solver import Solution, Solver
from estimators.variational import RowPrices, row_prices, variational
from experiments.static_bits.families import Family, families, stated_rows
from mdl.score import embedded_model, load_data
from mdl.task import build_task

HERE = Path(__file__).parent
RESULTS, PICTURE = HERE / "results.json", HERE / "totals.png"
FIDELITY = 0.01
HORIZONS = (1e3, 1e4, 1e5, 1e6)
ROWS_AT = 1e6  # the N at which rows alone are priced both ways
Results = dict[str, Any]


class Laboratory:
    """Tasks, benches and data orders, each made when it is first asked for."""

    def __init__(self) -> None:
        self.model = embedded_model()
        self.data = load_data(self.model, fit_sequences=288)
        self.benches: dict[str, Bench] = {}
        self.streams: dict[tuple[str, int], Stream] = {}

    def bench(self, region: str) -> Bench:
        if region not in self.benches:
            self.benches[region] = Bench(build_task(self.model, region, self.data, lambda *_: None), HORIZONS[-1])
        return self.benches[region]

    def stream(self, region: str, order: int) -> Stream:
        if (region, order) not in self.streams:
            self.streams = {(region, order): Stream.of(self.bench(region), order)}
        return self.streams[region, order]


def two_part(solver: Solver, eps: float) -> tuple[Solution, dict[str, Any]]:
    """The score at one N: static as paid by N tokens, and the rate at exactly eps."""
    bench, solution = solver.bench, solver.solve(eps)
    attempt = solution.attempt
    state, codes = solver.send(attempt, bench.held_out)
    n, horizon = attempt.state.n_tokens, bench.horizon
    (static,) = static_bits(attempt.message, attempt.received.touched, n, np.array([horizon]))
    lengths = [c.length for c in (state, codes) if c is not None]
    rate = sum(x.total for x in lengths) / n + solution.slope * float(np.log(attempt.kl / eps))
    return solution, {
        "static": float(static),
        "whole": attempt.message.whole_bits,
        "explanation": attempt.message.header_bits + float(attempt.message.part_bits[1].sum()),
        "rate": rate,
        "learning": sum(x.learning for x in lengths) / n,
        "kl": attempt.kl,
        "slope": solution.slope,
        "knobs": dict(attempt.settings.knobs),
        "total": float(static) / horizon + rate,
    }


def work(family: Family, laboratory: Laboratory, found: Results, order: int) -> Iterator[str]:
    """Everything of one family that is not in `found` yet, for one order of the data; yields what was done."""
    bench = laboratory.bench(family.region)
    eps = FIDELITY * bench.null_kl
    found.setdefault("eps", eps)
    missing = [h for h in HORIZONS if not {f"two-part {h:g}", f"variational {h:g}"} <= found.keys()]
    if missing:
        explanation = family.decomposition.fit(bench.task.for_fitting())
        solver = Solver(bench, explanation)
        for horizon in sorted(missing, reverse=True):
            started = time.process_time()
            solver = solver.for_horizon(horizon)
            solution, found[f"two-part {horizon:g}"] = two_part(solver, eps)
            yield f"two-part at N = {horizon:g}: {time.process_time() - started:.0f} s"
            started, settings = time.process_time(), solution.attempt.settings
            if horizon == ROWS_AT:
                found["rows"] = asdict(row_prices(explanation, stated_rows, bench.metrics[0], settings))
            score = variational(solver.bench, explanation, stated_rows, solution, eps)
            found[f"variational {horizon:g}"] = {**asdict(score), "total": score.total}
            yield f"variational at N = {horizon:g}: {time.process_time() - started:.0f} s"
    if f"prequential {order}" not in found:
        started = time.process_time()
        knobs = {"static": 1.0, **found[f"two-part {HORIZONS[2]:g}"]["knobs"]}
        blocks = prequential(laboratory.stream(family.region, order), family.decomposition, eps, knobs).blocks
        found[f"prequential {order}"] = [asdict(b) for b in blocks]
        yield f"prequential, order {order}: {time.process_time() - started:.0f} s"


def prequential_totals(found: Results, n: float) -> list[float]:
    """Bits a token of the first n tokens, of each order of the data that is there and long enough."""
    orders = [[Block(**b) for b in v] for k, v in found.items() if k.startswith("prequential")]
    runs = [Prequential("", found["eps"], tuple(blocks)) for blocks in orders]
    return [r.total(n) / n for r in runs if n <= sum(b.tokens for b in r.blocks)]


def totals(found: Results, n: float) -> dict[str, float]:
    """Total(N)/N of each estimate, bits a token; of prequential the mean over orders."""
    named = {w: found[f"{w} {n:g}"]["total"] for w in ("two-part", "variational") if f"{w} {n:g}" in found}
    runs = prequential_totals(found, n)
    return named | ({"prequential": float(np.mean(runs))} if runs else {})


def table(results: Results) -> Table:
    """Total(N)/N, the shortest of each N marked."""
    shown = Table("explanation", "estimate", *(f"N = {h:g}" for h in HORIZONS), title="total(N)/N, bits a token")
    for name, found in results.items():
        by_n = [totals(found, h) for h in HORIZONS]
        for way in ("two-part", "variational", "prequential"):
            cells = []
            for at in by_n:
                best = at and way in at and at[way] == min(at.values())
                cells.append(f"{at[way]:.1f}{' *' if best else ''}" if way in at else "")
            shown.add_row(name, way, *cells)
    return shown


def parts(results: Results) -> Table:
    """What two-part and variational totals are made of, and the spread of prequential ones over orders."""
    head = ("explanation", "N", "static", "of it explanation", "rate", "learning", "KL bits of rows", "rate, bits-back")
    shown = Table(*head, "prequential, by order", title="bits; rates in bits a token")
    for name, found in results.items():
        for h in HORIZONS:
            if f"variational {h:g}" not in found:
                continue
            two, other = found[f"two-part {h:g}"], found[f"variational {h:g}"]
            bits = (
                f"{two['static']:,.0f}",
                f"{two['explanation']:,.0f}",
                f"{two['rate']:.1f}",
                f"{two['learning']:.1f}",
            )
            orders = " ".join(f"{x:.1f}" for x in prequential_totals(found, h))
            shown.add_row(name, f"{h:g}", *bits, f"{other['row_bits']:,.0f}", f"{other['rate']:.1f}", orders)
    return shown


def row_table(results: Results) -> Table:
    """Rows alone, at N = 1e6 and the weights that their own steps imply: rounded against bits-back, bits an entry."""
    head = ("explanation", "entries", "rounded", "+ error", "KL", "prior", "+ error", "bits-back saves")
    shown = Table(*head, title="static rows alone, bits an entry")
    for name, found in results.items():
        if "rows" in found:
            rows = RowPrices(**found["rows"])
            figures = (rows.rounded_bits, rows.rounded_error, rows.kl_bits, rows.prior_bits, rows.sampled_error)
            each = (f"{x / rows.entries:.3f}" for x in figures)
            shown.add_row(name, f"{rows.entries:,}", *each, f"{rows.saved:+.3f}")
    return shown


def draw(results: Results) -> None:
    """total(N)/N against N, a panel for each explanation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 3.4), layout="constrained")
    axes = figure.subplots(1, len(results), squeeze=False)[0]
    for axis, (name, found) in zip(axes, results.items(), strict=True):
        for way, style in (("two-part", "o-"), ("variational", "s--")):
            points = [(h, found[f"{way} {h:g}"]["total"]) for h in HORIZONS if f"{way} {h:g}" in found]
            if points:
                axis.plot(*zip(*points, strict=True), style, label=way, markersize=4)
        for key in (k for k in found if k.startswith("prequential")):
            ends = np.cumsum([b["tokens"] for b in found[key]])
            bits = np.cumsum([b["header"] + b["state"] + b["residual"] for b in found[key]])
            axis.plot(ends, bits / ends, ".-", color="tab:green", alpha=0.7, label=key, markersize=4)
        region = next(f.region for f in families() if f.name == name)
        axis.set(xscale="log", yscale="log", xlabel="N, tokens", title=f"{name}\n{region}")
        axis.title.set_fontsize(8)
    axes[0].set_ylabel("total(N)/N, bits a token")
    axes[0].legend(fontsize=7)
    figure.savefig(PICTURE, dpi=110)


@click.command()
@click.option("--only", multiple=True, type=click.Choice([f.name for f in families()]), help="Default: all.")
@click.option("--orders", default=2, show_default=True, help="Orders of the data for the prequential estimate.")
@click.option("--picture", is_flag=True, help="Draw and print what is there.")
def main(only: tuple[str, ...], orders: int, picture: bool) -> None:
    """Measure what is missing, print, save, draw."""
    console = Console(width=150)
    results: Results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    chosen = [f for f in families() if not only or f.name in only]
    laboratory = None if picture else Laboratory()
    for order in range(orders if laboratory else 0):
        for family in chosen:
            assert laboratory is not None
            for done in work(family, laboratory, results.setdefault(family.name, {}), order):
                console.print(f"{family.name}: {done}")
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    if not results:
        raise click.ClickException(f"there is nothing in {RESULTS} yet: run without --picture first")
    for shown in (table(results), parts(results), row_table(results)):
        console.print(shown)
    draw(results)


if __name__ == "__main__":
    main()
