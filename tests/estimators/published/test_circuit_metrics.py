"""CPR and CMD as published, AUROC and overlap of edges against plain counts."""

import numpy as np
import pytest

from estimators.published.circuit_metrics import (
    FIXED_AXIS,
    SELF_NORMALISED,
    edge_auroc,
    edge_overlap,
    fixed_axis_areas,
    self_normalised_areas,
)
from mdl.errors import ExplanationError

# The faithfulness values that MIB's own notebook prints at its ten percentages.
PUBLISHED = np.array([0.0232, 0.2393, 0.4988, 0.8030, 0.8813, 0.9203, 0.9357, 0.9672, 0.9781, 1.0])


def test_published_areas_on_the_fixed_axis() -> None:
    found = fixed_axis_areas(PUBLISHED)
    # The ten values are printed to four digits, which leaves 5e-5 of either area open.
    assert found.cpr == pytest.approx(0.96782, abs=2e-5)
    assert found.cmd == pytest.approx(0.03118, abs=2e-5)
    assert found.cpr + found.cmd == pytest.approx(0.999)
    assert found.convention == FIXED_AXIS


def test_the_axis_of_the_circuits_own_sizes() -> None:
    """Pruning leaves few edges at small shares: the same faithfulness then fills more, or less, of the axis."""
    shares = np.array([0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0])
    same = self_normalised_areas(PUBLISHED, 32_491 * shares)
    assert same.cpr == pytest.approx(fixed_axis_areas(PUBLISHED).cpr)
    assert same.convention == SELF_NORMALISED
    assert self_normalised_areas(np.array([0.0, 1.0]), np.array([0, 10])).cmd == 0.5
    assert self_normalised_areas(np.array([2.0, 1.0]), np.array([5, 10])).cmd == 0.25
    for counts in ([3, 1], [0, 0], [1]):
        with pytest.raises(ExplanationError, match="ascending"):
            self_normalised_areas(np.ones(len(counts)), np.array(counts))
    with pytest.raises(ExplanationError, match="9 faithfulness values at 10 sizes"):
        fixed_axis_areas(PUBLISHED[1:])


def test_auroc_against_counting_pairs() -> None:
    rng = np.random.default_rng(3)
    possible = rng.random((7, 9)) < 0.7
    truth = possible & (rng.random(possible.shape) < 0.3)
    scores = np.round(rng.normal(size=possible.shape), 1)
    scores[0] = np.nan
    size = np.where(np.isnan(scores), -1.0, np.abs(scores))
    inside, outside = size[truth], size[possible & ~truth]
    wins = (inside[:, None] > outside).mean() + 0.5 * (inside[:, None] == outside).mean()
    assert edge_auroc(scores, truth, possible) == pytest.approx(wins)
    assert edge_auroc(truth.astype(float), truth, possible) == 1.0
    with pytest.raises(ExplanationError, match="needs both"):
        edge_auroc(scores, possible, possible)


def test_overlap() -> None:
    possible = np.array([[True, True, True], [True, True, False]])
    truth = np.array([[True, True, False], [True, False, False]])
    found = np.array([[True, False, True], [False, False, False]])
    overlap = edge_overlap(found, truth, possible)
    assert (overlap.both, overlap.only_found, overlap.only_true, overlap.neither) == (1, 1, 2, 1)
    assert overlap.iou == 0.25
    assert overlap.true_positive_rate == pytest.approx(1 / 3)
    assert overlap.false_positive_rate == 0.5
    assert overlap.precision == 0.5
    nothing = np.zeros_like(possible)
    # MIB's compare_graphs gives a graph that lists no edge a recall of 1.
    assert edge_overlap(nothing, truth, possible).true_positive_rate == 0.0
    assert edge_overlap(nothing, nothing, possible).iou == 1.0
    with pytest.raises(ExplanationError, match="not possible"):
        edge_overlap(~possible, truth, possible)
