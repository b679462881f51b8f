"""A trained SPD, given no hint, beside the truth: subcomponents that are in use, put together where they fire together.

python -m experiments.weight_truth.learned --seeds 3
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from decompositions.weights.batches import SparseUniform
from decompositions.weights.factors import Factors, TensorFactors
from decompositions.weights.spd import SPDSettings, train_spd
from decompositions.weights.truths import superposition_truth
from decompositions.weights.usage import activations, importances
from estimators.published.mechanistic import greedy_clusters
from experiments.parameter_decomposition.run import IN_USE, Case, cases
from experiments.weight_truth.cases import ROWS, TOLERANCE
from experiments.weight_truth.cases import Case as Toy
from experiments.weight_truth.contest import contest
from mdl.models.toys.superposition import rotated, superposition_inputs, train_superposition
from mdl.models.vectors import Vectors
from mdl.protocols import Inputs

HERE = Path(__file__).parent
NAMES = ("spd 5-2", "spd 40-10")
LEARNED = "trained SPD"
OPEN = 0.5  # of a gate, for firing together
ALPHA = 8.0  # of the clustering objective: bits an active rank, about those of a component's numbers a token


def learned(case: Case, seed: int) -> tuple[Toy, Factors]:
    """The toy with its truth, and what SPD makes of it."""
    assert isinstance(case.settings, SPDSettings)
    features = case.network.features
    trained = rotated(train_superposition(seed, case.network), np.eye(features))
    inputs = superposition_inputs(case.network, ROWS, seed + 1)
    model = Vectors.computed(trained.network, trained.weights, inputs, "superposition").tolerating(TOLERANCE)
    result = train_spd(trained.network, trained.weights, SparseUniform(features, case.batch), case.settings, seed=seed)
    truth = superposition_truth(trained.network, trained.weights, np.eye(features))
    assert model.network is not None
    assert model.weights is not None
    kept = in_use(result.factors, model, inputs)
    return Toy(model, truth, {}), kept


def in_use(factors: Factors, model: Vectors, inputs: np.ndarray) -> Factors:
    """Subcomponents that fire on more than a share IN_USE of the inputs, without their gates; those that fire together
    are one component (`greedy_clusters`)."""
    assert model.network is not None
    assert model.weights is not None
    seen = Inputs(np.zeros((len(inputs), 1), np.int32), np.ones((len(inputs), 1), bool), inputs[:, None], model.network)
    firing = importances(factors, activations(model.network, model.weights, seen)) > OPEN
    alive = np.flatnonzero(firing.mean(0) > IN_USE)
    groups = np.asarray(greedy_clusters(firing[:, alive], np.ones(len(alive)), ALPHA))
    _, groups = np.unique(groups, return_inverse=True)
    number = dict(zip(alive.tolist(), groups.reshape(-1).tolist(), strict=True))
    tensors = {}
    for name, t in factors.tensors.items():
        chosen = np.array([int(c) in number for c in t.component])
        ids = np.array([number[int(c)] for c in t.component[chosen]], np.int64)
        tensors[name] = TensorFactors(t.inputs[chosen].astype(np.float64), t.outputs[chosen].astype(np.float64), ids)
    return Factors(tensors, LEARNED)


@click.command()
@click.option("--seeds", default=3, show_default=True)
@click.option("--out", default=HERE / "learned.json", show_default=True, type=click.Path(path_type=Path))
def main(seeds: int, out: Path) -> None:
    """Train, score, and print total(SPD) / total(truth) from N = 1 to the crossing with one part."""
    rows: list[dict[str, Any]] = json.loads(out.read_text()) if out.exists() else []
    done = {(row["case"], row["seed"]) for row in rows}
    for name in NAMES:
        for seed in range(seeds):
            if (name, seed) not in done:
                rows.append(row_of(name, seed))
                out.write_text(json.dumps(rows, indent=1) + "\n")
                click.echo(json.dumps({k: v for k, v in rows[-1].items() if k != "cell"}))
    for row in rows:
        click.echo(f"{row['case']} seed {row['seed']}: total / truth's {row['least']:.3f} to {row['most']:.3f}")


def row_of(name: str, seed: int) -> dict[str, Any]:
    """One toy, one seed."""
    started = time.time()
    toy, factors = learned(cases()[name], seed)
    cell = contest(toy, {LEARNED: factors})
    grid, totals = np.array(cell["grid"]), {k: np.array(v) for k, v in cell["totals"].items()}
    upto = grid <= max(cell["crossing"] or grid[-1], 1.0)
    ratio = (totals[LEARNED] / totals["truth"])[upto]
    found = {"least": float(ratio.min()), "most": float(ratio.max()), "crossing": cell["crossing"]}
    counts = {"components": factors.n_components, "cosine": cell["cosines"][LEARNED]}
    return {"case": name, "seed": seed, **found, **counts, "seconds": time.time() - started}


if __name__ == "__main__":
    main()
