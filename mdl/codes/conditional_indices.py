"""One index a token, given the token's id and the index at the previous position of its sequence."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from mdl.codes.bitstream import BitReader, BitWriter
from mdl.codes.conditional_values import ValueBits
from mdl.codes.contexts import START, check_side, quarter_power
from mdl.codes.indices import _by_first_use
from mdl.errors import CodeError

PRIORS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
"""What a cluster's own share weighs against counts in a context, in tokens."""

PARAMETERS = 3


class _Urn:
    """What both ends know of the clusters met so far, ranked by first use."""

    def __init__(self, code: ConditionalIndexCode) -> None:
        self._code = code
        self._uses = np.zeros(0)
        self._tokens: dict[int, dict[int, float]] = {}
        self._after: dict[int, dict[int, float]] = {}
        self._n = 0

    def weights(self, token: int, before: int) -> np.ndarray:
        """Weights (not normalised) of the clusters met so far and, last, of a new one. `before`: rank or START."""
        met = self._uses.size
        n, used = max(self._n, 1), np.count_nonzero(self._uses)
        chance_new = (used - 0.5) / n if used else 1.0  # Krichevsky and Trofimov's, as in IndexCode
        share = (self._uses / n) * (1.0 - chance_new)
        weights = self._pulled(self._tokens.get(token), np.r_[share, chance_new], PRIORS[self._code.token])
        if before != START:
            pulled = self._pulled(self._after.get(before), share, PRIORS[self._code.previous])
            # A share is 0 only where the one use of a cluster was taken out again.
            weights[:met] *= quarter_power(pulled / np.where(share > 0, share, 1.0), self._code.weight)
        return weights

    @staticmethod
    def _pulled(counts: dict[int, float] | None, share: np.ndarray, prior: float) -> np.ndarray:
        """(count + prior * share) / (number + prior)."""
        found, total = prior * share, prior
        if counts:
            ranks = np.fromiter(counts.keys(), dtype=np.int64, count=len(counts))
            found[ranks] += np.fromiter(counts.values(), dtype=np.float64, count=len(counts))
            total += float(sum(counts.values()))  # integers: exact in any order
        return np.asarray(found / total)

    def count(self, rank: int, token: int, before: int, sign: float = 1.0) -> None:
        """Count one position, or take it out again (`sign` -1)."""
        if rank == self._uses.size:
            self._uses = np.r_[self._uses, 0.0]
        self._uses[rank] += sign
        self._n += int(sign)
        for table, key in ((self._tokens, token), (self._after, before)):
            row = table.setdefault(key, {})
            row[rank] = row.get(rank, 0.0) + sign


