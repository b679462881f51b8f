"""Values of the features that are on, given what the receiver knows: earlier values of a feature, by id and position.

Each integer goes into a context that both ends can compute from what was decoded before, and is coded there with
`AdaptiveInteger`; the length is then the closed form of how often each value occurs in each context.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from mdl.codes.adaptive_integer import ALL_CONTEXTS, RAW, AdaptiveInteger
from mdl.codes.bitstream import BitReader, BitWriter
from mdl.codes.contexts import START, check_side, quarter_octave, running_sums
from mdl.codes.counts import kt_sequence_probabilities
from mdl.codes.supports import Pairs
from mdl.errors import CodeError

LARGEST = 1 << 30
"""Magnitudes count as at most this in what later values are expected from."""

LEVELS, CONFIDENCES, BEFORE = 96, 3, 3
VALUE_CONTEXTS = LEVELS * CONFIDENCES * BEFORE
OWN, FEATURE_PRIOR = 0.5, 1.0  # what the feature's mean weighs in the pair's, and the static scale in the feature's


@dataclass(frozen=True)
class ValueBits:
    """The length of a stream of values, in bits: exact `total`; `learning`, the part that the adaptive contexts spend
    on their probabilities; `per_token` [n], shares that sum to `total`."""

    total: float
    learning: float
    per_token: np.ndarray


def measure(code: AdaptiveInteger, values: np.ndarray, contexts: np.ndarray, owner: np.ndarray, n: int) -> ValueBits:
    """The length of values, each in a context; `owner` is each value's token of n."""
    if values.size == 0:
        return ValueBits(0.0, 0.0, np.zeros(n))
    found = code.measure(values, contexts, int(contexts.max()) + 1)
    return ValueBits(float(found.totals.sum()), float(found.learning.sum()), np.bincount(owner, found.shares, n))


def write_in_order(
    writer: BitWriter, code: AdaptiveInteger, values: np.ndarray, contexts: np.ndarray, group: np.ndarray
) -> None:
    """All decisions of a group's values, layer by layer, before the next group's; groups ascend."""
    layers = list(code.decisions(values))
    index = np.concatenate([layer[0] for layer in layers])
    context = np.concatenate([layer[1] for layer in layers])
    bit = np.concatenate([layer[2] for layer in layers])
    depth = np.repeat(np.arange(len(layers)), [layer[0].size for layer in layers])
    order = np.lexsort((index, depth, group[index]))
    index, context, bit = index[order], context[order], bit[order]
    probability, modelled = np.full(bit.size, 0.5), context != RAW
    cells = contexts[index[modelled]] * ALL_CONTEXTS + context[modelled]
    probability[modelled] = kt_sequence_probabilities(cells, bit[modelled])
    writer.bits(bit, probability)


def _value_context(
    feature: tuple[np.ndarray, np.ndarray],
    pair: tuple[np.ndarray, np.ndarray],
    scale: np.ndarray,
    before: np.ndarray,
) -> np.ndarray:
    """The context of values from (sum, number) of the feature's and of the pair's magnitudes before, and the value at
    the previous position (0 where the feature was off)."""
    mean = (feature[0] + FEATURE_PRIOR * scale) / (feature[1] + FEATURE_PRIOR)
    expected = (pair[0] + OWN * mean) / (pair[1] + OWN)
    last = np.maximum(np.abs(before), 1).astype(np.float64)
    expected = np.where(before != 0, np.sqrt(np.sqrt(last * last * last * expected)), expected)
    level = np.minimum(np.maximum(quarter_octave(expected), 0), LEVELS - 1)
    known = np.minimum(pair[1], CONFIDENCES - 1)
    return np.asarray((level * CONFIDENCES + known) * BEFORE + np.where(before == 0, 0, np.where(before > 0, 1, 2)))


