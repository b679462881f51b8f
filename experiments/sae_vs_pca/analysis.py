"""What the cells of the study say: who is shortest when, matched bits and KL, crossings over data and training seeds.

Nothing is measured here. Totals are bits a token, total(N) / N, unless they say otherwise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from estimators.intervals import compare_pairs
from experiments.sae_vs_pca.ladder import ENCODER, Rung
from experiments.sae_vs_pca.run import RUNGS_FILE
from mdl.ledger import Comparison, Score, read_scorecard
from mdl.report.envelope import winners
from mdl.task import ACTIVATIONS, BEHAVIOUR, DEFAULT_FIDELITIES, HEADLINE_FIDELITY

HORIZONS = (1e4, 1e5, 1e6, 1e7, 1e9)
SEED = 0


@dataclass(frozen=True)
class Site:
    """All that was scored on one site of one model; `scores` by rung."""

    model: str
    name: str
    rungs: dict[str, Rung]
    scores: dict[str, tuple[Score, ...]]
    task: dict[str, Any]
    seconds: float

    def score(self, key: str, fidelity: float | None = HEADLINE_FIDELITY) -> Score:
        """Of one rung; fidelity None is behaviour."""
        phenomenon = BEHAVIOUR if fidelity is None else ACTIVATIONS
        return next(s for s in self.scores[key] if (s.phenomenon, s.fidelity) == (phenomenon, fidelity))

    def total(self, key: str, n: float, fidelity: float | None = HEADLINE_FIDELITY) -> float:
        """total(N) / N, bits a token."""
        return float(self.score(key, fidelity).total(n)) / n

    def of(self, *families: str) -> list[str]:
        """The scored rungs of some families."""
        return [key for key in self.scores if self.rungs[key].family in families]

    def best(self, keys: Sequence[str], n: float, fidelity: float | None = HEADLINE_FIDELITY) -> str:
        """The rung of the shortest total at N."""
        return min(keys, key=lambda key: self.total(key, n, fidelity))

    @cached_property
    def families(self) -> list[str]:
        """Families in the order of the ladder."""
        return list(dict.fromkeys(self.rungs[key].family for key in self.rungs if key in self.scores))

    def pair(self, a: str, b: str, fidelity: float | None = HEADLINE_FIDELITY) -> Comparison:
        """Difference of rates and crossing, with intervals from resampling documents."""
        return compare_pairs([self.score(a, fidelity), self.score(b, fidelity)], SEED)[0]


def read_site(folder: Path) -> Site:
    """The cells of one folder."""
    rungs = {key: Rung(**told) for key, told in json.loads((folder / RUNGS_FILE).read_text()).items()}
    scores: dict[str, tuple[Score, ...]] = {}
    task: dict[str, Any] = {}
    seconds = 0.0
    for key in rungs:
        if (path := folder / f"{key}.json").exists():
            card = read_scorecard(path)
            if task and dict(card.task) != task:
                raise SystemExit(f"{path} is a score of another task than its neighbours': delete the older cells")
            scores[key], task = tuple(replace(s, explanation=key) for s in card.scores), dict(card.task)
            seconds += card.seconds
    return Site(folder.parent.name, folder.name, rungs, scores, task, seconds)


def read_all(cells: Path) -> list[Site]:
    """Every site of every model that has cells."""
    return [site for path in sorted(cells.glob(f"*/*/{RUNGS_FILE}")) if (site := read_site(path.parent)).scores]


@dataclass(frozen=True)
class Lead:
    """From `tokens` on `key` has the shortest total of all."""

    tokens: float
    key: str


def leads(site: Site, fidelity: float | None) -> list[Lead]:
    """Who leads from which N on, N = 1,000 to 10^10: below that, what is paid first depends on the first sentences."""
    grid = np.logspace(3, 10, 1401)
    keys = [k for k in site.scores if any(s.fidelity == fidelity for s in site.scores[k])]
    first = winners([site.score(k, fidelity) for k in keys], grid)
    changes = np.flatnonzero(np.diff(first, prepend=-1))
    return [Lead(float(grid[i]), keys[first[i]]) for i in changes]


def kl_at_rate(site: Site, key: str, rate: float) -> float | None:
    """KL in bits at which a rung's rate (state + residual) is `rate`: ln KL is linear in the rate between fidelities;
    None outside what was measured."""
    points = sorted((site.score(key, f).rate, math.log(site.score(key, f).kl_bits)) for f in DEFAULT_FIDELITIES)
    rates = [p[0] for p in points]
    if not rates[0] <= rate <= rates[-1]:
        return None
    return math.exp(float(np.interp(rate, rates, [p[1] for p in points])))


@dataclass(frozen=True)
class Crossing:
    """Where `challenger`, of training seed `seed`, overtakes `champion` for good.

    `tokens`, `low`, `high`: N with a 95 % interval over documents, None where it does not happen; `difference`: of
    their rates, bits a token, with its interval.
    """

    challenger: str
    champion: str
    seed: int
    tokens: float | None
    low: float | None
    high: float | None
    difference: tuple[float, float, float]


def crossings(site: Site, challengers: Sequence[str], champion: str, fidelity: float) -> list[Crossing]:
    """One for each challenger."""
    found = []
    for key in challengers:
        pair = site.pair(key, champion, fidelity)
        interval = pair.crossing if pair.overtaker == key else None
        ends = (None, None, None) if interval is None else (interval.value, interval.low, interval.high)
        difference = (pair.difference.value, pair.difference.low, pair.difference.high)
        found.append(Crossing(key, champion, site.rungs[key].seed, *ends, difference))
    return found


def seeds_of(site: Site, key: str) -> list[str]:
    """The autoencoders that differ from one in the training seed alone."""
    like = site.rungs[key]
    same = (like.family, like.architecture, like.factor, like.sparsity, like.samples)
    return [
        k
        for k, r in site.rungs.items()
        if k in site.scores and (r.family, r.architecture, r.factor, r.sparsity, r.samples) == same
    ]


def shares(site: Site, key: str, n: float, fidelity: float = HEADLINE_FIDELITY) -> dict[str, float]:
    """Bits a token of support, values, residual and static (the explanation's, the rest), and what codes that look at
    token ids save on state and residual."""
    score = site.score(key, fidelity)
    beside, static = score.beside, float(score.static.at(n)) / n
    own = sum(e.bits for e in score.entries if e.name == "parts of the explanation")
    share = own / max(score.column("static"), 1.0)
    return {
        "support": beside["support_bits"],
        "values": beside["value_bits"],
        "residual": score.column("residual"),
        "dictionary": static * share,
        "other static": static * (1.0 - share),
        "state, codes blind to token ids": beside["state_bits_alone"],
        "residual, codes blind to token ids": beside["residual_bits_alone"],
    }


def sweep(site: Site, architecture: str, samples: int, sparsity: float | None, factor: int | None) -> Iterator[str]:
    """Autoencoders of one architecture and training length, of one sparsity or one width."""
    for key in sorted(site.of(ENCODER), key=lambda k: (site.rungs[k].factor, site.rungs[k].sparsity)):
        r = site.rungs[key]
        same = r.architecture == architecture and r.samples == samples and r.seed == 0
        if same and sparsity in (None, r.sparsity) and factor in (None, r.factor):
            yield key
