"""Adaptive counts: the Krichevsky-Trofimov mixture in closed form, as a sequence of probabilities, and on a stream.

No table is sent: the probability of a symbol comes from those before it, in its own context. The length of a whole
sequence depends on its counts alone. All lengths are in bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Num
from scipy.special import gammaln, xlogy

from mdl.codes.bitstream import BitReader, BitWriter
from mdl.units import nats_to_bits


def kt_bits(ones: Any, zeros: Any) -> Any:
    r"""Length of a binary sequence under the Krichevsky-Trofimov mixture, in bits.

    $$-\log_2 \frac{\Gamma(k + 1/2)\,\Gamma(n - k + 1/2)}{\pi\, n!}$$

    **Arguments:** `ones` (k) and `zeros` (n - k): counts, numbers or arrays that broadcast.

    **Returns:** bits, float64, of the broadcast shape; exact up to rounding (below 1e-8 for a million symbols).

    **Source:** Krichevsky and Trofimov 1981, IEEE Trans. Inf. Theory 27(2), 199-207.
    """
    k, m = np.asarray(ones, dtype=np.float64), np.asarray(zeros, dtype=np.float64)
    nats = gammaln(k + m + 1.0) + math.log(math.pi) - gammaln(k + 0.5) - gammaln(m + 0.5)
    return nats_to_bits(np.where(k + m > 0, nats, 0.0))


def plug_in_bits(ones: Any, zeros: Any) -> Any:
    """n h(k/n): the length had the frequency been known. `kt_bits` minus this is the cost of learning it, in bits."""
    k, m = np.asarray(ones, dtype=np.float64), np.asarray(zeros, dtype=np.float64)
    return nats_to_bits(xlogy(k + m, k + m) - xlogy(k, k) - xlogy(m, m))


def dirichlet_bits(counts: Num[np.ndarray, "*batch k"]) -> Float[np.ndarray, "*batch"]:
    r"""Length of a sequence over K symbols under the Dirichlet(1/2) mixture, the K-ary Krichevsky-Trofimov code.

    $$-\log_2 \frac{\Gamma(K/2) \prod_j \Gamma(k_j + 1/2)}{\pi^{K/2}\, \Gamma(n + K/2)}$$

    **Arguments:** `counts`: how often each symbol occurs, on the last axis.

    **Returns:** bits, without that axis. **Source:** Krichevsky and Trofimov 1981.
    """
    k = np.asarray(counts, dtype=np.float64)
    half = k.shape[-1] / 2.0
    nats = gammaln(k.sum(-1) + half) - gammaln(half) - (gammaln(k + 0.5) - math.log(math.pi) / 2.0).sum(-1)
    return np.asarray(nats_to_bits(nats))


def bernoulli_complexity(n: int) -> float:
    r"""Shtarkov's sum $C(n) = \sum_k \binom{n}{k} (k/n)^k (1 - k/n)^{n-k}$; its log2 is the minimax regret in bits.

    **Source:** Shtarkov 1987. The normalised maximum likelihood length is `plug_in_bits` + log2 C(n).
    """
    k = np.arange(n + 1, dtype=np.float64)
    log_binomial = gammaln(n + 1.0) - gammaln(k + 1.0) - gammaln(n - k + 1.0)
    return float(np.exp(log_binomial + xlogy(k, k) + xlogy(n - k, n - k) - xlogy(n, n)).sum())


def running_counts(
    contexts: Int[np.ndarray, " n"], bits: Num[np.ndarray, " n"]
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """For each decision, the ones and the decisions before it in its own context."""
    if contexts.size == 0:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    order = np.argsort(contexts, kind="stable")
    grouped, flags = contexts[order], bits[order].astype(np.int64)
    starts = np.flatnonzero(np.r_[True, grouped[1:] != grouped[:-1]])
    lengths = np.diff(np.r_[starts, grouped.size])
    before = np.cumsum(flags) - flags
    ones, totals = np.empty(grouped.size, dtype=np.int64), np.empty(grouped.size, dtype=np.int64)
    ones[order] = before - np.repeat(before[starts], lengths)
    totals[order] = np.arange(grouped.size) - np.repeat(starts, lengths)
    return ones, totals


def kt_sequence_probabilities(contexts: Int[np.ndarray, " n"], bits: Num[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """The probability of a one, (n1 + 1/2) / (n + 1), that each decision meets in its context, in stream order.

    **Arguments:** `contexts`: any integers, one for each decision; `bits`: the decisions, 0 or 1.

    **Returns:** probabilities. The sum of -log2 over the decisions equals `kt_bits` of each context's counts.
    """
    ones, totals = running_counts(contexts, bits)
    return (ones + 0.5) / (totals + 1.0)


def write_adaptive_bits(writer: BitWriter, contexts: Int[np.ndarray, " n"], bits: Int[np.ndarray, " n"]) -> None:
    """Write decisions, each under the Krichevsky-Trofimov probability of its context."""
    writer.bits(bits, kt_sequence_probabilities(contexts, bits))


def read_adaptive_bits(reader: BitReader, next_context: Callable[[int | None], int | None]) -> list[int]:
    """Read what `write_adaptive_bits` wrote.

    **Arguments:** `next_context(previous)`: the context of the next decision, given the previous one (None at first);
    None to stop.

    **Returns:** the decisions. **Raises:** CodeError for a stream that was cut or damaged.
    """
    ones: dict[int, int] = {}
    totals: dict[int, int] = {}
    found: list[int] = []
    context = next_context(None)
    while context is not None:
        k, n = ones.get(context, 0), totals.get(context, 0)
        bit = reader.bit((k + 0.5) / (n + 1.0))
        ones[context], totals[context] = k + bit, n + 1
        found.append(bit)
        if len(found) % 4096 == 0:
            reader.check()
        context = next_context(bit)
    reader.check()
    return found
