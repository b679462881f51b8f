r"""Published description lengths of parameter decompositions, and the way from them to a two-part code.

    APD             sum_c |A_c(x)|_0 (alpha sum_l rank P_c,l + log2 C)      (Braun et al. 2025, arXiv 2501.14926)
    VPD, clusters   sum_i s_i (log2 k + alpha r_i)                          (Goodfire 2026, Interpreting LM parameters)
    VPD, frequency  1/n sum_c s_c log2(1 + s_c)                             (the same)

bits a datum: C parts, k groups of parts, s_i how often any part of group i fires. None charges the parts once, the
gate, the leftover W - sum P_c, or the error: `explained_difference` says line by line what a two-part code puts there.
alpha is bits for one unit of rank and nothing decodes: APD means the bits of an attribution, VPD those of factors sent
anew with each datum, b (d_in + d_out) at b bits an entry (its own default is 1). Its value is the caller's to declare.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import scipy.sparse
from jaxtyping import Float, Int

from estimators.published.histogram import binary_entropy
from mdl.codes.counts import kt_bits
from mdl.codes.supports import enumerative_bits
from mdl.errors import ExplanationError
from mdl.ledger import Published

APD = "Braun et al. 2025, arXiv 2501.14926"
VPD = "Goodfire 2026, Interpreting Language Model Parameters"
CODELENGTH = ("bits a token", "codelength")
THRESHOLD = 0.01  # above which VPD's clustering counts a gate as firing

Number: TypeAlias = float | int
Firing: TypeAlias = np.ndarray | scipy.sparse.csr_array  # [n, C], what is not zero fires


def firing_of(gates: np.ndarray, threshold: float = THRESHOLD) -> scipy.sparse.csr_array:
    """Which parts fire on each datum: gates [n, C] above a threshold."""
    return scipy.sparse.csr_array(np.asarray(gates) > threshold)


def total_ranks(ranks: Number | np.ndarray, parts: int) -> Float[np.ndarray, " C"]:
    """Rank of each part summed over tensors, [C], from one number, [C] or [C, tensors]."""
    given = np.asarray(ranks, np.float64)
    summed = given.sum(1) if given.ndim == 2 else given
    if summed.shape not in ((), (parts,)) or (summed < 0).any():
        raise ExplanationError(
            f"ranks of shape {given.shape} for {parts} parts: one number, [C] or [C, tensors], none of them negative."
        )
    return np.broadcast_to(summed, (parts,))


@dataclass(frozen=True)
class Mechanistic:
    """A description length by datum and part, as it is printed.

    **Arguments:** `name`; `frequency` [C]: the share of data on which each part (or group) fires; `content` [C]: bits
    each time it does, alpha times its rank; `set_bits`: mean of log2 (C choose k) over data, what their k names would
    take as a set; `source`.
    """

    name: str
    frequency: Float[np.ndarray, " C"]
    content: Float[np.ndarray, " C"]
    set_bits: float
    source: str

    @property
    def active(self) -> float:
        """Parts that fire, a datum."""
        return float(self.frequency.sum())

    @property
    def index_bits(self) -> float:
        """k log2 C: names one after the other, bits a datum."""
        return list_bits(self.active, len(self.frequency))

    @property
    def content_bits(self) -> float:
        """alpha times the rank of what fires, sent anew with each datum; bits a datum."""
        return float(self.frequency @ self.content)

    @property
    def total(self) -> float:
        """Bits a datum."""
        return self.index_bits + self.content_bits

    def content_on_first_use(self, data: Number) -> float:
        """The same content, each part at its first of N data: sum_c alpha r_c (1 - (1 - f_c)^N), bits once."""
        return float(self.content @ (1.0 - (1.0 - self.frequency) ** data))


def apd_length(firing: Firing, ranks: Number | np.ndarray, alpha: Number) -> Mechanistic:
    """APD's mechanistic description length of parts that fire [n, C]; mean over data.

    **Arguments:** `ranks`: see `total_ranks`; `alpha`: bits a unit of rank. **Raises:** ExplanationError for shapes
    that do not fit. **Source:** Braun et al. 2025, arXiv 2501.14926, appendix.
    """
    fires = _checked(firing)
    content = alpha * total_ranks(ranks, fires.shape[1])
    return Mechanistic("APD", _frequency(fires), content, _set_bits(fires), APD)


def apd_bits(firing: Firing, ranks: Number | np.ndarray, alpha: Number) -> Float[np.ndarray, " n"]:
    """APD's description length of each datum, bits."""
    fires = _checked(firing)
    return fires.astype(np.float64) @ (alpha * total_ranks(ranks, fires.shape[1]) + np.log2(fires.shape[1]))


