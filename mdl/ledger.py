"""What a score is made of: entries in three columns, totals over N, and the versioned record of a comparison.

    total(N) = static(N) + N * (state + residual)                                  (bits)

Sums run in float64 on the host. Nothing here computes a bit: it holds what the estimators found, checks that it adds
up, and knows how to be written to and read from JSON.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mdl.errors import MDLError

SCHEMA_VERSION = 3  # 3: scores have `published`
OLDER_SCHEMAS = (2,)  # read, what they lack being empty; to be shown, not verified
COLUMNS = ("static", "state", "residual")
# From the strongest claim to the weakest; a total carries the weakest of its parts.
OBTAINED = ("coded", "codelength", "estimate")


def weakest(obtained: Sequence[str]) -> str:
    """How a sum was obtained: as its weakest part was ("coded" < "codelength" < "estimate")."""
    return max(obtained, key=OBTAINED.index, default="coded")


@dataclass(frozen=True)
class Entry:
    """One line of a ledger.

    **Arguments:** `bits`: for the static column bits once, for the others bits per token; `stderr`: its standard error
    by sequence, 0 where exact; `obtained`: "coded" (a bitstream of this length exists and was decoded), "codelength"
    (the exact length of a named decodable code) or "estimate"; `code`: the code's name; `source`: where it is printed.
    """

    name: str
    column: str
    bits: float
    stderr: float
    obtained: str
    code: str
    source: str = ""

    def __post_init__(self) -> None:
        if self.column not in COLUMNS or self.obtained not in OBTAINED:
            raise MDLError(f"ledger entry {self.name!r}: column {self.column!r} or obtained {self.obtained!r} unknown")
        if not math.isfinite(self.bits) or self.bits < -1e-6:
            raise MDLError(
                f"ledger entry {self.name!r}: {self.bits} bits is no length; a code length is finite and >= 0"
            )


@dataclass(frozen=True)
class Published:
    """What another's formula says of the same explanation: never part of a column, never added to anything.

    **Arguments:** `value`: in `unit`; `code`: the formula; `source`: where it is printed; `obtained`: as in `Entry`.
    """

    value: float
    code: str
    source: str
    unit: str = "bits a token"
    obtained: str = "estimate"


@dataclass(frozen=True)
class StaticCurve:
    """static(N), paid on first use: bits at each N of an increasing grid, and the size of the whole message."""

    tokens: tuple[float, ...]
    bits: tuple[float, ...]
    header_bits: float
    whole_bits: float

    def at(self, n: float | np.ndarray) -> np.ndarray | np.float64:
        """static(N) in bits, linear in log N between grid points, the whole message beyond the grid."""
        return np.interp(np.log(np.maximum(n, 1.0)), np.log(self.tokens), self.bits, right=self.bits[-1])


@dataclass(frozen=True)
class Score:
    """One explanation of one phenomenon at one fidelity.

    **Arguments:** `fidelity`: the fraction of the null's KL, or None under behaviour; `horizon`: the N for which the
    sender chose every precision; `kl_bits`: the measured mean KL
    of the decoded reconstruction, bits a token, with its standard error by sequence; `sequence_bits`: state plus
    residual bits of each held-out sequence (at equal KL: corrected along the rate curve to the target), the unit of
    sampling; `sequence_tokens`: how many scored tokens each has; `slope`: -d rate / d ln KL of that correction,
    bits a token; `curve`: measured (KL, state + residual) points, bits a token; `settings`: the knobs that gave the
    shortest total; `beside`: figures printed beside the score (L0, explained variance, recovered CE and KL, FLOPs),
    which never enter it; `published`: what others' formulas say, by a short name, which never enters it either;
    `message_file`: the message's name in messages/, beside which lie its streams, .state and .residual; `notes`: what a
    reader has to know.
    """

    explanation: str
    phenomenon: str
    fidelity: float | None
    horizon: float
    entries: tuple[Entry, ...]
    static: StaticCurve
    kl_bits: float
    kl_stderr: float
    sequence_bits: tuple[float, ...]
    sequence_tokens: tuple[int, ...]
    evaluations: int
    slope: float = 0.0
    curve: tuple[tuple[float, float], ...] = ()
    settings: Mapping[str, float | str] = field(default_factory=dict)
    beside: Mapping[str, float] = field(default_factory=dict)
    message_file: str = ""
    notes: tuple[str, ...] = ()
    published: Mapping[str, Published] = field(default_factory=dict)

    def column(self, name: str) -> float:
        """Bits of a column: once for static (the whole message), per token for state and residual."""
        return math.fsum(e.bits for e in self.entries if e.column == name)

    def column_stderr(self, name: str) -> float:
        """Standard error of a per-token column; entries of one column are added as if fully correlated."""
        return math.fsum(e.stderr for e in self.entries if e.column == name)

    @property
    def rate(self) -> float:
        """state + residual, bits a token."""
        return self.column("state") + self.column("residual")

    @property
    def rate_stderr(self) -> float:
        """Standard error of the rate by sequence (ratio estimator)."""
        return ratio_stderr(np.asarray(self.sequence_bits), np.asarray(self.sequence_tokens))

    @property
    def obtained(self) -> str:
        return weakest([e.obtained for e in self.entries])

    def total(self, n: float | np.ndarray) -> np.ndarray | np.float64:
        """total(N) = static(N) + N * rate, bits."""
        return self.static.at(n) + np.asarray(n, float) * self.rate


def ratio_stderr(values: np.ndarray, sizes: np.ndarray) -> float:
    """Standard error of sum(values) / sum(sizes) with the sequence as the unit of sampling (Cochran 1977, eq. 6.13)."""
    if len(values) < 2:
        return math.inf
    ratio = values.sum() / sizes.sum()
    return float(np.sqrt(len(values) * np.var(values - ratio * sizes, ddof=1)) / sizes.sum())


@dataclass(frozen=True)
class Interval:
    """A figure with a central interval at a stated level."""

    value: float
    low: float
    high: float
    level: float = 0.95


@dataclass(frozen=True)
class Comparison:
    """Two explanations of one task, on the same sequences.

    `difference`: rate of `first` minus rate of `second`, bits a token, from paired differences by sequence;
    `crossing`: the N from which on `overtaker` has the shorter total, or None if the order never changes on the grid.
    """

    first: str
    second: str
    phenomenon: str
    fidelity: float | None
    difference: Interval
    crossing: Interval | None
    overtaker: str | None


@dataclass(frozen=True)
class Scorecard:
    """Everything `mdl compare` found: the task's description, every score, every comparison.

    `task` describes model, region, data (with their hashes), seed, horizon and the null's KL; scores of different
    tasks cannot share a scorecard. `envelope`: the same explanations, quantised anew for other horizons.
    """

    task: Mapping[str, Any]
    scores: tuple[Score, ...]
    comparisons: tuple[Comparison, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    envelope: tuple[Score, ...] = ()

    @property
    def settings(self) -> list[tuple[str, float | None]]:
        """The (phenomenon, fidelity) pairs that were scored, in the order of scoring."""
        return list(dict.fromkeys((s.phenomenon, s.fidelity) for s in self.scores))

    def select(self, phenomenon: str, fidelity: float | None) -> list[Score]:
        """The scores that are comparable with one another: one phenomenon at one fidelity."""
        return [s for s in self.scores if s.phenomenon == phenomenon and s.fidelity == fidelity]

    def lowest(self, score: Score, n: float) -> float:
        """The shortest total(N) in bits of an explanation that may be sent anew, coarser or finer, for each N."""
        same = (score.explanation, score.phenomenon, score.fidelity)
        others = [s for s in self.envelope if (s.explanation, s.phenomenon, s.fidelity) == same]
        return float(min(s.total(n) for s in (score, *others)))

    def saved(self, score: Score, n: float) -> float:
        """1 - total_E(N) / total_none(N) against the standard coder (or the null) alone, at the score's own setting."""
        none = next((s for s in self.select(score.phenomenon, score.fidelity) if s.explanation == "nothing"), None)
        if none is None:
            raise MDLError("this scorecard lacks 'nothing', the yardstick that savings are measured against")
        return float(1.0 - score.total(n) / none.total(n))

    def to_json(self) -> str:
        return json.dumps({"schema": SCHEMA_VERSION, **dataclasses.asdict(self)}, indent=1, allow_nan=True) + "\n"

    def save(self, path: Path) -> None:
        """Write JSON to a temporary file and rename it, so that what exists is never half overwritten."""
        temporary = path.with_name(path.name + ".partial")
        temporary.write_text(self.to_json())
        os.replace(temporary, path)


