"""Paired differences and crossings, with intervals from resampling the unit of sampling (sequence or document)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from mdl.ledger import Comparison, Interval, Score

RESAMPLES = 1000
LEVEL = 0.95


def compare_pairs(scores: Sequence[Score], seed: int) -> tuple[Comparison, ...]:
    """Every pair of scores of one setting, on the same sequences (percentile bootstrap, Efron 1979)."""
    if len(scores) < 2:
        return ()
    sizes = np.asarray(scores[0].sequence_tokens, float)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), RESAMPLES)
    resampled = {s.explanation: weights @ np.asarray(s.sequence_bits) / (weights @ sizes) for s in scores}
    return tuple(_pair(a, b, resampled) for a, b in itertools.combinations(scores, 2))


def _pair(a: Score, b: Score, resampled: dict[str, np.ndarray]) -> Comparison:
    difference = resampled[a.explanation] - resampled[b.explanation]
    crossing, overtaker = _crossing(a, b, resampled)
    return Comparison(
        a.explanation,
        b.explanation,
        a.phenomenon,
        a.fidelity,
        _interval(a.rate - b.rate, difference),
        crossing,
        overtaker,
    )


def _interval(value: float, draws: np.ndarray) -> Interval:
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(value), float(low), float(high), LEVEL)


def last_crossing(grid: np.ndarray, difference: np.ndarray) -> np.ndarray:
    """log N at the last change of sign of each row of `difference` [draws, len(grid)]; -inf where it never changes."""
    log_n = np.log(grid)
    sign = np.sign(difference)
    change = sign[:, 1:] * sign[:, :-1] < 0
    index = change.shape[1] - 1 - np.argmax(change[:, ::-1], 1)
    rows = np.arange(len(difference))
    left, right = difference[rows, index], difference[rows, index + 1]
    with np.errstate(invalid="ignore", divide="ignore"):
        inside = log_n[index] + (log_n[index + 1] - log_n[index]) * left / (left - right)
    return np.where(change.any(1), inside, -np.inf)


def _crossing(a: Score, b: Score, resampled: dict[str, np.ndarray]) -> tuple[Interval | None, str | None]:
    """Where total_a(N) - total_b(N) last changes sign on the grid, and who is shorter from there on."""
    grid = np.asarray(a.static.tokens)
    static = np.asarray(a.static.at(grid)) - np.asarray(b.static.at(grid))
    point = last_crossing(grid, (static + grid * (a.rate - b.rate))[None])[0]
    if not np.isfinite(point):
        return None, None
    draws = last_crossing(grid, static + grid * (resampled[a.explanation] - resampled[b.explanation])[:, None])
    # A draw that never crosses has its crossing before the grid or beyond it, by who is ahead at the end of it.
    end = static[-1] + grid[-1] * (resampled[a.explanation] - resampled[b.explanation])
    point_end = static[-1] + grid[-1] * (a.rate - b.rate)
    draws = np.where(np.isfinite(draws), draws, np.where(np.sign(end) == np.sign(point_end), -np.inf, np.inf))
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="nearest")
    ends = np.clip(np.exp([low, high]), grid[0], grid[-1])
    overtaker = a.explanation if point_end < 0 else b.explanation
    return Interval(float(np.exp(point)), float(ends[0]), float(ends[1]), LEVEL), overtaker
