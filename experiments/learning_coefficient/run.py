"""The local learning coefficient where it is known, and how it moves with the sampler's settings.

python -m experiments.learning_coefficient.run [--out results.json] [--picture coefficient.png]
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
import jax
from rich.console import Console

from estimators.learning_coefficient import (
    Langevin,
    LearningCoefficient,
    Loss,
    largest_curvature,
    local_learning_coefficient,
    sensitivity,
)
from experiments.learning_coefficient.cases import HEAT, Case, all_cases, monomial, reduced_rank, regression
from experiments.learning_coefficient.picture import draw
from experiments.published_formulas.run import print_rows

HERE = Path(__file__).parent
SHARE = 0.02  # of the stiffest direction's coefficient by which the step inflates it
LOCALISATION = 5.0
STEPS = (0.002, 0.01, 0.05, 0.2, 0.5, 1.2)  # step (n beta h + gamma) / 4 at a stiff direction of curvature h
LOCALISATIONS = (0.2, 1.0, 5.0, 25.0, 125.0)


def measure(
    loss: Loss,
    params: Any,
    data: Any,
    n: int,
    *,
    beta: float | None = None,
    sampler: Langevin | None = None,
    seed: int = 0,
) -> LearningCoefficient:
    """The coefficient of any loss (mean nats a sample) at any weights, with a step from its largest curvature.

    Without a sampler: 8 chains of 4,000 + 12,000 steps on all the data, localisation 5, and the step at which the
    stiffest direction is inflated by 2 %.
    """
    if sampler is None:
        heat = n * beta if beta is not None else n / jax.numpy.log(n)
        curvature = largest_curvature(loss, params, data, key=jax.random.key(seed + 1))
        step = 4 * SHARE / (float(heat) * curvature + LOCALISATION)
        sampler = Langevin(step, LOCALISATION, draws=12000, burn_in=4000, chains=8)
    return local_learning_coefficient(loss, params, data, n=n, key=jax.random.key(seed), sampler=sampler, beta=beta)


def sampler_of(case: Case) -> Langevin:
    """By the case's own scale of curvature: a monomial has none at its minimum."""
    step = 4 * SHARE / (case.heat * case.scale + LOCALISATION)
    return Langevin(step, LOCALISATION, draws=30000, burn_in=6000, chains=16, batch_size=case.batch_size)


def row_of(case: Case) -> dict[str, Any]:
    """One line of the table."""
    began = time.process_time()
    sampler = sampler_of(case)
    found = measure(case.loss, case.params, case.data, case.n, beta=case.beta, sampler=sampler)
    return {
        "case": case.name,
        "weights": found.parameters,
        "lambda": round(case.exact, 4),
        "integral": None if case.integral is None else round(case.integral(sampler), 4),
        "estimate": round(found.value, 4),
        "stderr": round(found.stderr, 4),
        "off, %": round(100 * (found.value / case.exact - 1), 1),
        "virial": round(found.virial, 3),
        "bits at n = 1e6": round(found.bits(1e6), 1),
        "seconds": round(time.process_time() - began, 1),
        "warnings": list(found.warnings()),
    }


def sweep_of(case: Case) -> list[dict[str, Any]]:
    """The coefficient over the exact one at every step and localisation."""
    steps = [4 * share / (case.heat * case.scale) for share in STEPS]
    sampler = Langevin(1.0, 1.0, draws=6000, burn_in=3000, chains=8)
    cells = sensitivity(
        case.loss,
        case.params,
        case.data,
        n=case.n,
        key=jax.random.key(7),
        sampler=sampler,
        step_sizes=steps,
        localisations=LOCALISATIONS,
        beta=case.beta,
    )
    rows = []
    for cell in cells:
        found = cell.estimate
        rows.append(
            {
                "case": case.name,
                "share": float(f"{cell.sampler.step_size * case.heat * case.scale / 4:.3g}"),
                "step": float(f"{cell.sampler.step_size:.4g}"),
                "localisation": cell.sampler.localisation,
                "ratio": None if found is None else round(found.value / case.exact, 4),
                "stderr": None if found is None else round(found.stderr / case.exact, 4),
                "virial": None if found is None else round(found.virial, 4),
                "failure": cell.failure.split(":")[0],
            }
        )
    return rows


def swept() -> tuple[Case, ...]:
    """One case of each kind."""
    return (regression(6, 1000), monomial(2), reduced_rank(5, 3, 2, 1))


def print_sweep(rows: list[dict[str, Any]], console: Console) -> None:
    """Steps down, localisations across; diverged cells are dashes."""
    lines = []
    for share in STEPS:
        cells = [r for r in rows if r["share"] == share]
        values = {f"gamma {r['localisation']:g}": "-" if r["ratio"] is None else f"{r['ratio']:.3f}" for r in cells}
        lines.append({"step n beta h / 4": share} | values)
    print_rows(f"estimate / exact, {rows[0]['case']}", lines, console)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=HERE / "results.json", help="Where results are left.")
@click.option("--picture", type=click.Path(path_type=Path), default=HERE / "coefficient.png", help="And the picture.")
def main(out: Path, picture: Path) -> None:
    """Print the table and the sweeps, and leave both as JSON and as a picture."""
    console = Console(width=150, highlight=False)
    rows = [row_of(case) for case in all_cases()]
    shown = [{k: v for k, v in row.items() if k != "warnings"} for row in rows]
    print_rows(f"local learning coefficient, known cases (n beta = {HEAT} where there are no samples)", shown, console)
    sweeps = [sweep_of(case) for case in swept()]
    for sweep in sweeps:
        print_sweep(sweep, console)
    results = {"table": rows, "sweeps": [row for sweep in sweeps for row in sweep]}
    out.write_text(json.dumps(results, indent=1) + "\n")
    draw(results, picture)


if __name__ == "__main__":
    main()
