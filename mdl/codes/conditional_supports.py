"""Which features are on, given what the receiver knows: token ids, and the support of the previous position.

Features are numbered by first use, as under `IntroductionCode`: no index, order or table is sent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import astuple, dataclass, field, fields, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from mdl.codes.adaptive_integer import AdaptiveInteger
from mdl.codes.bitstream import BitReader, BitWriter
from mdl.codes.contexts import START, check_side, preceding_ids, quarter_power
from mdl.codes.counts import running_counts
from mdl.codes.supports import Pairs, SupportBits, _Uses, _uses, read_flags, write_flags
from mdl.errors import CodeError

PRIORS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""What a feature's own frequency weighs against counts in a context, in tokens."""

RARE = 2
"""Numbers of new features have contexts of their own for token ids met 0, 1, and RARE or more times before."""

FLOOR, CEILING = 2.0**-20, 1.0 - 2.0**-10
LIKELY = 0.25
"""Features above it are written one by one: a block of 16 of them would need a flag beyond what the coder resolves."""

RETENTION = 0.8  # of a feature's recency from one position to the next
LOOKED_AT = 4  # one sequence of so many tells what learning costs
FIT_TOKENS = 1536
MAX_FEATURES = 1 << 22


@dataclass(frozen=True)
class SupportParameters:
    """The sender's choices, each in [0, 8) and sent in 3 bits.

    Priors are indices into PRIORS; weights are exponents in quarters. `token`: the prior of the token id's counts;
    `previous`: of the previous position's bit; `preceding`: of the preceding token id's; `recency`: of the decaying
    counts since the sequence's start.
    """

    token: int = 2
    previous: int = 4
    previous_weight: int = 4
    preceding: int = 5
    preceding_weight: int = 2
    recency: int = 2
    recency_weight: int = 2

    def __post_init__(self) -> None:
        if not all(0 <= value < 8 for value in astuple(self)):
            raise CodeError(f"{self}: every parameter of a conditional support lies in [0, 8).")

    @property
    def bits(self) -> float:
        """What they cost, in bits."""
        return 3.0 * len(fields(self))

    def write(self, writer: BitWriter) -> None:
        writer.uniform(np.array(astuple(self)), 8)

    @classmethod
    def read(cls, reader: BitReader) -> SupportParameters:
        return cls(*reader.uniform(len(fields(cls)), 8).tolist())


class _Place(NamedTuple):
    """A position as both ends know it before its support: how many features were `met`, its token id, the preceding id
    (START at a sequence's start), and the ranks on at the previous position."""

    met: int
    token: int
    preceding: int
    before: np.ndarray


class _Table:
    """How often each feature was on at the positions of one token id, for every id."""

    def __init__(self, n_features: int) -> None:
        self._rows: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._tokens: dict[int, float] = {}
        self._row = np.zeros(n_features)  # the row looked up last, dense
        self._used, self._current = np.zeros(0, dtype=np.int64), START - 1

    def look_up(self, token: int) -> tuple[np.ndarray, float]:
        """Counts [features], valid until the next call, and how many positions they are of."""
        if token != self._current:
            self._row[self._used] = 0.0
            self._used, counts = self._rows.get(token, (self._used[:0], 0.0))
            self._row[self._used] = counts
            self._current = token
        return self._row, self._tokens.get(token, 0.0)

    def add(self, token: int, on: np.ndarray, sign: float) -> None:
        """Count one position, or take it out again (`sign` -1)."""
        row, tokens = self.look_up(token)
        row[on] += sign
        self._used = np.flatnonzero(row)
        self._rows[token], self._tokens[token] = (self._used, row[self._used]), tokens + sign


