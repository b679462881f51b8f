"""A few integers for every token, given what the receiver knows: the token ids, and what was decoded before."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from mdl.codes.adaptive_integer import AdaptiveInteger, _Contexts
from mdl.codes.bitstream import BitReader, BitWriter
from mdl.codes.conditional_values import LARGEST, ValueBits, measure, write_in_order
from mdl.codes.contexts import START, check_side, running_sums
from mdl.errors import CodeError

COLUMN_LEVELS = 12
COLUMN_CONTEXTS = 2 * COLUMN_LEVELS + 1
BLENDS = (0.0, 0.25, 0.5, 0.75)


@dataclass(frozen=True)
class ConditionalColumnCode:
    r"""A few integers for every token (coefficients on axes), given the token ids and what was decoded before.

    The value q of axis j at a position of token id v is expected to be

    $$\mu_{vj} + b \, (q' - \mu'_{j})$$

    with mu = S / (n + 1), S being the sum of the axis' n earlier values at v; q' the axis' value at the previous
    position of the sequence (where there is one), and mu' what mu was there. Sign and floor(log2(4 |.|)), at most 12,
    of that are the context, each axis having contexts of its own. `blend`: b in quarters, in [0, 4), 2 bits.

    Values [n, width] are integers. All methods raise CodeError for what does not fit; lengths are in bits.

    **Source:** the contexts are this package's; each one's length is Krichevsky and Trofimov's (`AdaptiveInteger`).
    """

    blend: int = 2
    _code = AdaptiveInteger()

    def __post_init__(self) -> None:
        if not 0 <= self.blend < len(BLENDS):
            raise CodeError(f"blend {self.blend} is not in [0, {len(BLENDS)}): it is b in quarters.")

    def contexts(
        self, values: Int[np.ndarray, "n width"], tokens: Int[np.ndarray, " n"], previous: Int[np.ndarray, " n"]
    ) -> Int[np.ndarray, "n width"]:
        """The context of each value, in [0, width * COLUMN_CONTEXTS)."""
        check_side(tokens, previous, len(values))
        held = np.clip(values, -LARGEST, LARGEST).astype(np.float64)
        sums, counts = running_sums(tokens, held)
        mean = sums / (counts + 1.0)[:, None]
        follows = (previous != START)[:, None]
        surprise = np.where(follows, np.roll(held - mean, 1, axis=0), 0.0)
        return _column_context(mean + BLENDS[self.blend] * surprise)

    def bits(
        self, values: Int[np.ndarray, "n width"], tokens: Int[np.ndarray, " n"], previous: Int[np.ndarray, " n"]
    ) -> ValueBits:
        """The exact length, its share of learning and each token's share."""
        contexts = self.contexts(values, tokens, previous).ravel()
        owner = np.repeat(np.arange(len(values)), values.shape[1])
        found = measure(self._code, values.ravel(), contexts, owner, len(values))
        return ValueBits(found.total + 2.0, found.learning, found.per_token + 2.0 / max(len(values), 1))

    def write(
        self,
        writer: BitWriter,
        values: Int[np.ndarray, "n width"],
        tokens: Int[np.ndarray, " n"],
        previous: Int[np.ndarray, " n"],
    ) -> None:
        """Write the blend and the values, token by token; the reader needs the width."""
        writer.uniform(np.array([self.blend]), len(BLENDS))
        contexts = self.contexts(values, tokens, previous)
        if values.size:
            group = np.repeat(np.arange(len(values)), values.shape[1])
            write_in_order(writer, self._code, values.ravel(), contexts.ravel(), group)

    @classmethod
    def read(
        cls, reader: BitReader, width: int, tokens: Int[np.ndarray, " n"], previous: Int[np.ndarray, " n"]
    ) -> tuple[ConditionalColumnCode, Int[np.ndarray, "n width"]]:
        """Read the code's blend, and values [n, width] under it."""
        check_side(tokens, previous, tokens.size)
        code = cls(int(reader.uniform(1, len(BLENDS))[0]))
        blend = BLENDS[code.blend]
        values = np.zeros((tokens.size, width), dtype=np.int64)
        cells = _Contexts(width * COLUMN_CONTEXTS)
        memory: dict[int, tuple[np.ndarray, int]] = {}
        surprise = np.zeros(width)
        for index, (token, before) in enumerate(zip(tokens.tolist(), previous.tolist(), strict=True)):
            total, count = memory.get(token, (np.zeros(width), 0))
            mean = total / (count + 1.0)
            contexts = _column_context(mean + blend * (surprise if before != START else np.zeros(width)))
            values[index] = cls._code._read_round(reader, cells, contexts)
            reader.check()
            held = np.clip(values[index], -LARGEST, LARGEST).astype(np.float64)
            memory[token], surprise = (total + held, count + 1), held - mean
        return code, values

    @classmethod
    def fit(
        cls, values: Int[np.ndarray, "n width"], tokens: Int[np.ndarray, " n"], previous: Int[np.ndarray, " n"]
    ) -> ConditionalColumnCode:
        """The code with the blend of the shortest stream."""
        codes = [cls(blend) for blend in range(len(BLENDS))]
        return min(codes, key=lambda code: code.bits(values, tokens, previous).total)


def _column_context(expected: Float[np.ndarray, "*n width"]) -> Int[np.ndarray, "*n width"]:
    """Axis, sign and octave of what is expected."""
    octave = np.minimum(np.frexp(4.0 * expected)[1].astype(np.int64), COLUMN_LEVELS)  # floor(log2(4 |x|)) + 1
    level = np.where(expected > 0, np.maximum(octave, 0), -np.maximum(octave, 0))
    return np.asarray(np.arange(expected.shape[-1]) * COLUMN_CONTEXTS + COLUMN_LEVELS + level)
