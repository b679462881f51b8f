"""One index a token: the cluster, the codeword, the expert. An adaptive code in which an unused index costs nothing."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from scipy.special import gammaln

from mdl.codes.bitstream import BitReader, BitWriter
from mdl.codes.counts import kt_bits, running_counts
from mdl.errors import CodeError
from mdl.units import nats_to_bits

MAX_TOKENS = 1 << 21
_LEVELS = 22


class IndexCode:
    """Indices in stream order, clusters being numbered by first use.

    The first token's cluster is new. At every later token: is its cluster new (a Krichevsky-Trofimov decision), and if
    not, which of those met before, with probability count / tokens so far. So with n tokens, C clusters and k_j uses

        kt_bits(C - 1, n - C) + sum over tokens t of an old cluster of log2 t - sum over clusters of log2 (k_j - 1)!

    t being the number of tokens before. The urn's rule: Blackwell and MacQueen 1973, Annals of Statistics 1(2).
    `indices` are integers of any range, one dimension. All methods raise CodeError for more than 2**21 tokens.
    """

    def bits(self, indices: Int[np.ndarray, " n"]) -> tuple[float, Float[np.ndarray, " n"]]:
        """The exact length in bits, and each token's share of it.

        A share is -log2 p under the frequencies at the end, plus the same amount for every token; they sum to the
        length.
        """
        if indices.size == 0:
            return 0.0, np.zeros(0)
        ranks, _, new = _by_first_use(indices)
        uses, n = np.bincount(ranks), indices.size
        total = float(kt_bits(uses.size - 1, n - uses.size))
        total += float(np.log2(np.flatnonzero(~new)).sum() - nats_to_bits(gammaln(uses)).sum())
        p_new = (uses.size - 0.5) / n
        share = np.where(new, -np.log2(p_new), -np.log2(1.0 - p_new) - np.log2(uses[ranks] / n))
        return total, share + (total - share.sum()) / n

    def learning_bits(self, indices: Int[np.ndarray, " n"]) -> float:
        """The length less the sum over clusters of k_j log2(n / k_j), which knows the frequencies; in bits."""
        uses = np.unique(indices, return_counts=True)[1].astype(np.float64)
        return self.bits(indices)[0] - float((uses * np.log2(indices.size / uses)).sum())

    def write(self, writer: BitWriter, indices: Int[np.ndarray, " n"]) -> Int[np.ndarray, " clusters"]:
        """Write the indices; returns the sender's index of each rank, the order in which to send the clusters."""
        if indices.size == 0:
            return np.zeros(0, dtype=np.int64)
        ranks, order, new = _by_first_use(indices)
        n = indices.size
        met = np.cumsum(new) - new
        tokens = np.arange(1, n)
        rows, depths, flags, chances = [tokens], [np.zeros(n - 1)], [new[1:]], [(met[1:] - 0.5) / tokens]
        for level in reversed(range(_LEVELS)):
            if ranks.max() >> level == 0:
                continue
            branch = (ranks >> level) & 1
            right, all_ = running_counts(ranks >> (level + 1), branch)
            # An old cluster, at a node where either branch has been taken before: else there is nothing to decide.
            here = np.flatnonzero(~new & (right > 0) & (right < all_))
            rows.append(here)
            depths.append(np.full(here.size, _LEVELS - level))
            flags.append(branch[here] == 1)
            chances.append(right[here] / all_[here])
        stream = np.lexsort((np.concatenate(depths), np.concatenate(rows)))
        writer.bits(np.concatenate(flags)[stream], np.concatenate(chances)[stream])
        return order

    def read(self, reader: BitReader, count: int) -> Int[np.ndarray, " n"]:
        """Read `count` indices, as ranks by first use. Raises CodeError for a stream that was cut or damaged."""
        ranks = np.zeros(count, dtype=np.int64)
        tree: list[dict[int, int]] = [{} for _ in range(_LEVELS + 1)]
        met = 0
        for token in range(count):
            if token == 0 or reader.bit((met - 0.5) / token):
                rank, met = met, met + 1
            else:
                rank = _descend(reader, tree, (met - 1).bit_length())
            ranks[token] = rank
            for level, counts in enumerate(tree):
                counts[rank >> level] = counts.get(rank >> level, 0) + 1
            if token % 4096 == 0:
                reader.check()
        reader.check()
        return ranks


def _descend(reader: BitReader, tree: list[dict[int, int]], depth: int) -> int:
    """From the root to a leaf, each branch with probability of its count; -log2 (count / all) in sum."""
    node = 0
    for level in reversed(range(depth)):
        right, all_ = tree[level].get(2 * node + 1, 0), tree[level + 1][node]
        bit = reader.bit(right / all_) if 0 < right < all_ else int(right > 0)
        node = 2 * node + bit
    return node


def _by_first_use(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ranks by first use, the index of each rank, and whether each token introduces one."""
    if indices.size > MAX_TOKENS:
        raise CodeError(f"{indices.size} tokens in one stream of indices; at most {MAX_TOKENS}: split the data.")
    distinct, first, dense = np.unique(indices, return_index=True, return_inverse=True)
    by_first_use = np.argsort(first)
    rank = np.empty(distinct.size, dtype=np.int64)
    rank[by_first_use] = np.arange(distinct.size)
    new = np.zeros(indices.size, dtype=bool)
    new[first] = True
    return rank[dense], distinct[by_first_use].astype(np.int64), new
