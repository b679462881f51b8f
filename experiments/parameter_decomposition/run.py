"""SPD and APD on toy models of superposition, beside the published table.

    python -m experiments.parameter_decomposition.run                 # goes on where it was stopped
    python -m experiments.parameter_decomposition.run --only 5-2 --seeds 0 1 2

Trains each model and its decomposition for every seed and writes a row of `results.json` beside this file as soon as it
is known. No choice looks at the truth: it is compared with when the decomposition is finished.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from decompositions.weights.apd import APDSettings, train_apd
from decompositions.weights.batches import SparseUniform
from decompositions.weights.factors import Factors
from decompositions.weights.masks import Bench, under_masks
from decompositions.weights.spd import SPDSettings, train_spd
from estimators.published.matching import column_match, column_parts, matrix_match
from mdl.models.toys.superposition import Superposition, rotated, superposition_inputs, train_superposition

HERE = Path(__file__).parent
TEST_INPUTS = 512
IN_USE = 0.005  # mean gate from which a subcomponent counts as in use: a tenth of a feature's frequency


@dataclass(frozen=True)
class Case:
    """A toy model and how it is decomposed: SPD reads it as W_in, (identity,) W_out; APD keeps one matrix for both."""

    network: Superposition
    batch: int
    settings: SPDSettings | APDSettings


def spd_case(features: int, hidden: int, identity: bool, components: int, importance: float, steps: int) -> Case:
    """Fewer steps and smaller batches than published, at a higher learning rate."""
    counts = [("W_in", components), *([("identity", 20)] if identity else []), ("W_out", components)]
    settings = SPDSettings(
        tuple(counts),
        steps,
        rate=1e-2 if features < 10 else 5e-3,
        gate_hidden=8,
        importance=importance,
        one_sided=True,
        start="inputs",
        chunk=1000,
    )
    return Case(Superposition(features, hidden, identity), 1024 if features < 10 else 512, settings)


def cases() -> dict[str, Case]:
    """By name: SPD on four models, APD on the small one."""
    small = APDSettings(("W",), 5, 8_000, 1e-2, top_k=0.211, minimality=0.05, power=0.7, chunk=1000)
    return {
        "spd 5-2": spd_case(5, 2, False, 20, 3e-3, 5000),
        "spd 5-2 identity": spd_case(5, 2, True, 20, 3e-3, 5000),
        "spd 40-10": spd_case(40, 10, False, 200, 4e-4, 4000),
        "spd 40-10 identity": spd_case(40, 10, True, 200, 4e-4, 4000),
        "apd 5-2": Case(Superposition(5, 2), 1024, small),
    }


def used(factors: Factors, name: str, usage: np.ndarray) -> int:
    """Components in use of a matrix."""
    return int(np.sum(usage > IN_USE)) if name in factors.tensors else 0


def row_of(name: str, case: Case, seed: int) -> dict[str, Any]:
    """Train the model, decompose it, compare with the truth: input column j of W is feature j's mechanism."""
    trained = train_superposition(seed, case.network)
    tied = isinstance(case.settings, APDSettings)
    if not tied:
        trained = rotated(trained, np.eye(case.network.features))
    batches = SparseUniform(case.network.features, case.batch)
    begun, cpu = time.perf_counter(), time.process_time()
    if isinstance(case.settings, APDSettings):
        apd = train_apd(trained.network, trained.weights, batches, case.settings, seed=seed)
        factors, counts = apd.factors, {"W": used(apd.factors, "W", apd.frequency)}
    else:
        spd = train_spd(trained.network, trained.weights, batches, case.settings, seed=seed)
        factors, counts = spd.factors, {n: used(spd.factors, n, g) for n, g in spd.mean_gates.items()}
    seconds = {"seconds": round(time.perf_counter() - begun), "cpu_seconds": round(time.process_time() - cpu)}
    first = "W" if tied else "W_in"
    target = np.asarray(trained.weights[first], np.float64)
    parts = factors.tensors[first].matrices(factors.n_components)
    parts = parts[np.abs(parts).sum((1, 2)) > 0]
    columns, whole = column_match(parts, target), matrix_match(parts, column_parts(target).dense())
    inputs = superposition_inputs(case.network, TEST_INPUTS, 1000 + seed)[:, None]
    bench = Bench(factors, trained.network, trained.weights, inputs, np.zeros(inputs.shape[:2], np.int32))
    return {
        "case": name,
        "seed": seed,
        "mmcs": columns.mmcs,
        "ml2r": columns.ml2r,
        "one_to_one_cosine": whole.mean_cosine,
        "spare": whole.spare,
        "in_use": counts,
        **seconds,
        "mse_under_masks": under_masks(bench, seed),
    }


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """A line a case: means and standard deviations over seeds."""
    lines = []
    for name in dict.fromkeys(row["case"] for row in rows):
        some = [row for row in rows if row["case"] == name]
        shown = [f"{name:20s} {len(some)} seeds"]
        for figure in ("mmcs", "ml2r", "one_to_one_cosine", "cpu_seconds"):
            values = [row[figure] for row in some]
            shown.append(f"{figure} {np.mean(values):.3f} ± {np.std(values):.3f}")
        lines.append("  ".join([*shown, "in use " + ", ".join(str(list(row["in_use"].values())) for row in some)]))
    return lines


def main() -> None:
    """Run what is not in results.json yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=list(cases()))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    arguments = parser.parse_args()
    rows = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    done = {(row["case"], row["seed"]) for row in rows}
    for name in arguments.only:
        for seed in arguments.seeds:
            if (name, seed) in done:
                continue
            rows.append(row_of(name, cases()[name], seed))
            print(json.dumps(rows[-1]), flush=True)
            arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
    print("\n".join(summary(rows)))


if __name__ == "__main__":
    main()
