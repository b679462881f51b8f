"""Intervals by resampling sequences: their coverage, and the crossings of known lines."""

from __future__ import annotations

import numpy as np
import pytest

from estimators.intervals import LEVEL, compare_pairs, last_crossing
from mdl.ledger import Entry, Score, StaticCurve, ratio_stderr

GRID = tuple(np.logspace(0, 10, 81))


def score(
    name: str, static: float | tuple[float, ...], bits: np.ndarray, sizes: np.ndarray, rate: float | None = None
) -> Score:
    """A score of given static bits (a number, or one for each N of the grid) and given bits of each sequence."""
    curve = static if isinstance(static, tuple) else (static,) * len(GRID)
    mean = float(bits.sum() / sizes.sum()) if rate is None else rate
    return Score(
        explanation=name,
        phenomenon="activations",
        fidelity=0.01,
        horizon=1e6,
        entries=(Entry("stream", "state", mean, 0.0, "codelength", "code"),),
        static=StaticCurve(GRID, curve, 0.0, curve[-1]),
        kl_bits=0.05,
        kl_stderr=0.0,
        sequence_bits=tuple(bits.tolist()),
        sequence_tokens=tuple(int(s) for s in sizes),
        evaluations=1,
    )


def lengths(rng: np.random.Generator, sequences: int) -> np.ndarray:
    return rng.integers(20, 60, sequences).astype(float)


def test_the_interval_of_a_difference_covers_the_truth() -> None:
    """Sequences of unequal length and difficulty, a true difference of 3 bits a token: 95 % of intervals hold it."""
    trials, held = 300, 0
    for trial in range(trials):
        rng = np.random.default_rng(trial)
        sizes = lengths(rng, 60)
        difficulty = 100 + 15 * rng.normal(size=60)
        first = sizes * (difficulty + 3 + 2 * rng.normal(size=60))
        second = sizes * (difficulty + 2 * rng.normal(size=60))
        found = compare_pairs([score("a", 0.0, first, sizes), score("b", 0.0, second, sizes)], trial)[0].difference
        held += found.low <= 3 <= found.high
        assert found.level == LEVEL
    # 95 %, less a percent or two of the percentile bootstrap with 60 sequences; the count's own error is 1.3 %.
    assert 0.905 <= held / trials <= 0.98


def test_pairing_removes_what_both_share() -> None:
    rng = np.random.default_rng(0)
    sizes = lengths(rng, 80)
    shared = sizes * (100 + 30 * rng.normal(size=80))
    second = shared + sizes * 0.1 * rng.normal(size=80)
    pair = compare_pairs([score("a", 0.0, shared + 2 * sizes, sizes), score("b", 0.0, second, sizes)], 1)[0]
    assert pair.difference.high - pair.difference.low < 0.2
    assert pair.difference.low < 2 < pair.difference.high
    assert 4 * ratio_stderr(shared, sizes) > 10


def test_the_crossing_of_two_lines_is_found() -> None:
    """Half a million bits more static, five bits a token less: from 100,000 tokens on."""
    rng = np.random.default_rng(1)
    sizes = lengths(rng, 100)
    first = sizes * (20 + rng.normal(size=100))
    second = first - sizes * (5 + 0.5 * rng.normal(size=100))
    pair = compare_pairs([score("cheap", 1e5, first, sizes), score("dear", 6e5, second, sizes)], 2)[0]
    expected = 5e5 / ((first - second).sum() / sizes.sum())
    assert pair.overtaker == "dear"
    # Total bits are interpolated in log N between points a third of an octave apart.
    assert pair.crossing.value == pytest.approx(expected, rel=0.02)
    assert pair.crossing.low < expected < pair.crossing.high
    assert pair.crossing.low == pytest.approx(expected / 1.02, rel=0.03)
    assert pair.crossing.high == pytest.approx(expected * 1.02, rel=0.03)