@dataclass(frozen=True)
class ConditionalIndexCode:
    r"""Indices in stream order, clusters being numbered by first use, given token ids and previous indices.

    A cluster has the share n_c / n of the tokens so far, times the chance that the cluster is not new (Krichevsky and
    Trofimov's, as under `IndexCode`), which token id v and previous cluster b sharpen:

    $$\frac{n_{vc} + a\,p_c}{n_v + a} \left(\frac{n_{bc} + a'\,p_c}{(n_b + a')\,p_c}\right)^{w}$$

    over the sum of these weights over all clusters and "a new one", whose weight has no second factor.
    `token` and `previous` are indices of a and a' into PRIORS, `weight` is w in quarters; each in [0, 8), 3 bits.

    `indices` are integers of any range, one dimension. All methods raise CodeError for what does not fit; bits.

    **Source:** as for `ConditionalSupportCode`.
    """

    token: int = 6
    previous: int = 5
    weight: int = 5

    def __post_init__(self) -> None:
        if not all(0 <= value < 8 for value in (self.token, self.previous, self.weight)):
            raise CodeError(f"{self}: every parameter of a conditional index lies in [0, 8).")

    def bits(
        self, indices: Int[np.ndarray, " n"], tokens: Int[np.ndarray, " n"], previous: Int[np.ndarray, " n"]
    ) -> ValueBits:
        """The exact length; `learning`: the length less what tokens would cost, each coded knowing all others."""
        steps = list(_steps(indices, tokens, previous))
        costs, urn = self._costs(steps), _Urn(self)
        for step in steps:
            urn.count(*step)
        known = []
        for rank, token, before in steps:
            urn.count(rank, token, before, sign=-1.0)
            weights = urn.weights(token, before)
            if urn._uses[rank] > 0:
                known.append(_cost(weights, rank))
            else:  # met once in all: it is new to whoever knows the others
                known.append(_cost(weights, weights.size - 1))
            urn.count(rank, token, before)
        extra = 3.0 * PARAMETERS
        learning = max(math.fsum(costs) - math.fsum(known), 0.0)
        return ValueBits(math.fsum(costs) + extra, learning, np.array(costs) + extra / max(indices.size, 1))

    def total_bits(
        self, indices: Int[np.ndarray, " n"], tokens: Int[np.ndarray, " n"], previous: Int[np.ndarray, " n"]
    ) -> float:
        """The exact length alone."""
        return math.fsum(self._costs(list(_steps(indices, tokens, previous)))) + 3.0 * PARAMETERS

    def _costs(self, steps: list[tuple[int, int, int]]) -> list[float]:
        urn, costs = _Urn(self), []
        for step in steps:
            costs.append(_cost(urn.weights(step[1], step[2]), step[0]))
            urn.count(*step)
        return costs

    def write(
        self,
        writer: BitWriter,
        indices: Int[np.ndarray, " n"],
        tokens: Int[np.ndarray, " n"],
        previous: Int[np.ndarray, " n"],
    ) -> Int[np.ndarray, " clusters"]:
        """Write parameters and indices; returns the sender's index of each rank."""
        writer.uniform(np.array([self.token, self.previous, self.weight]), 8)
        urn = _Urn(self)
        for step in _steps(indices, tokens, previous):
            weights = urn.weights(step[1], step[2])
            if weights.size > 1:
                writer.choices(np.array([step[0]]), weights[None, :])
            urn.count(*step)
        return _by_first_use(indices)[1] if indices.size else np.zeros(0, dtype=np.int64)

    @classmethod
    def read(
        cls, reader: BitReader, tokens: Int[np.ndarray, " n"], previous: Int[np.ndarray, " n"]
    ) -> tuple[ConditionalIndexCode, Int[np.ndarray, " n"]]:
        """Read the code's parameters, and the indices, as ranks by first use."""
        check_side(tokens, previous, tokens.size)
        code = cls(*reader.uniform(PARAMETERS, 8).tolist())
        urn = _Urn(code)
        ranks = np.zeros(tokens.size, dtype=np.int64)
        for index, (token, last) in enumerate(zip(tokens.tolist(), previous.tolist(), strict=True)):
            before = START if last == START else int(ranks[last])
            weights = urn.weights(token, before)
            ranks[index] = reader.choices(weights[None, :])[0] if weights.size > 1 else 0
            urn.count(int(ranks[index]), token, before)
        reader.check()
        return code, ranks

    @classmethod
    def fit(
        cls, indices: Int[np.ndarray, " n"], tokens: Int[np.ndarray, " n"], previous: Int[np.ndarray, " n"]
    ) -> ConditionalIndexCode:
        """The code with parameters for the shortest stream: each in turn, all eight values of it."""
        best = cls()
        for name in ("weight", "token", "previous"):
            chosen = {"token": best.token, "previous": best.previous, "weight": best.weight}
            codes = [cls(**{**chosen, name: value}) for value in range(8)]
            best = min(codes, key=lambda code: code.total_bits(indices, tokens, previous))
        return best


def _steps(indices: np.ndarray, tokens: np.ndarray, previous: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """At each token: rank of its cluster, its id, rank of the cluster before it (START where a sequence starts)."""
    check_side(tokens, previous, indices.size)
    if indices.size == 0:
        return
    ranks = _by_first_use(indices)[0]
    before = np.where(previous == START, START, ranks[np.maximum(previous, 0)])
    yield from zip(ranks.tolist(), tokens.tolist(), before.tolist(), strict=True)


def _cost(weights: np.ndarray, chosen: int) -> float:
    return math.log2(math.fsum(weights)) - math.log2(weights[chosen])
