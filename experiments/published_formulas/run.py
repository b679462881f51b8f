"""Others' formulas on the embedded model's real activations: SAEBench's figure defect by defect, wrong and right PCA
baselines, explained variance as published, MDL-SAE's closed forms; and the embedded loss curve against a scaling law.

python -m experiments.published_formulas.run [--sequences 8] [--out results.json]
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import numpy as np
import scipy.sparse
from rich.console import Console
from rich.table import Table

from decompositions.sae import SAE
from estimators.published import baselines, mdl_sae, saebench
from estimators.published.saebench import Mends
from estimators.recovered import explained_variance
from estimators.training_compute import fit_scaling_law, training_loss
from mdl.score import EMBEDDED, EMBEDDED_REGION, embedded_model, embedded_saes, load_data
from mdl.task import Task, build_task
from mdl.training import loss_curve, training_flops

HERE = Path(__file__).parent
RANKS = (8, 24, 96, 191)
PLATEAU = 0.64  # of the steps: the rate falls after it
CHOSEN = ("topk-4x", "jumprelu-8x")


def closed_forms() -> list[dict[str, Any]]:
    """MDL-SAE's figures for GPT-2, and what naming a set in place of a list saves."""
    printed = json.loads((HERE / "expected.json").read_text())["mdl_sae_gpt2_bits"]
    forms: tuple[tuple[str, float, Any], ...] = (
        ("768 * 7", mdl_sae.dense_bound_bits(768), printed["dense"]),
        ("65 (7 + log2 25,000)", mdl_sae.upper_bound_bits(65, 25_000), printed["sae"]),
        ("896 log2 50,257", mdl_sae.one_hot_bound_bits(896, 50_257), printed["one_hot"]),
        ("65 * 7 + log2 C(25,000, 65)", mdl_sae.unordered_bound_bits(65, 25_000), None),
    )
    return [{"form": form, "bits": round(bits, 1), "printed": given} for form, bits, given in forms]


def saebench_rows(task: Task) -> list[dict[str, Any]]:
    """The figure at each number of bins: as published, with one defect mended at a time, with all."""
    assert task.held_out is not None
    outputs = task.held_out.sample().outputs.astype(np.float64)
    ways = [("as published", Mends())]
    ways += [(f.name, Mends(**{f.name: True})) for f in fields(Mends)] + [("all mended", Mends.all())]
    found = []
    for path in (p for p in embedded_saes() if p.name in CHOSEN):
        explanation = SAE(path=str(path)).fit(task.for_fitting())
        codes = scipy.sparse.csr_array(explanation.activations(outputs.astype(np.float32))).astype(np.float64)
        dictionary = saebench.Dictionary(explanation.atoms.astype(np.float64), explanation.bias.astype(np.float64))
        for name, mends in ways:
            sweep = saebench.saebench_sweep(codes, dictionary, outputs, mends)
            lengths = {f"bits {x.bins}": round(x.bits, 1) for x in sweep}
            errors = {f"error {x.bins}": float(f"{x.error:.4g}") for x in sweep}
            found.append({"sae": path.name, "way": name, **lengths, **errors})
    return found


def pca_rows(task: Task) -> list[dict[str, Any]]:
    """Explained variance on held-out data of PCA fitted on fit data, right and wrong; each also by the published
    definition."""
    assert task.held_out is not None
    fitted, outputs = (a.sample().outputs.astype(np.float64) for a in (task.fit_activations, task.held_out))
    mean, components = fitted.mean(0), baselines.components_of(fitted)
    ways: dict[str, Callable[[int], np.ndarray]] = {
        "PCA": lambda rank: baselines.pca(outputs, components, mean, rank),
        "transposed": lambda rank: baselines.transposed_pca(outputs, components, mean, rank),
        "uncentred": lambda rank: baselines.uncentred_pca(outputs, components, rank),
    }
    rows = [_variance_row("mean", 0, outputs, np.broadcast_to(mean, outputs.shape))]
    return rows + [_variance_row(name, rank, outputs, way(rank)) for rank in RANKS for name, way in ways.items()]


def _variance_row(name: str, rank: int, outputs: np.ndarray, prediction: np.ndarray) -> dict[str, Any]:
    return {
        "baseline": name,
        "rank": rank,
        "explained variance": round(explained_variance(outputs, prediction), 4),
        "as published": round(baselines.published_explained_variance(outputs, prediction), 4),
        "as published, x / 10": round(baselines.published_explained_variance(outputs / 10, prediction / 10), 4),
    }


def training_rows(parameters: int) -> list[dict[str, Any]]:
    """Shares of training compute at some gaps: by the measured curve, and by laws fitted to it."""
    points = json.loads((EMBEDDED / "loss_curve.json").read_text())
    flops = training_flops(parameters, points["final"])
    compute, loss = np.array(points["compute"]) * flops / points["final"], np.array(points["loss_nats"])
    measured = training_loss(loss_curve(points, 2048))
    known = np.interp(np.array(points["compute"]), measured.compute, measured.loss_nats)  # type: ignore[attr-defined]
    laws: list[tuple[str, Any, float]] = [("measured", measured, float(np.sqrt(np.mean((known - loss) ** 2))))]
    for name, until in (("law, whole run", 1.0), ("law, before the rate falls", PLATEAU)):
        chosen = compute <= until * flops
        laws.append((name, *fit_scaling_law(compute[chosen], loss[chosen], flops)))
    gaps = (0.05, 0.2, 1.0, 3.0)
    return [
        {"curve": n, "rms nats": round(e, 4), **{f"gap {g} nats": round(x.fraction(g), 4) for g in gaps}}
        for n, x, e in laws
    ]


def print_rows(title: str, rows: list[dict[str, Any]], console: Console) -> None:
    """Rows of one kind as a table."""
    table = Table(title=title, title_justify="left", box=None)
    for key in rows[0]:
        table.add_column(key, justify="left" if isinstance(rows[0][key], str) else "right")
    for row in rows:
        table.add_row(*("" if v is None else f"{v}" for v in row.values()))
    console.print(table, "")


@click.command()
@click.option("--sequences", default=8, show_default=True, help="Held-out sequences.")
@click.option("--out", type=click.Path(path_type=Path), default=HERE / "results.json", help="Where results are left.")
def main(sequences: int, out: Path) -> None:
    """Print every table, and leave its rows as JSON."""
    model, console = embedded_model(), Console(width=150, highlight=False)
    task = build_task(model, EMBEDDED_REGION, load_data(model, fit_sequences=288, sequences=sequences), lambda *_: None)
    tables = {
        "MDL-SAE's figures for GPT-2": closed_forms(),
        "SAEBench mdl, bits a token and error by number of bins": saebench_rows(task),
        f"PCA baselines at {EMBEDDED_REGION.removeprefix('upstream of ')}": pca_rows(task),
        "share of training compute": training_rows(model.n_parameters),
    }
    for title, rows in tables.items():
        print_rows(title, rows, console)
    out.write_text(json.dumps(tables, indent=1) + "\n")


if __name__ == "__main__":
    main()
