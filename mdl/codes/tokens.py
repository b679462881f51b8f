"""Tokens under a model's own predictions: a code for large vocabularies, in two stages, from integer weights.

The coder under all streams resolves probabilities of 2**-24 and keeps at least that much for every symbol of an
alphabet. Over a vocabulary of 50,257 this alone would leak 0.0025 bit a token, as much as a good explanation's KL. So a
token is sent as a block of about sqrt(V) ids, then as a member of that block: two small alphabets.

Weights are whole numbers made from the logits by comparison, rounding, and multiplication of float64 (no exponential,
no sum that depends on its order), so that the same logits give the same stream on every machine.

Sources: Duda 2013 (arXiv:1311.2540); Bamler 2022 (arXiv:2201.01741) for the coder and its precision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from jaxtyping import Float, Int

from mdl.codes.bitstream import BitReader, BitWriter
from mdl.errors import CodeError
from mdl.units import nats_to_bits

MAX_VOCABULARY = 1 << 20
STREAM_SPREAD_BITS = 10.0
"""Two streams' marks and padding, of 38.5 to 48 bits each, differ by less than this."""

_GRID_BITS = 16  # log-probabilities are rounded to multiples of 2**-16 bit
_GRID = 1 << _GRID_BITS
_SUM_BITS = 52  # a row of weights sums to at most 2**52: exact in float64, in whatever order
_COARSEST = 2.0**-24  # what the coder resolves


@cache
def _fractional_powers() -> np.ndarray:
    """2**(i / 2**16) for i below 2**16, from square roots and products alone."""
    powers, root = np.ones(1), 2.0
    for _ in range(_GRID_BITS):
        root = math.sqrt(root)
        powers = np.stack([powers, powers * root], 1).ravel()
    powers.flags.writeable = False
    return powers


