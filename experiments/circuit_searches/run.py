"""Every search against the best of all subsets, on graphs of at most 20 edges (or nodes).

python -m experiments.circuit_searches.run --model FOLDER --tokens FOLDER/data.npz

At each exchange rate between bits and nats a position (`decompositions.circuits.subsets`), the best circuit of a search
over the optimum: 1 is the optimum. `induction-1` of `experiments.small_circuits` has 12 edges.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from decompositions.circuits.circuit import Circuit
from decompositions.circuits.searches import SEARCHES
from decompositions.circuits.subsets import Objective
from mdl.errors import MDLError
from mdl.models import AnyModel, load_model
from mdl.score import load_data
from mdl.task import Task, build_task

HERE = Path(__file__).parent
FIT_SEQUENCES = 64
OPTIMUM = "enumeration"


def gaps(task: Task, level: Any, ablation: Any) -> dict[str, Any]:
    """Of each search: totals over the optimum by exchange rate, seconds; the optimum's own edges and totals."""
    found: dict[str, Any] = {}
    optimum = Circuit(search=OPTIMUM, level=level, ablation=ablation).fit(task.for_fitting())
    objective = Objective(optimum.searched, level == "node")
    rates = objective.rates()
    for name in SEARCHES:
        started = time.time()
        path = Circuit(search=name, level=level, ablation=ablation).fit(task.for_fitting()).path.circuits
        best = [min(path, key=lambda c, r=rate: objective.total(c, r)) for rate in rates]
        totals = [objective.total(c, rate) for c, rate in zip(best, rates, strict=True)]
        found[name] = {"totals": totals, "edges": [int(c.sum()) for c in best], "seconds": time.time() - started}
    for name in SEARCHES:
        found[name]["over"] = (np.array(found[name]["totals"]) / np.array(found[OPTIMUM]["totals"])).tolist()
    return {"rates": list(rates), "level": level, "ablation": ablation, "searches": found}


def show(result: dict[str, Any]) -> None:
    """Totals over the optimum."""
    table = Table(title=f"{result['model']}, level={result['level']}, ablation={result['ablation']}")
    table.add_column("search")
    for rate in result["rates"]:
        table.add_column(f"{rate:.1e} nats a bit")
    table.add_column("seconds")
    for name, found in result["searches"].items():
        table.add_row(name, *(f"{over:.3f}" for over in found["over"]), f"{found['seconds']:.0f}")
    edges = result["searches"][OPTIMUM]["edges"]
    table.add_row("edges of the optimum", *map(str, edges), "")
    Console(width=150).print(table)


@click.command()
@click.option("--model", "source", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--tokens", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--level", "levels", multiple=True, default=("node", "edge", "subspace"), show_default=True)
@click.option("--ablation", "ablations", multiple=True, default=("zero", "mean"), show_default=True)
def main(source: Path, tokens: Path, levels: tuple[str, ...], ablations: tuple[str, ...]) -> None:
    """Compare the searches on one model, and keep the figures in results.json beside this file."""
    try:
        model: AnyModel = load_model(source)
        task = build_task(model, "model", load_data(model, tokens=tokens, fit_sequences=FIT_SEQUENCES), lambda *_: None)
        results = [{"model": source.name, **gaps(task, level, a)} for level in levels for a in ablations]
    except MDLError as error:
        raise click.ClickException(str(error)) from error
    for result in results:
        show(result)
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