class _Model:
    """What both ends know of the features, ranked by first use; the probabilities that follow from it."""

    def __init__(self, n_features: int, parameters: SupportParameters) -> None:
        self._parameters = parameters
        self._ones, self._zeros = np.full(n_features, 0.5), np.full(n_features, 0.5)
        # Positions whose previous position had the feature on, and how often it stayed on.
        self._after, self._stayed = np.zeros(n_features), np.zeros(n_features)
        self._by_token, self._by_preceding = _Table(n_features), _Table(n_features)
        self._recent, self._positions = np.zeros(n_features), 0.0
        self._flags = np.zeros(n_features, dtype=bool)  # scratch, all off between calls

    def probabilities(self, place: _Place) -> np.ndarray:
        """The chance of each feature met before."""
        met, token, preceding, before = place
        chosen, ones, zeros = self._parameters, self._ones[:met], self._zeros[:met]
        p = ones / (ones + zeros)
        q, even = 1.0 - p, zeros / ones
        counts, tokens = self._by_token.look_up(token)
        odds = _odds(counts[:met], tokens, PRIORS[chosen.token], p, q)
        if preceding != START:
            on, chances = ones - 0.5 - self._stayed[:met], ones + zeros - 1.0 - self._after[:met]
            on[before], chances[before] = self._stayed[before], self._after[before]
            ratio = _odds(on, chances, PRIORS[chosen.previous], p, q) * even
            odds = odds * quarter_power(ratio, chosen.previous_weight)
            ratio = _odds(self._recent[:met], self._positions, PRIORS[chosen.recency], p, q) * even
            odds = odds * quarter_power(ratio, chosen.recency_weight)
        counts, tokens = self._by_preceding.look_up(preceding)
        ratio = _odds(counts[:met], tokens, PRIORS[chosen.preceding], p, q) * even
        odds = odds * quarter_power(ratio, chosen.preceding_weight)
        return np.minimum(np.maximum(odds / (1.0 + odds), FLOOR), CEILING)

    def count(self, place: _Place, on: np.ndarray, sign: float = 1.0) -> None:
        """Count a position with the ranks `on`, or take it out again (`sign` -1)."""
        met, token, preceding, before = place
        repeated = on[on < met]
        self._ones[repeated] += sign
        self._zeros[:met] += sign
        self._zeros[repeated] -= sign
        if preceding != START:
            self._after[before] += sign
            self._flags[before] = True
            self._stayed[repeated[self._flags[repeated]]] += sign
            self._flags[before] = False
        self._by_token.add(token, on, sign)
        self._by_preceding.add(preceding, on, sign)

    def move(self, place: _Place, on: np.ndarray) -> None:
        """Recency goes on by one position."""
        if place.preceding == START:
            self._recent[:] = 0.0
            self._positions = 0.0
        self._recent *= RETENTION
        self._recent[on] += 1.0
        self._positions = RETENTION * self._positions + 1.0