def merged(first: Scorecard, second: Scorecard) -> Scorecard:
    """The scores of two comparisons of one task in one scorecard; pairs across the two are not compared.

    **Raises:** `MDLError` where the tasks differ in anything (model, region, data, horizon, seed, ...), or an
    explanation was scored in both.
    """
    keys = sorted(first.task.keys() | second.task.keys())
    differ = [k for k in keys if first.task.get(k) != second.task.get(k)]
    if differ:
        shown = "; ".join(f"{k}: {first.task.get(k)!r} and {second.task.get(k)!r}" for k in differ[:4])
        raise MDLError(
            f"scorecards of different tasks cannot share a table ({shown}): totals are comparable at one region, on "
            "the same data, at one declared horizon. Score all explanations in one comparison."
        )
    twice = {(s.explanation, s.phenomenon, s.fidelity) for s in first.scores} & {
        (s.explanation, s.phenomenon, s.fidelity) for s in second.scores
    }
    if twice:
        raise MDLError(f"scored in both: {', '.join(sorted({t[0] for t in twice}))}. Nobody picks the luckier one")
    return dataclasses.replace(
        first,
        scores=(*first.scores, *second.scores),
        comparisons=(*first.comparisons, *second.comparisons),
        envelope=(*first.envelope, *second.envelope),
        seconds=first.seconds + second.seconds,
    )


