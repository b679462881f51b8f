"""Which explanation has the shortest total at which N, and where one overtakes another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mdl.errors import MDLError
from mdl.ledger import Comparison, Interval, Score, Scorecard

YARDSTICK = "nothing"
HEADLINE_FIDELITY = 0.01
LARGEST_TOKENS = 1e10
_GRID_POINTS = 4001

Setting = tuple[str, float | None]


@dataclass(frozen=True)
class Overtaking:
    """From `tokens` on `winner` has the shortest total, up to there `loser`; the interval where one was estimated."""

    tokens: float
    winner: str
    loser: str
    interval: Interval | None


def headline(scorecard: Scorecard) -> Setting:
    """The setting to show first: activations at 1 % of the null's KL if it was scored, else what was scored first."""
    if not scorecard.scores:
        raise MDLError("the scorecard holds no scores")
    wanted = [s for s in scorecard.settings if s[1] == HEADLINE_FIDELITY]
    return (wanted or scorecard.settings)[0]


def horizon(scorecard: Scorecard) -> float:
    """The declared number of tokens N at which totals are compared first."""
    try:
        return float(scorecard.task["horizon"])
    except KeyError:
        raise MDLError("the scorecard names no horizon (task['horizon']): `mdl compare` writes one") from None


def ranked(scorecard: Scorecard, setting: Setting) -> list[Score]:
    """The scores of one setting, shortest total at the horizon first."""
    n = horizon(scorecard)
    return sorted(scorecard.select(*setting), key=lambda s: float(s.total(n)))


def token_grid() -> np.ndarray:
    """N from 1 to 10^10, evenly in log N."""
    return np.logspace(0.0, np.log10(LARGEST_TOKENS), _GRID_POINTS)


def winners(scores: Sequence[Score], tokens: np.ndarray) -> np.ndarray:
    """Index into `scores` of the shortest total at each N of `tokens` [points], integers [points]."""
    return np.argmin(np.stack([s.total(tokens) for s in scores]), axis=0)


def paired(scorecard: Scorecard, one: str, other: str, setting: Setting) -> Comparison | None:
    """The comparison of two explanations at one setting, in whichever order it was made."""
    for c in scorecard.comparisons:
        if {c.first, c.second} == {one, other} and (c.phenomenon, c.fidelity) == setting:
            return c
    return None


def rate_difference(scorecard: Scorecard, one: str, other: str, setting: Setting) -> Interval | None:
    """Rate of `one` minus rate of `other`, bits a token, with its interval; None if the pair was not compared."""
    c = paired(scorecard, one, other, setting)
    if c is None or c.first == one:
        return c.difference if c else None
    return Interval(-c.difference.value, -c.difference.high, -c.difference.low, c.difference.level)


def overtakings(scorecard: Scorecard, setting: Setting) -> list[Overtaking]:
    """Every change of the winner along N, with the interval of the pair's crossing where the scorecard has it."""
    scores, grid = scorecard.select(*setting), token_grid()
    best = winners(scores, grid)
    found = []
    for at in np.flatnonzero(np.diff(best)):
        loser, winner = scores[best[at]].explanation, scores[best[at + 1]].explanation
        c = paired(scorecard, winner, loser, setting)
        middle = float(np.sqrt(grid[at] * grid[at + 1]))
        # A pair may cross more than once; the scorecard keeps one crossing, which need not be this one.
        known = c is not None and c.crossing is not None and c.overtaker == winner and _near(c.crossing, middle)
        interval = c.crossing if known and c is not None else None
        found.append(Overtaking(interval.value if interval else middle, winner, loser, interval))
    return found


def _near(crossing: Interval, tokens: float) -> bool:
    return crossing.value / 1.25 < tokens < crossing.value * 1.25
