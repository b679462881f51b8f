"""SPD of an MLP of the embedded model: `python -m experiments.parameter_decomposition.embedded`.

Writes `blocks.1.mlp.safetensors` (components alive, half precision) and `blocks.1.mlp.json` (losses, divergence under
masks) beside this file. Outputs are compared in the Fisher metric of the rest of the model.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from decompositions.weights.batches import Rows
from decompositions.weights.factors import Factors, ScalarGates, TensorFactors
from decompositions.weights.masks import Bench, under_masks
from decompositions.weights.spd import SPDResult, SPDSettings, train_spd
from estimators.fisher import fisher_metric
from estimators.kernels import evaluator_for
from mdl.score import embedded_model, load_data
from mdl.task import Activations, Task, build_task, region_weights

HERE = Path(__file__).parent
REGION = "blocks.1.mlp"
METRIC_SEQUENCES, TEST_POSITIONS = 24, 512
DIVERGENCE = "metric"


def quiet(*_: Any) -> None:
    """Nobody reads a task's progress here."""


def half(factors: Factors) -> Factors:
    """Every number rounded to half precision."""
    tensors = {}
    for name, t in factors.tensors.items():
        assert t.gates is not None
        gates = ScalarGates(*(np.asarray(a, np.float16) for a in vars(t.gates).values()))
        tensors[name] = TensorFactors(t.inputs.astype(np.float16), t.outputs.astype(np.float16), t.component, gates)
    return replace(factors, tensors=tensors)


def settings_of(
    arguments: argparse.Namespace, weights: dict[str, np.ndarray], matrices: tuple[str, ...]
) -> SPDSettings:
    """Faithfulness counts relative to the mean square of the weights."""
    power = sum(np.square(weights[n]).sum() for n in matrices) / sum(weights[n].size for n in matrices)
    return SPDSettings(
        components=tuple((name, arguments.components) for name in matrices),
        steps=arguments.steps,
        rate=arguments.rate,
        gate_hidden=arguments.gate_hidden,
        faithfulness=float(arguments.faithfulness / power),
        importance=arguments.importance,
        final_importance=arguments.final_importance,
        power=1.0,
        divergence=DIVERGENCE,
        leftover=True,
        alive=1e-4,
        chunk=50,
    )


def train(task: Task, arguments: argparse.Namespace) -> tuple[SPDResult, SPDSettings, np.ndarray]:
    """The decomposition, its settings, and the root of the metric."""
    some = task.fit_activations
    root = fisher_metric(evaluator_for(task.model, task.region), some.head(METRIC_SEQUENCES), seed=0).root
    weights = region_weights(task)
    assert some.network is not None
    assert some.inputs is not None
    rows = Rows.of_positions(some.inputs, some.tokens, some.scored, arguments.batch)
    settings = settings_of(arguments, weights, tuple(some.network.matrices))
    begun = time.perf_counter()

    def progress(step: int, losses: dict[str, float]) -> None:
        shown = " ".join(f"{name} {value:.4g}" for name, value in losses.items())
        print(f"{step:6d} {time.perf_counter() - begun:6.0f} s  {shown}", flush=True)

    checkpoint = Path(arguments.checkpoint) if arguments.checkpoint else None
    result = train_spd(
        some.network, weights, rows, settings, seed=0, metric_root=root, progress=progress, checkpoint=checkpoint
    )
    return result, settings, root


def evaluate(task: Task, factors: Factors, root: np.ndarray, activations: Activations) -> dict[str, float]:
    """Nats a position under each kind of mask, on text that the components were not trained on."""
    assert activations.network is not None
    assert activations.inputs is not None
    values, tokens = activations.inputs[activations.scored], activations.tokens[activations.scored]
    chosen = np.random.default_rng(0).permutation(len(values))[:TEST_POSITIONS]
    bench = Bench(
        factors,
        activations.network,
        region_weights(task),
        values[chosen][:, None],
        tokens[chosen][:, None],
        DIVERGENCE,
        root,
    )
    return under_masks(bench, seed=0)


def main() -> None:
    """Train, evaluate, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--components", type=int, default=384)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--gate-hidden", type=int, default=8)
    parser.add_argument("--importance", type=float, default=1e-4)
    parser.add_argument("--final-importance", type=float, default=2e-5)
    parser.add_argument("--faithfulness", type=float, default=10.0)
    parser.add_argument("--checkpoint", default="")
    parser.add_argument("--out", default=str(HERE))
    arguments = parser.parse_args()
    model = embedded_model()
    task = build_task(model, REGION, load_data(model, sequences=8, fit_sequences=288), quiet)
    begun = time.process_time()
    result, settings, root = train(task, arguments)
    seconds = time.process_time() - begun
    factors = half(result.factors)
    out = Path(arguments.out)
    factors.save(out / f"{REGION}.safetensors")
    figures = {
        "settings": vars(settings) | {"attack": vars(settings.attack)},
        "batch": arguments.batch,
        "cpu_seconds": round(seconds),
        "active": dict(result.active),
        "alive": {name: len(t.component) for name, t in factors.tensors.items()},
        "final_losses": {name: float(values[-1]) for name, values in result.history.items()},
        "nats_under_masks": evaluate(task, factors, root, task.tune_activations),
    }
    (out / f"{REGION}.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
