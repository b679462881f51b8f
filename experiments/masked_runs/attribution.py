"""Edge scores of the embedded model against exact patching: `python -m experiments.masked_runs.attribution`.

Seconds (after compilation), the sum of the scores, and the rank correlation of their size with the exact ones.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import numpy as np
from scipy.stats import spearmanr

from mdl.models.circuits.ablations import Resample
from mdl.models.circuits.attribution import Scores, eap_ig_activations, eap_ig_inputs, exact
from mdl.models.circuits.graph import Graph
from mdl.models.circuits.masked import MaskedModel, masked_model, masked_run
from mdl.models.circuits.metrics import mean_kl
from mdl.score import embedded_model

TEXT = 6 * (
    "def add(a, b):\n    return a + b\n\n"
    "class Node:\n    def __init__(self, value):\n        self.value = value\n        self.next = None\n"
)
SEQUENCES, POSITIONS, SCORED = 2, 48, 8


def prepared() -> MaskedModel:
    """The embedded model on two pieces of text, each ablated with the other, the last positions scored."""
    model = embedded_model()
    assert model.tokenizer is not None
    ids = model.tokenizer.encode(TEXT).ids
    tokens = np.array(ids[: SEQUENCES * POSITIONS]).reshape(SEQUENCES, POSITIONS)
    graph = Graph.of(model.config)
    scored = np.tile(np.arange(POSITIONS - SCORED, POSITIONS), (SEQUENCES, 1))
    values = Resample(0).values(model.config, model.params, tokens, graph)
    return masked_model(model.config, model.params, tokens, values, graph, scored)


def timed(score: Callable[[], Scores]) -> tuple[Scores, float]:
    """Scores and seconds, of the second call."""
    score()
    begun = time.perf_counter()
    return score(), time.perf_counter() - begun


def main() -> None:
    """Print one JSON object a way of scoring."""
    model = prepared()
    ones = model.graph.possible.astype(np.float32)
    plain = masked_run(model, ones)
    null = float(mean_kl(masked_run(model, 0 * ones), plain))
    print(json.dumps({"edges": model.graph.n_edges, "kl_of_no_edges_nats": round(null, 4)}))
    ways: dict[str, Callable[[], Scores]] = {
        "exact": lambda: exact(model, mean_kl),
        "EAP-IG on inputs, 5 steps": lambda: eap_ig_inputs(model, mean_kl, 5),
        "EAP-IG on activations, 5 steps": lambda: eap_ig_activations(model, mean_kl, 5),
        "EAP-IG on activations, 20 steps": lambda: eap_ig_activations(model, mean_kl, 20),
    }
    found = {name: timed(score) for name, score in ways.items()}
    truth = found["exact"][0][model.graph.possible]
    for name, (scores, seconds) in found.items():
        rank = float(spearmanr(np.abs(scores[model.graph.possible]), truth).statistic)
        figures = {"seconds": round(seconds, 2), "sum_nats": round(float(scores.sum()), 4), "spearman": round(rank, 3)}
        print(json.dumps({"scores": name, **figures}))


if __name__ == "__main__":
    main()