def test_lines_that_never_cross_have_no_crossing() -> None:
    rng = np.random.default_rng(2)
    sizes = lengths(rng, 50)
    bits = sizes * (20 + rng.normal(size=50))
    pair = compare_pairs([score("good", 1e4, bits, sizes), score("bad", 1e5, bits + 3 * sizes, sizes)], 3)[0]
    assert pair.crossing is None
    assert pair.overtaker is None
    assert pair.difference.high < 0


def test_a_crossing_that_may_never_come_is_open_ended() -> None:
    """Rates that can hardly be told apart: some resamples never cross, and the interval says so."""
    rng = np.random.default_rng(3)
    sizes = np.full(30, 50.0)
    noise = rng.normal(size=30)
    first = sizes * 20
    second = first - sizes * (0.02 + noise - noise.mean())
    pair = compare_pairs([score("cheap", 1e5, first, sizes), score("dear", 6e5, second, sizes)], 4)[0]
    assert pair.overtaker == "dear"
    assert pair.crossing.value == pytest.approx(2.5e7, rel=0.05)
    assert pair.crossing.high == GRID[-1]


def test_the_last_of_several_crossings_counts() -> None:
    """Static bits that rise late: behind at first, ahead in the middle, behind for good."""
    static = tuple(np.where(np.array(GRID) < 1e6, 1e3, 3e7).tolist())
    sizes = np.full(40, 50.0)
    bits = sizes * 10
    late, steady = score("late", static, bits, sizes), score("steady", 1e5, bits + sizes, sizes)
    pair = compare_pairs([late, steady], 0)[0]
    assert pair.overtaker == "late"
    assert pair.crossing.value == pytest.approx(3e7, rel=0.02)


def test_last_crossing_by_row() -> None:
    grid = np.array([1.0, 10.0, 100.0, 1000.0])
    rows = np.array([[1, 1, -1, -1], [1, -1, 1, -3], [2, 2, 2, 2], [-1, -2, -3, -4]], float)
    found = last_crossing(grid, rows)
    assert found[0] == pytest.approx(np.log(10**1.5))
    assert found[1] == pytest.approx(np.log(10**2.25))
    assert np.isneginf(found[2:]).all()


def test_every_pair_is_compared_once_on_the_same_draws() -> None:
    rng = np.random.default_rng(4)
    sizes = lengths(rng, 30)
    scores = [score(name, 0.0, sizes * (10 + rng.normal(size=30)), sizes) for name in "abcd"]
    pairs = compare_pairs(scores, 0)
    assert [(p.first, p.second) for p in pairs] == [(a, b) for i, a in enumerate("abcd") for b in "abcd"[i + 1 :]]
    assert pairs == compare_pairs(scores, 0)
    assert pairs != compare_pairs(scores, 1)
    by = {(p.first, p.second): p.difference.value for p in pairs}
    assert by["a", "c"] == pytest.approx(by["a", "b"] + by["b", "c"])
    assert compare_pairs(scores[:1], 0) == ()


def test_the_ratio_stderr_is_that_of_a_bootstrap() -> None:
    rng = np.random.default_rng(5)
    sizes = lengths(rng, 200)
    bits = sizes * (20 + 4 * rng.normal(size=200))
    draws = rng.integers(0, 200, (4000, 200))
    bootstrap = (bits[draws].sum(1) / sizes[draws].sum(1)).std()
    assert ratio_stderr(bits, sizes) == pytest.approx(bootstrap, rel=0.05)
    assert ratio_stderr(bits[:1], sizes[:1]) == np.inf
    assert ratio_stderr(7 * sizes, sizes) == 0


def test_a_rates_error_is_by_sequence_not_by_token() -> None:
    """Tokens of a sequence that share their fate count once."""
    rng = np.random.default_rng(6)
    sizes = np.full(100, 40.0)
    error = score("a", 0.0, sizes * (20 + 4 * rng.normal(size=100)), sizes).rate_stderr
    assert error == pytest.approx(4 / np.sqrt(100), rel=0.2)