def _odds(on: np.ndarray, chances: np.ndarray | float, prior: float, p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Odds of (on + prior p) against (off + prior q)."""
    return np.asarray((on + prior * p) / (chances - on + prior * q))


@dataclass(frozen=True)
class _Stream:
    """A support in stream order, features by rank of first use, with the side knowledge."""

    uses: _Uses
    tokens: np.ndarray
    preceding: np.ndarray
    new: np.ndarray
    new_classes: np.ndarray

    @classmethod
    def of(cls, support: sparse.csr_array | Pairs, tokens: np.ndarray, previous: np.ndarray) -> _Stream:
        check_side(tokens, previous, tokens.size)
        uses = _uses(support, tokens.size)
        if uses.order.size > MAX_FEATURES:
            raise CodeError(f"{uses.order.size} features in one support; at most {MAX_FEATURES}.")
        new = np.bincount(uses.first, minlength=tokens.size)
        return cls(uses, tokens, preceding_ids(tokens, previous), new, _new_classes(tokens))

    def positions(self) -> Iterator[tuple[_Place, np.ndarray]]:
        """Every position, and the ranks on at it, ascending."""
        bounds = np.searchsorted(self.uses.tokens, np.arange(self.tokens.size + 1)).tolist()
        met = (np.cumsum(self.new) - self.new).tolist()
        before = np.zeros(0, dtype=np.int64)
        sides = zip(self.tokens.tolist(), self.preceding.tolist(), strict=True)
        for index, (token, preceding) in enumerate(sides):
            on = np.sort(self.uses.ranks[bounds[index] : bounds[index + 1]])
            yield _Place(met[index], token, preceding, before), on
            before = on


def _new_classes(tokens: np.ndarray) -> np.ndarray:
    return np.minimum(running_counts(tokens, np.zeros_like(tokens))[1], RARE)


@dataclass(frozen=True)
class ConditionalSupportCode:
    r"""Features on at each token, given its id, the id before it, and the support before it in its sequence.

    As under `IntroductionCode`, features are numbered by first use; a position's number of new features is an adaptive
    integer (by how often its token id was met). Each feature met before is a decision of odds

    $$\frac{n_v + a p}{m_v + a q} \prod_c \left(\frac{n_c + a_c p}{m_c + a_c q} \cdot \frac{q}{p}\right)^{w_c}$$

    with p = 1 - q its Krichevsky-Trofimov estimate; n_v and m_v how often it was on and off at earlier positions of
    this token id; and the same counts in three more contexts c: its own bit at the previous position, the
    preceding token id, and the positions since the sequence's start with weights 0.8^distance. Probabilities are kept
    in [2^-20, 1 - 2^-10]. Nothing but `parameters` is sent besides.

    The order of the sender's features costs nothing and earns nothing: a stream decodes to the class of all supports
    that differ by a permutation of the features, and the rows of the dictionary then follow in the order of first use.
    A code that named each new feature among n would pay log2 n + log2 (n - 1) + ... for them, which is log2 n! where
    all are used: that is the credit for the order of the rows, and it is saved here because it is never spent. To
    subtract it again would count it twice. Features new at one and the same token keep their order, log2 of the
    factorial of their number: rows are sent in the sender's order there, and what that order says is not used.

    All methods raise CodeError for a support, token ids or previous positions that do not fit. Lengths are in bits.

    **Source:** counts backed off to a shorter context, as in Teh 2006 and MacKay and Peto 1995 (hierarchical Dirichlet
    language models); odds as products of likelihood ratios, tempered, as in naive Bayes.
    """

    parameters: SupportParameters = field(default_factory=SupportParameters)
    _new = AdaptiveInteger(signed=False)

    def bits(
        self, support: sparse.csr_array | Pairs, tokens: Int[np.ndarray, " n"], previous: Int[np.ndarray, " n"]
    ) -> SupportBits:
        """The exact length, and what each token costs in it.

        `learning` is the length less what the tokens would cost had each been coded knowing all others, as every fourth
        sequence tells it: what is left of it per token vanishes as n grows. `total_bits` does without.
        """
        stream = _Stream.of(support, tokens, previous)
        news = self._new.symbol_bits(stream.new, stream.new_classes, RARE + 1)
        costs, model = self._costs(stream)
        per_token = costs + news
        introductions = float(self._new.bits(stream.new, stream.new_classes, RARE + 1).sum())
        learning = float(self._new.learning_bits(stream.new, stream.new_classes, RARE + 1).sum())
        learning += _learnt(stream, model, costs)
        total = math.fsum(per_token) + self.parameters.bits
        shares = per_token + self.parameters.bits / max(tokens.size, 1)
        return SupportBits(total, max(learning, 0.0), introductions, shares)

    def total_bits(
        self, support: sparse.csr_array | Pairs, tokens: Int[np.ndarray, " n"], previous: Int[np.ndarray, " n"]
    ) -> float:
        """The exact length alone."""
        stream = _Stream.of(support, tokens, previous)
        news = self._new.bits(stream.new, stream.new_classes, RARE + 1)
        return math.fsum(self._costs(stream)[0]) + float(news.sum()) + self.parameters.bits

    def _costs(self, stream: _Stream) -> tuple[np.ndarray, _Model]:
        """Bits of each token's decisions, without its number of new features, and what is known after the last."""
        model, costs = _Model(stream.uses.order.size, self.parameters), np.zeros(stream.tokens.size)
        for index, (place, on) in enumerate(stream.positions()):
            costs[index] = _decision_bits(model.probabilities(place), on[on < place.met])
            model.count(place, on)
            model.move(place, on)
        return costs, model

    def write(
        self,
        writer: BitWriter,
        support: sparse.csr_array | Pairs,
        tokens: Int[np.ndarray, " n"],
        previous: Int[np.ndarray, " n"],
    ) -> Int[np.ndarray, " used"]:
        """Write parameters and support. Returns the sender's feature of each rank, as `IntroductionCode.write` does."""
        stream = _Stream.of(support, tokens, previous)
        self.parameters.write(writer)
        self._new.write(writer, stream.new, stream.new_classes, RARE + 1)
        model = _Model(stream.uses.order.size, self.parameters)
        for place, on in stream.positions():
            p = model.probabilities(place)
            flags = np.zeros(place.met, dtype=bool)
            flags[on[on < place.met]] = True
            likely = p > LIKELY
            writer.bits(flags[likely], p[likely])
            write_flags(writer, flags[~likely], p[~likely])
            model.count(place, on)
            model.move(place, on)
        return stream.uses.order

    @staticmethod
    def read(
        reader: BitReader, tokens: Int[np.ndarray, " n"], previous: Int[np.ndarray, " n"]
    ) -> tuple[ConditionalSupportCode, Pairs]:
        """Read the code's parameters, and a support: token indices and feature ranks, by token, then rank."""
        check_side(tokens, previous, tokens.size)
        parameters = SupportParameters.read(reader)
        new = ConditionalSupportCode._new.read(reader, _new_classes(tokens), RARE + 1)
        if new.max(initial=0) > MAX_FEATURES or new.sum() > MAX_FEATURES:
            raise CodeError(f"{new.sum()} features, at most {MAX_FEATURES}; the stream was cut or damaged.")
        model, met = _Model(int(new.sum()), parameters), 0
        before, found = np.zeros(0, dtype=np.int64), []
        sides = zip(tokens.tolist(), preceding_ids(tokens, previous).tolist(), new.tolist(), strict=True)
        for token, preceding, fresh in sides:
            place = _Place(met, token, preceding, before)
            p = model.probabilities(place)
            likely, flags = p > LIKELY, np.zeros(met, dtype=bool)
            flags[likely] = reader.bits(int(likely.sum()), p[likely]) == 1
            flags[~likely] = read_flags(reader, p[~likely])
            on = np.r_[np.flatnonzero(flags), np.arange(met, met + fresh)]
            model.count(place, on)
            model.move(place, on)
            met, before = met + fresh, on
            found.append(on)
        rows = np.repeat(np.arange(tokens.size), [on.size for on in found])
        ranks = np.concatenate(found) if found else np.zeros(0, dtype=np.int64)
        return ConditionalSupportCode(parameters), (rows, ranks)

    @classmethod
    def fit(
        cls, support: sparse.csr_array | Pairs, tokens: Int[np.ndarray, " n"], previous: Int[np.ndarray, " n"]
    ) -> ConditionalSupportCode:
        """The code with parameters for the shortest stream: one at a time, up and down, on the first 1,536 tokens."""
        rows = _uses(support, tokens.size)
        some = rows.tokens < FIT_TOKENS
        pairs, head, before = (rows.tokens[some], rows.ranks[some]), tokens[:FIT_TOKENS], previous[:FIT_TOKENS]
        best = SupportParameters()
        shortest = cls(best).total_bits(pairs, head, before)
        for name in (f.name for f in fields(best)):
            for direction in (1, -1):
                while 0 <= getattr(best, name) + direction < 8:
                    trial = replace(best, **{name: getattr(best, name) + direction})
                    bits = cls(trial).total_bits(pairs, head, before)
                    if bits >= shortest:
                        break
                    best, shortest = trial, bits
        return cls(best)


def _learnt(stream: _Stream, model: _Model, costs: np.ndarray) -> float:
    """Bits that decisions cost beyond what they cost under the counts of all other tokens, which the model holds."""
    sequence, looked_at, saved = -1, 0, 0.0
    for index, (place, on) in enumerate(stream.positions()):
        sequence += place.preceding == START
        if sequence % LOOKED_AT:
            continue
        model.count(place, on, sign=-1.0)
        saved += costs[index] - _decision_bits(model.probabilities(place), on[on < place.met])
        model.count(place, on)
        model.move(place, on)
        looked_at += 1
    return saved * len(costs) / max(looked_at, 1)


def _decision_bits(p: Float[np.ndarray, " met"], on: Int[np.ndarray, " on"]) -> float:
    """Bits of decisions of which those of `on` are one."""
    chosen = p[on]
    return float(np.log2(1.0 - chosen).sum() - np.log2(chosen).sum() - np.log2(1.0 - p).sum())