def dense_bits(parts: int, alpha: Number) -> float:
    """C alpha: every part's attribution with each datum, what APD's code is compared with."""
    return float(parts * alpha)


def grouped(firing: Firing, groups: Int[np.ndarray, " C"]) -> scipy.sparse.csr_array:
    """Which groups fire, [n, k]: a group does where any of its parts does. `groups` [C]: labels 0 .. k - 1."""
    fires = _checked(firing)
    labels = np.asarray(groups)
    if labels.shape != (fires.shape[1],) or not np.array_equal(np.unique(labels), np.arange(labels.max() + 1)):
        raise ExplanationError(
            f"groups of shape {labels.shape} for {fires.shape[1]} parts: a label for each, 0 .. k - 1, every one used."
        )
    member = scipy.sparse.csr_array((np.ones(len(labels)), (np.arange(len(labels)), labels)))
    return (fires.astype(np.float64) @ member) > 0


def clustering_length(
    firing: Firing, ranks: Number | np.ndarray, alpha: Number, groups: Int[np.ndarray, " C"] | None = None
) -> Mechanistic:
    """VPD's clustering objective of groups of parts, each part alone by default; the rank of a group is its parts' sum.

    At one group a part this is APD's length.
    """
    fires = _checked(firing)
    labels = np.arange(fires.shape[1]) if groups is None else np.asarray(groups)
    together = grouped(fires, labels)
    content = np.bincount(labels, alpha * total_ranks(ranks, fires.shape[1]), together.shape[1])
    return Mechanistic("VPD clusters", _frequency(together), content, _set_bits(together), VPD)


@dataclass(frozen=True)
class Pair:
    """Two groups that might be merged: shares of data on which each fires, and both do; their ranks."""

    first: float
    second: float
    both: float
    first_rank: Number = 1.0
    second_rank: Number = 1.0


def merge_change(pair: Pair, active: Number, groups: int, alpha: Number, *, printed: bool = False) -> float:
    r"""Change of VPD's objective when two of k groups become one, bits a datum; negative where merging pays.

    $$(s - s_i - s_j) \log_2 \frac{k-1}{k} + s_{ij} (\log_2(k-1) + \alpha (r_i + r_j))
      - s_i (\log_2 k + \alpha r_i) - s_j (\log_2 k + \alpha r_j)$$

    with s the groups that fire a datum (`active`) and s_ij the share on which either of the two does. `printed` puts
    the share on which both do in its place, as the report's formula has it: then every merge of groups pays, the more
    so the less they have in common, and the rule printed beside it (`merge_limit`) does not follow.
    """
    if groups < 2:
        raise ExplanationError(f"{groups} groups: a merge takes two.")
    merged = pair.both if printed else pair.first + pair.second - pair.both
    before, after = np.log2(groups), np.log2(groups - 1)
    others = (active - pair.first - pair.second) * (after - before)
    apart = pair.first * (before + alpha * pair.first_rank) + pair.second * (before + alpha * pair.second_rank)
    return float(others + merged * (after + alpha * (pair.first_rank + pair.second_rank)) - apart)


