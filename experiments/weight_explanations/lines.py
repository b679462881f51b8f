"""Bits of weights against the KL that their rounding makes: real messages, the water-filling bound, and lambda log2 n.

Only the first are coded; the others are estimates, drawn beside them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from decompositions.weights.bound import water_filling
from decompositions.weights.curvature import MeasuredCurvature
from decompositions.weights.yardsticks import LowRank, Neurons, Weights
from estimators.fidelity import Bench, Coding
from estimators.learning_coefficient import Langevin, largest_curvature, local_learning_coefficient
from mdl.protocols import Settings
from mdl.score import embedded_model, load_data
from mdl.task import Task, build_task, region_weights

HORIZON = 1e6
STEPS = tuple(2.0**k for k in range(-6, 5))
SHARES = (0.25, 0.5, 0.75, 0.9)
SEQUENCES = 24
LOCALISATIONS, SAMPLES = (1e3, 1e4, 1e5), 1e6


def quantiser_lines(region: str) -> dict[str, Any]:
    """Of a region of the embedded model: by name, KL (bits a token) and bits."""
    model = embedded_model()
    task = build_task(model, region, load_data(model, sequences=SEQUENCES), lambda *_: None)
    bench = Bench(task, HORIZON)
    found: dict[str, Any] = {
        "feedback": _coded(bench, Weights(), {}),
        "nearest": _coded(bench, Weights("nearest"), {}),
        **{f"rank {share:g}": _coded(bench, LowRank(), {"rank": share}) for share in (0.25, 0.5)},
        **{f"{share:g} of the neurons": _coded(bench, Neurons(), {"kept": share}) for share in (0.4, 0.8)},
    }
    curvatures = MeasuredCurvature.of(task).under(bench.metrics[0].root)
    kl = np.logspace(-5, np.log10(bench.null_kl), 40)
    bound = water_filling(region_weights(task), curvatures, list(kl))
    found["bound"] = [[point.kl_bits, point.bits] for point in bound]
    found["parameters"] = int(sum(w.size for w in region_weights(task).values()))
    found["null_kl"] = bench.null_kl
    found["learning_coefficient"] = [learning_coefficient(task, bench, gamma) for gamma in LOCALISATIONS]
    return found


def _coded(bench: Bench, decomposition: Any, knobs: dict[str, float]) -> list[list[float]]:
    """Messages at growing steps, no residual coder behind them, on held-out data."""
    metric, points = bench.metrics[0], []
    explanation = decomposition.fit(bench.task)
    for step in STEPS:
        settings = Settings(bench.horizon, step, metric.root, {"static": 1.0, **knobs})
        coding = Coding.prepare(bench, explanation, metric, settings, step, None)
        attempt = coding.attempt(bench, bench.held_out)
        points.append([attempt.kl, attempt.message.whole_bits])
    return points


def learning_coefficient(task: Task, bench: Bench, localisation: float) -> dict[str, Any]:
    """lambda of the region's weights, for n = 1e6 tokens; the loss is e^T G e / 2 nats, the second-order KL."""
    network, root = task.fit.inputs.network, jnp.asarray(bench.metrics[0].root, jnp.float32)
    assert network is not None
    own = {name: jnp.asarray(w) for name, w in region_weights(task).items()}
    values, outputs = (jnp.asarray(a[:64]) for a in (task.fit.inputs.values, task.fit_activations.outputs))

    def loss(weights: Any, batch: Any) -> Any:
        x, y = batch
        error = (network.run(weights, x, jnp.zeros(x.shape[:2], jnp.int32)) - y)[:, 1:] @ root.T
        return jnp.mean(jnp.square(error).sum(-1)) / 2

    key, beta = jax.random.key(0), float(1.0 / np.log(SAMPLES))
    stiff = largest_curvature(loss, own, (values[:8], outputs[:8]), key=key)
    step = 0.2 / (SAMPLES * beta * stiff + localisation)
    sampler = Langevin(step, localisation, draws=300, burn_in=150, chains=2, batch_size=2)
    estimate = local_learning_coefficient(loss, own, (values, outputs), n=int(SAMPLES), key=key, sampler=sampler)
    return {
        "localisation": localisation,
        "lambda": estimate.value,
        "stderr": estimate.stderr,
        "virial": estimate.virial,
        "bits": estimate.bits(SAMPLES),
        "warnings": list(estimate.warnings()),
    }