def read_scorecard(path: Path, older: bool = True) -> Scorecard:
    """Read a scorecard.

    **Raises:** `MDLError` if the file is not one, or is of a newer schema than this program, or of an older one where
    that is not wanted.
    """
    wrong = (OSError, ValueError, KeyError, AttributeError, TypeError, IndexError)
    try:
        raw = json.loads(path.read_text())
        schema = raw.pop("schema")
        if schema != SCHEMA_VERSION and not (older and schema in OLDER_SCHEMAS):
            raise MDLError(
                f"{path} has scorecard schema {schema}, this program reads {SCHEMA_VERSION} (and shows "
                f"{', '.join(map(str, OLDER_SCHEMAS))}): match the versions"
            )
        scores = tuple(_read_score(s) for s in raw.pop("scores"))
        envelope = tuple(_read_score(s) for s in raw.pop("envelope"))
        comparisons = tuple(_read_comparison(c) for c in raw.pop("comparisons"))
        return Scorecard(scores=scores, comparisons=comparisons, envelope=envelope, **raw)
    except wrong as error:
        raise MDLError(f"{path} is not a scorecard ({error}); expected the scorecard.json of `mdl compare`") from error


def _read_score(raw: dict[str, Any]) -> Score:
    drawn: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.pop("static").items()}
    static = StaticCurve(**drawn)
    entries = tuple(Entry(**e) for e in raw.pop("entries"))
    curve = tuple((p[0], p[1]) for p in raw.pop("curve"))
    published = {name: Published(**p) for name, p in raw.pop("published", {}).items()}
    fixed: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
    return Score(static=static, entries=entries, curve=curve, published=published, **fixed)


def _read_comparison(raw: dict[str, Any]) -> Comparison:
    crossing = raw.pop("crossing")
    difference = Interval(**raw.pop("difference"))
    return Comparison(difference=difference, crossing=Interval(**crossing) if crossing else None, **raw)