def merge_limit(together: Number, groups: int) -> float:
    """alpha below which two parts of rank one and equal frequency are merged: co / (1 - co) log2(k) / 2.

    `together`: the share of the firings of one in which the other fires too. Of many groups: log2 (k - 1) is log2 k.
    """
    return float(np.inf if together == 1 else together / (1 - together) * np.log2(groups) / 2)


def greedy_clusters(firing: Firing, ranks: Number | np.ndarray, alpha: Number) -> Int[np.ndarray, " C"]:
    """Labels [C] of the groups that are left when the merge that saves most is made until none saves anything.

    Dense, and a merge costs C^2 + n C: for some hundred parts.
    """
    on = _checked(firing).toarray().astype(np.float64)
    rank = np.array(total_ranks(ranks, on.shape[1]))
    labels = np.arange(on.shape[1])
    both = on.T @ on / len(on)
    while len(rank) > 1:
        change = _merge_changes(both, rank, alpha)
        i, j = sorted(np.unravel_index(change.argmin(), change.shape))
        if change[i, j] >= 0:
            break
        on[:, i] = np.maximum(on[:, i], on[:, j])
        rank[i] += rank[j]
        on, rank = np.delete(on, j, 1), np.delete(rank, j)
        both = np.delete(np.delete(both, j, 0), j, 1)
        both[i] = both[:, i] = on.T @ on[:, i] / len(on)
        labels = np.where(labels == j, i, labels - (labels > j))
    return labels


def _merge_changes(both: np.ndarray, rank: np.ndarray, alpha: Number) -> np.ndarray:
    """`merge_change` of every pair of groups, infinite on the diagonal; `both` [k, k] has frequencies on its own."""
    share, before, after = np.diag(both), np.log2(len(rank)), np.log2(len(rank) - 1)
    either = share[:, None] + share - both
    apart = share * (before + alpha * rank)
    others = (share.sum() - share[:, None] - share) * (after - before)
    change = others + either * (after + alpha * (rank[:, None] + rank)) - apart[:, None] - apart
    np.fill_diagonal(change, np.inf)
    return change


def frequency_bits(gates: np.ndarray, power: Number = 1.0) -> float:
    """VPD's frequency term 1/n sum_c s_c log2(1 + s_c), s_c = sum_x g_c(x)^p, of gates [n, C] in [0, 1]; bits."""
    summed = (np.asarray(gates, np.float64) ** power).sum(0)
    return float(summed @ np.log2(1 + summed) / len(gates))


def list_bits(active: Number, parts: int) -> float:
    """k log2 C: names of k of C parts, in an order nobody asked for."""
    return float(active * np.log2(parts))


def set_bits(active: Number, parts: int, *, count: bool = False) -> float:
    """log2 (C choose k), k being known; with `count`, log2 (C + 1) more to say which of 0 .. C it is."""
    return float(enumerative_bits(parts, active) + (np.log2(parts + 1) if count else 0.0))


def independent_bits(active: np.ndarray, parts: np.ndarray) -> float:
    """sum_g C_g H(a_g / C_g): kinds of parts, of which a_g of C_g are active; every part of a kind at the same rate."""
    size = np.asarray(parts, np.float64)
    return float(size @ binary_entropy(np.asarray(active, np.float64) / size))


def index_codes(firing: Firing) -> Mapping[str, Published]:
    """What it takes to say which parts fire, bits a datum, from the wasteful to the adaptive.

    "list" and "set" as above (the set with its count); "independent": entropies at the rates of these very data, which
    nobody sent; "adaptive": the same decisions under Krichevsky-Trofimov mixtures, which learn the rates, the exact
    length of a decodable code.
    """
    fires = _checked(firing)
    data, parts = fires.shape
    on = _frequency(fires) * data
    adaptive = float(np.sum(kt_bits(on, data - on))) / data
    return {
        "list": Published(list_bits(on.sum() / data, parts), f"k log2 C, C = {parts}", APD),
        "set": Published(
            _set_bits(fires) + float(np.log2(parts + 1)), "log2 (C choose k) + log2 (C + 1)", "Cover 1973"
        ),
        "independent": Published(float(binary_entropy(on / data).sum()), "sum_c H(f_c)", "rates not charged"),
        "adaptive": Published(adaptive, "Krichevsky-Trofimov by part", "Krichevsky and Trofimov 1981", *CODELENGTH),
    }


