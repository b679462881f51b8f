"""The pointer track: curves at fixed sizes, the two prices of resampling, and what is refused."""

from __future__ import annotations

from math import lgamma, log, log2
from typing import Any

import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp

from estimators.published.pointer_track import PointerCurve, pointer_curve, pointer_table
from mdl.errors import ExplanationError
from mdl.models.circuits.ablations import Ablation, Resample, zero
from mdl.models.circuits.graph import Graph
from mdl.models.circuits.masked import masked_model, masked_run
from tests.models.circuits.random_models import mask_of, random_model, tokens_of


def curve(ablation: Ablation | None = None, **options: Any) -> tuple[PointerCurve, Graph, list[np.ndarray], Any]:
    config, params = random_model("gpt2")
    graph, tokens = Graph.of(config), tokens_of(config, batch=5)
    circuits = [np.zeros_like(graph.possible), mask_of(graph, kept=0.5), np.array(graph.possible)]
    ablation = zero(config, graph) if ablation is None else ablation
    return pointer_curve("x", config, params, tokens, graph, circuits, ablation, **options), graph, circuits, tokens


def test_the_degeneracy_is_there_for_all_to_see() -> None:
    """Naming everything leaves nothing: with weights free, the whole model explains itself."""
    found, graph, circuits, _ = curve()
    k = [int(c.sum()) for c in circuits]
    assert found.edges.tolist() == k
    expected = [n * log2(graph.n_edges) - lgamma(n + 1) / log(2) for n in k]
    assert found.name_bits == pytest.approx(expected)
    assert (np.diff(found.name_bits) > 0).all()  # a length that only grows
    assert found.kl_bits[0] > found.kl_bits[1] > 100 * found.kl_bits[2] >= 0
    assert found.kl_bits[2] < 1e-5
    assert np.array_equal(found.kl_bits, found.mixture_bits)  # one value of what stands in: no donors


def test_resampling_has_two_prices() -> None:
    """By a plain loop over donors in float64; the mixture's is the smaller one (Jensen)."""
    found, graph, circuits, tokens = curve(Resample(3), draws=4)
    config, params = random_model("gpt2")
    runs = []
    for seed in (3, 4, 5, 6):
        model = masked_model(config, params, tokens, Resample(seed).values(config, params, tokens, graph), graph)
        plain, explained = (np.asarray(masked_run(model, m), np.float64) for m in (graph.possible, circuits[1]))
        runs.append(log_softmax(explained, -1))
    p = log_softmax(plain, -1)
    mean = np.mean([(np.exp(p) * (p - q)).sum(-1).mean() for q in runs]) / log(2)
    mixture = (np.exp(p) * (p - logsumexp(runs, 0) + log(4))).sum(-1).mean() / log(2)
    assert found.kl_bits[1] == pytest.approx(mean, rel=1e-4)
    assert found.mixture_bits[1] == pytest.approx(mixture, rel=1e-4)
    assert mixture < mean


def test_the_best_of_many_seeds_pays_for_the_choice() -> None:
    few, many = (curve(Resample(), draws=1, chosen_from=n)[0] for n in (1, 1024))
    assert many.name_bits - few.name_bits == pytest.approx(10.0)


def test_a_floor_bounds_the_surprise() -> None:
    """With all of a prediction but a share of 1/64 lost, the KL is at most that of the unigrams and 6 bits."""
    bare, floored = (curve(floor=f)[0] for f in (0.0, 1 / 64))
    assert floored.kl_bits[0] < bare.kl_bits[0]
    assert floored.kl_bits[2] < -log2(1 - 1 / 64) + 1e-4


def test_tables_are_at_equal_sizes() -> None:
    found, graph, circuits, _ = curve()
    k = int(circuits[1].sum())
    table = pointer_table([found], [0, k - 1, k, graph.n_edges])
    assert table["x"][0] == table["x"][1]
    assert table["x"][2] == (found.kl_bits[1], found.mixture_bits[1])
    with pytest.raises(ExplanationError, match="its smallest circuit has 0 edges"):
        found.at(-1)


def test_different_ablations_are_not_put_in_one_table() -> None:
    with pytest.raises(ExplanationError, match="curves under resample and zero ablation in one table"):
        pointer_table([curve()[0], curve(Resample(), draws=1)[0]], [10])


@pytest.mark.parametrize("wrong", [{"draws": 0}, {"chosen_from": 0}, {"floor": 1.0}, {"floor": -0.1}])
def test_what_makes_no_sense_is_refused(wrong: Any) -> None:
    with pytest.raises(ExplanationError, match="it takes one"):
        curve(Resample(), **wrong)