@dataclass(frozen=True)
class TokenRows:
    """Integer weights of some rows of predictions, `weights` [n, blocks, members] (zero past the vocabulary), float64.

    Made by `TokenCode.rows`; `vocabulary` is V.
    """

    vocabulary: int
    weights: np.ndarray

    @cached_property
    def _block_weights(self) -> np.ndarray:
        return self.weights.sum(2)

    def bits(self, tokens: Int[np.ndarray, "n draws"]) -> Float[np.ndarray, "n draws"]:
        r"""-log2 (weight of the token / sum of its row), in bits: the exact length under the integer weights.

        **Arguments:** `tokens`: one or more tokens for each row. **Raises:** CodeError for an id outside [0, V).
        """
        rows, block, member = self._places(tokens)
        chosen = self.weights[rows, block, member]
        return (np.log2(self._block_weights.sum(1))[rows] - np.log2(chosen)).reshape(tokens.shape)

    def write(self, writer: BitWriter, tokens: Int[np.ndarray, "n draws"]) -> None:
        """Write the tokens: of the first draw all blocks, then all members; then the next draw.

        **Raises:** CodeError for an id outside [0, V).
        """
        rows, block, member = (place.reshape(tokens.shape) for place in self._places(tokens))
        for draw in range(tokens.shape[1]):
            if self.weights.shape[1] > 1:
                writer.choices(block[:, draw], self._block_weights)
            if self.weights.shape[2] > 1:
                writer.choices(member[:, draw], self.weights[rows[:, draw], block[:, draw]])

    def read(self, reader: BitReader, draws: int) -> Int[np.ndarray, "n draws"]:
        """Read `draws` tokens for each row. **Raises:** CodeError for a stream that was cut or damaged."""
        n, blocks, members = self.weights.shape
        tokens = np.zeros((n, draws), np.int64)
        for draw in range(draws if n else 0):
            block = reader.choices(self._block_weights) if blocks > 1 else np.zeros(n, np.int64)
            member = reader.choices(self.weights[np.arange(n), block]) if members > 1 else 0
            tokens[:, draw] = block * members + member
        if tokens.size and tokens.max() >= self.vocabulary:
            raise CodeError(f"token {tokens.max()} outside [0, {self.vocabulary}); the stream was cut or damaged.")
        return tokens

    def shortfall_bits(
        self, probabilities: Float[np.ndarray, "n v"], log_probabilities: Float[np.ndarray, "n v"]
    ) -> Float[np.ndarray, " n"]:
        r"""How far below the ideal the mean cost of a token can fall: none costs more than the floors allow.

        $$\sum_v p_v \max(0, -\log_2 q_v - c_v), \quad c_v = -\log_2 (b_v + 2^{-23}) - \log_2 (m_v + 2^{-23})$$

        with b and m the shares of v's block and of v in it: a coded share exceeds its weight's by less than 2^-23.

        **Arguments:** `probabilities`: p, what tokens are drawn from; `log_probabilities`: log q, nats, normalised:
        what these rows were made from. **Returns:** bits, a bound for each row.
        """
        sums = self._block_weights
        blocks = np.minimum(sums / sums.sum(1, keepdims=True) + 2 * _COARSEST, 1.0)[:, :, None]
        share = self.weights / sums[:, :, None]
        share += 2 * _COARSEST
        np.minimum(share, 1.0, out=share)
        share *= blocks
        missing = np.log2(share, out=share).reshape(len(sums), -1)[:, : self.vocabulary]
        missing -= nats_to_bits(log_probabilities)
        np.maximum(missing, 0.0, out=missing)
        return np.sum(probabilities * missing, 1, where=probabilities > 0)

    def _places(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row, block and member of every token, in stream order."""
        if len(tokens) != len(self.weights):
            raise CodeError(f"tokens for {len(tokens)} rows under {len(self.weights)} rows of predictions.")
        if tokens.size and (tokens.min() < 0 or tokens.max() >= self.vocabulary):
            raise CodeError(f"tokens from {tokens.min()} to {tokens.max()} leave [0, {self.vocabulary}).")
        rows = np.repeat(np.arange(len(tokens)), tokens.shape[1])
        return rows, *np.divmod(tokens.ravel().astype(np.int64), self.weights.shape[2])


@dataclass(frozen=True)
class TokenCode:
    """Tokens of a vocabulary of V ids, each under a row of log-probabilities (or logits) that both ends have.

    A weight is ceil(2**B * 2**d), d being the log-probability less the row's largest, in bits, to the nearest 2**-16,
    and B = 52 - ceil(log2 V): at least 1 for every token. **Raises:** CodeError unless 1 <= V <= 2**20.
    """

    vocabulary: int

    def __post_init__(self) -> None:
        if not 1 <= self.vocabulary <= MAX_VOCABULARY:
            raise CodeError(f"a vocabulary has between 1 and {MAX_VOCABULARY} tokens, not {self.vocabulary}.")

    @property
    def _largest_bits(self) -> int:
        return _SUM_BITS - (self.vocabulary - 1).bit_length()

    @property
    def _shape(self) -> tuple[int, int]:
        """Blocks, and members of each; the last block may be filled up with ids that do not exist."""
        members = math.isqrt(self.vocabulary - 1) + 1
        return -(-self.vocabulary // members), members

    @property
    def tolerance_bits(self) -> float:
        r"""The most by which a token's cost on the stream exceeds -log2 of its probability, bits a token.

        $$2^{-16} + \log_2 (1 + V 2^{-B}) - \sum_{K} \log_2 (1 - K 2^{-24})$$

        Rounding of the logarithms, rounding up of V weights, and what the coder keeps back for the K symbols of each
        of the two alphabets of about sqrt(V): 2.3e-5 at V = 2,048 and 5.5e-5 at 50,257. A stream's marks and
        padding come on top, once.
        """
        floors = sum(-math.log2(1.0 - size * _COARSEST) for size in self._shape if size > 1)
        return 2.0**-_GRID_BITS + math.log2(1.0 + self.vocabulary * 2.0**-self._largest_bits) + floors

    @property
    def own_shortfall_bits(self) -> float:
        r"""The most that `TokenRows.shortfall_bits` can be for tokens drawn from the rows' own distribution, bits.

        $$2^{-16} + \log_2(e) (V 2^{-B} + 2^{-23} \sum_K K)$$

        for at $p = bm$, $\sum_v p_v (1/b_v + 1/m_v)$ is the sum of both alphabets' sizes K; the term before is
        for weights that were rounded up.
        """
        rounding = self.vocabulary * 2.0**-self._largest_bits
        return 2.0**-_GRID_BITS + float(nats_to_bits(rounding + 2 * _COARSEST * sum(self._shape)))

    def rows(self, log_probabilities: Float[np.ndarray, "n v"]) -> TokenRows:
        """Quantise predictions; a constant added to a row makes no difference.

        **Arguments:** `log_probabilities`: nats; -inf is a probability of zero, and is coded with the least weight.

        **Raises:** CodeError for another width than V, and for rows with NaN, +inf or nothing but -inf.
        """
        if log_probabilities.shape[1] != self.vocabulary:
            raise CodeError(f"rows of {log_probabilities.shape[1]} log-probabilities for {self.vocabulary} tokens.")
        top = log_probabilities.max(1, keepdims=True).astype(np.float64)
        if bad := int((~np.isfinite(top)).sum()):
            raise CodeError(f"{bad} of {len(top)} rows of log-probabilities hold NaN or infinity: check the weights.")
        lowest = self._largest_bits + 1
        units = nats_to_bits(log_probabilities - top)
        units *= _GRID
        grid = np.rint(np.maximum(units, -lowest * _GRID, out=units), out=units).astype(np.int32)
        whole = np.ldexp(1.0, self._largest_bits - np.arange(lowest + 1))
        blocks, members = self._shape
        weights = np.zeros((len(top), blocks * members))
        used = weights[:, : self.vocabulary]
        np.multiply(_fractional_powers()[grid & (_GRID - 1)], whole[-(grid >> _GRID_BITS)], out=used)
        np.ceil(used, out=used)
        return TokenRows(self.vocabulary, weights.reshape(len(top), blocks, members))