@dataclass(frozen=True)
class TwoPart:
    """Our own bits of the same decomposition for N data, by what they are for.

    **Arguments:** bits a datum: `index`, which parts are active, `values`, how much of each, `residual`, from what they
    make to the phenomenon; bits once: `content`, the parts' weights, each when first used, `gate`, where the receiver
    runs it, `leftover`, W - sum P_c where it is sent, `header`, all else.
    """

    index: float
    residual: float
    content: float
    values: float = 0.0
    gate: float = 0.0
    leftover: float = 0.0
    header: float = 0.0

    def total(self, data: Number) -> float:
        """static + N (state + residual), bits."""
        return (
            self.content + self.gate + self.leftover + self.header + data * (self.index + self.values + self.residual)
        )


@dataclass(frozen=True)
class Line:
    """One step from the published length to ours: bits for all N data, and why they are there."""

    name: str
    bits: float
    why: str


def explained_difference(published: Mechanistic, ours: TwoPart, data: Number) -> tuple[Line, ...]:
    """From a published description length to the two-part total, line by line; bits for N data.

    The first line is the published total, N times its bits a datum; the last is ours; those between add up to the
    difference. At N = 1 the line for sending content once is 0: there a list of parts and what is in them is all that
    either code has, up to what alpha stands for. **Raises:** ExplanationError for less than one datum.
    """
    if not data >= 1:
        raise ExplanationError(f"a difference over {data} data: at least one.")
    once = published.content_on_first_use(data)
    order = published.set_bits - published.index_bits
    lines = (
        Line(published.name, data * published.total, f"the published length, {published.source}"),
        Line("order of names", data * order, "k names say in which order they come, which means nothing: a set does"),
        Line("index code", data * (ours.index - published.set_bits), "parts fire at rates of their own; k is sent too"),
        Line(
            "content once", once - data * published.content_bits, "a part is paid when first used, not with each datum"
        ),
        Line("content in bits", ours.content - once, "alpha times rank decodes to nothing: coded weights in its place"),
        Line("values", data * ours.values, "how much of an active part: masks between 0 and 1 were free"),
        Line("gate", ours.gate, "who runs the gate has to be given it: it was free"),
        Line("leftover", ours.leftover, "W minus the sum of the parts, where the receiver uses it: it was free"),
        Line("header", ours.header, "shapes, steps, tables, what no part holds: it was free"),
        Line("residual", data * ours.residual, "what the parts get wrong: it was a weighted loss beside the length"),
    )
    return (*lines, Line("two-part code", ours.total(data), "static + N (state + residual)"))


def _checked(firing: Firing) -> scipy.sparse.csr_array:
    """As a boolean CSR matrix that is neither empty nor of another number of axes."""
    if len(firing.shape) != 2 or 0 in firing.shape:
        raise ExplanationError(f"firings of shape {firing.shape}: data by parts, [n, C], at least one of each.")
    fires = scipy.sparse.csr_array(firing, copy=True)
    fires.sum_duplicates()
    fires.eliminate_zeros()
    return fires.astype(bool)


def _frequency(fires: scipy.sparse.csr_array) -> np.ndarray:
    return np.bincount(fires.indices, minlength=fires.shape[1]) / fires.shape[0]


def _set_bits(fires: scipy.sparse.csr_array) -> float:
    return float(np.mean(enumerative_bits(fires.shape[1], np.diff(fires.indptr))))