@dataclass(frozen=True)
class ConditionalValueCode:
    r"""Non-zero values of the features that are on, given support, token ids and earlier values.

    A magnitude is expected to be the mean m of the feature's earlier ones at this token id, drawn towards the feature's
    own mean, and that towards its static scale; where the feature was on at the previous position with a value b, it is
    expected to be (|b|^3 m)^(1/4). The context of the value is floor(4 log2) of that, whether the pair was met 0, 1 or
    more times, and the sign of b; contexts are shared by all features, so that few have to be learned.

    In every method `support` is a pair of arrays, token indices and features, in any order and numbering; `values` are
    non-zero integers in the same order; `scales` is a feature's typical magnitude, at least 2^-20, known to both ends
    (of the pairs, not of the features). All raise CodeError for values or side knowledge that do not fit; bits.

    **Source:** the contexts are this package's; each one's length is Krichevsky and Trofimov's (`AdaptiveInteger`).
    """

    signed: bool = False

    @property
    def _code(self) -> AdaptiveInteger:
        return AdaptiveInteger(signed=self.signed, with_zero=False)

    def contexts(
        self,
        support: Pairs,
        values: Int[np.ndarray, " pairs"],
        scales: Float[np.ndarray, " pairs"],
        tokens: Int[np.ndarray, " n"],
        previous: Int[np.ndarray, " n"],
    ) -> Int[np.ndarray, " pairs"]:
        """The context of each value, in [0, VALUE_CONTEXTS)."""
        check_side(tokens, previous, tokens.size)
        owner, features = support
        if not owner.size == features.size == values.size == scales.size:
            sizes = f"{owner.size}, {features.size}, {values.size} and {scales.size}"
            raise CodeError(f"token indices, features, values and scales go together; they are {sizes}.")
        if values.size == 0:
            return np.zeros(0, dtype=np.int64)
        features = np.unique(features, return_inverse=True)[1].astype(np.int64)
        order = np.lexsort((features, owner))
        owner, features, signed, scale = owner[order], features[order], values[order], scales[order]
        magnitude = np.minimum(np.abs(signed), LARGEST).astype(np.float64)
        width = int(features.max()) + 1
        ids = np.unique(tokens, return_inverse=True)[1].astype(np.int64)[owner]
        position = owner * width + features
        wanted = np.where(previous[owner] == START, -1, position - width)
        place = np.minimum(np.searchsorted(position, wanted), position.size - 1)
        before = np.where(position[place] == wanted, np.clip(signed[place], -LARGEST, LARGEST), 0)
        sums = running_sums(features, magnitude), running_sums(ids * width + features, magnitude)
        found = np.empty(values.size, dtype=np.int64)
        found[order] = _value_context(*sums, scale, before)
        return found

    def bits(
        self,
        support: Pairs,
        values: Int[np.ndarray, " pairs"],
        scales: Float[np.ndarray, " pairs"],
        tokens: Int[np.ndarray, " n"],
        previous: Int[np.ndarray, " n"],
    ) -> ValueBits:
        """The exact length, its share of learning and each token's share."""
        contexts = self.contexts(support, values, scales, tokens, previous)
        return measure(self._code, values, contexts, support[0], tokens.size)

    def write(
        self,
        writer: BitWriter,
        support: Pairs,
        values: Int[np.ndarray, " pairs"],
        scales: Float[np.ndarray, " pairs"],
        tokens: Int[np.ndarray, " n"],
        previous: Int[np.ndarray, " n"],
    ) -> None:
        """Write the values, token by token, within a token by the feature's rank of first use.

        Features new at one token are ranked by ascending index, as `ConditionalSupportCode.write` ranks them.
        """
        contexts = self.contexts(support, values, scales, tokens, previous)
        if values.size == 0:
            return
        order = np.lexsort((_first_use_ranks(*support), support[0]))
        write_in_order(writer, self._code, values[order], contexts[order], np.arange(values.size))

    def read(
        self,
        reader: BitReader,
        support: Pairs,
        scales: Float[np.ndarray, " pairs"],
        tokens: Int[np.ndarray, " n"],
        previous: Int[np.ndarray, " n"],
    ) -> Int[np.ndarray, " pairs"]:
        """Read the values of a support as it was read: features by rank, ascending by token, then rank."""
        check_side(tokens, previous, tokens.size)
        owner, ranks = support
        values = np.zeros(owner.size, dtype=np.int64)
        memory = _ValueMemory(int(ranks.max(initial=-1)) + 1)
        cells: dict[int, tuple[list[float], list[float]]] = {}
        bounds = np.searchsorted(owner, np.arange(tokens.size + 1)).tolist()
        for index, (token, before) in enumerate(zip(tokens.tolist(), previous.tolist(), strict=True)):
            here = slice(bounds[index], bounds[index + 1])
            contexts = memory.contexts(ranks[here], token, before != START, scales[here])
            found = [self._read_one(reader, cells, context) for context in contexts.tolist()]
            reader.check()
            values[here] = found
            memory.add(ranks[here], token, values[here])
        return values

    def _read_one(self, reader: BitReader, cells: dict[int, tuple[list[float], list[float]]], context: int) -> int:
        if context not in cells:
            cells[context] = ([0.0] * ALL_CONTEXTS, [0.0] * ALL_CONTEXTS)
        return self._code._read_one(reader, *cells[context])


class _ValueMemory:
    """What the reader of values remembers: sums and numbers of magnitudes, and the values at the previous position."""

    def __init__(self, n_features: int) -> None:
        self._sums, self._counts = np.zeros(n_features), np.zeros(n_features, dtype=np.int64)
        self._last = np.zeros(n_features, dtype=np.int64)
        self._on = np.zeros(0, dtype=np.int64)
        self._pairs: dict[tuple[int, int], tuple[float, int]] = {}

    def contexts(self, ranks: np.ndarray, token: int, follows: bool, scale: np.ndarray) -> np.ndarray:
        pairs = [self._pairs.get((token, rank), (0.0, 0)) for rank in ranks.tolist()]
        sums, counts = np.array([s for s, _ in pairs]), np.array([c for _, c in pairs], dtype=np.int64)
        before = self._last[ranks] if follows else np.zeros(ranks.size, dtype=np.int64)
        return _value_context((self._sums[ranks], self._counts[ranks]), (sums, counts), scale, before)

    def add(self, ranks: np.ndarray, token: int, values: np.ndarray) -> None:
        magnitudes = np.minimum(np.abs(values), LARGEST).astype(np.float64)
        self._sums[ranks] += magnitudes
        self._counts[ranks] += 1
        for rank, magnitude in zip(ranks.tolist(), magnitudes.tolist(), strict=True):
            total, count = self._pairs.get((token, rank), (0.0, 0))
            self._pairs[token, rank] = (total + magnitude, count + 1)
        self._last[self._on] = 0
        self._last[ranks] = np.clip(values, -LARGEST, LARGEST)
        self._on = ranks


def _first_use_ranks(owner: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Each pair's feature by first use; ties at one token by ascending feature."""
    order = np.lexsort((features, owner))
    distinct, first, dense = np.unique(features[order], return_index=True, return_inverse=True)
    rank = np.empty(distinct.size, dtype=np.int64)
    rank[np.argsort(first)] = np.arange(distinct.size)
    found = np.empty(owner.size, dtype=np.int64)
    found[order] = rank[dense]
    return found
