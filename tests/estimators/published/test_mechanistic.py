"""Description lengths of parameter decompositions: by hand, from VPD's own statistics, and against each other."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import scipy.sparse

from estimators.published.mechanistic import (
    Pair,
    TwoPart,
    apd_bits,
    apd_length,
    clustering_length,
    dense_bits,
    explained_difference,
    firing_of,
    frequency_bits,
    greedy_clusters,
    grouped,
    independent_bits,
    index_codes,
    list_bits,
    merge_change,
    merge_limit,
    set_bits,
    total_ranks,
)
from mdl.errors import ExplanationError

DATA, PARTS = 60, 7


@pytest.fixture
def firing() -> np.ndarray:
    rng = np.random.default_rng(5)
    return rng.random((DATA, PARTS)) < rng.uniform(0.05, 0.6, PARTS)


# VPD's decomposition of its 67 M model: 9,972 parts alive, 205 active a token, 44.6 / 18.9 / 49.5 / 92.0 by layer.
ALIVE, ACTIVE = 9972, np.array([44.6, 18.9, 49.5, 92.0])


def test_index_codes_at_vpds_own_statistics() -> None:
    assert ACTIVE.sum() == pytest.approx(205)
    assert list_bits(205, ALIVE) == pytest.approx(2723, abs=0.5)
    assert set_bits(205, ALIVE) == pytest.approx(1436, abs=0.5)
    assert set_bits(205, ALIVE, count=True) - set_bits(205, ALIVE) == pytest.approx(13.3, abs=0.05)


def test_the_bernoulli_figure_is_bracketed_only() -> None:
    """1,425 is given for rates by layer, but how many parts are alive in each is not printed: with as many in each it
    is 1,402, with one rate for all (alive in proportion to active) 1,442, and splits between the two reach 1,425."""
    equal = independent_bits(ACTIVE, np.full(4, ALIVE / 4))
    proportional = independent_bits(ACTIVE, ALIVE * ACTIVE / ACTIVE.sum())
    assert equal == pytest.approx(1401.7, abs=0.1)
    assert proportional == pytest.approx(1441.5, abs=0.1)
    assert proportional == pytest.approx(independent_bits(np.array([205.0]), np.array([ALIVE])))
    halfway = independent_bits(ACTIVE, ALIVE * (0.5 / 4 + 0.5 * ACTIVE / ACTIVE.sum()))
    assert equal < 1425 < halfway < proportional


def test_two_parts_that_always_fire_together() -> None:
    """APD's own example: 2 log2 C + 2 alpha apart, log2 C + 2 alpha merged (C kept by parts that never fire)."""
    apart = np.tile([True, True, False, False], (3, 1))
    merged = np.tile([True, False, False, False], (3, 1))
    for alpha in (0.0, 1.0, 30.0):
        assert apd_length(apart, 1.0, alpha).total == pytest.approx(2 * 2 + 2 * alpha)
        assert apd_length(merged, np.array([2.0, 1, 1, 1]), alpha).total == pytest.approx(2 + 2 * alpha)
    assert dense_bits(4, 3.0) == 12


def test_apd_by_the_formula(firing: np.ndarray) -> None:
    ranks = np.random.default_rng(0).integers(0, 3, (PARTS, 2)).astype(float)
    oracle = [sum(1.5 * ranks[c].sum() + math.log2(PARTS) for c in range(PARTS) if row[c]) for row in firing]
    np.testing.assert_allclose(apd_bits(firing, ranks, 1.5), oracle)
    found = apd_length(scipy.sparse.csr_array(firing), ranks, 1.5)
    assert found.total == pytest.approx(np.mean(oracle))
    assert found.set_bits == pytest.approx(np.mean([math.log2(math.comb(PARTS, int(k))) for k in firing.sum(1)]))
    np.testing.assert_array_equal(total_ranks(ranks, PARTS), ranks.sum(1))


# The worked examples beside the clustering code of github.com/goodfire-ai/spd: 951 groups, s = 1, alpha = 1.
EXAMPLES = [
    (Pair(0.1, 0.1, 0.1), -0.99),
    (Pair(0.1, 0.1, 0.0), 0.199),
    (Pair(0.1, 0.1, 0.01), 0.08),
    (Pair(0.1, 0.4, 0.08, 1, 50), 0.52),
    (Pair(0.1, 0.4, 0.10, 1, 50), -0.69),
    (Pair(0.5, 0.02, 0.015), 0.33),
]


@pytest.mark.parametrize(("pair", "expected"), EXAMPLES)
def test_merge_changes_printed_with_the_code(pair: Pair, expected: float) -> None:
    assert merge_change(pair, 1.0, 951, 1.0) == pytest.approx(
        expected, abs=0.012
    )  # printed to two digits, rounded early


def test_a_merge_changes_the_objective_by_what_it_says(firing: np.ndarray) -> None:
    ranks = np.arange(1.0, PARTS + 1)
    before = clustering_length(firing, ranks, 0.7)
    assert before.total == pytest.approx(apd_length(firing, ranks, 0.7).total)
    for i, j in combinations(range(PARTS), 2):
        labels = np.arange(PARTS)
        labels[j] = i
        labels = np.unique(labels, return_inverse=True)[1]
        pair = Pair(*firing[:, [i, j]].mean(0), (firing[:, i] & firing[:, j]).mean(), ranks[i], ranks[j])
        change = clustering_length(firing, ranks, 0.7, labels).total - before.total
        assert merge_change(pair, before.active, PARTS, 0.7) == pytest.approx(change)
        assert merge_change(pair, before.active, PARTS, 0.7, printed=True) < 0


def test_only_the_union_gives_the_rule() -> None:
    """Equal frequencies f, both at f co: merged iff alpha < co / (1 - co) log2(k) / 2, for many rare groups."""
    groups = 1 << 20
    for together in (0.1, 0.5, 0.9):
        limit = merge_limit(together, groups)
        for share, pays in ((0.99, True), (1.01, False)):
            pair = Pair(1e-3, 1e-3, 1e-3 * together)
            assert (merge_change(pair, 2e-3, groups, share * limit) < 0) == pays
            assert merge_change(pair, 2e-3, groups, share * limit, printed=True) < 0
    assert merge_limit(1.0, groups) == math.inf


def test_a_group_fires_where_any_of_its_parts_does(firing: np.ndarray) -> None:
    labels = np.array([0, 1, 0, 2, 2, 2, 1])
    found = grouped(scipy.sparse.csr_array(firing), labels).toarray()
    np.testing.assert_array_equal(found, np.stack([firing[:, labels == g].any(1) for g in range(3)], 1))
    length = clustering_length(firing, 2.0, 0.5, labels)
    shares = found.mean(0)
    sizes = np.array([2, 2, 3])
    assert length.total == pytest.approx(float(shares @ (math.log2(3) + 0.5 * 2.0 * sizes)))


def test_greedy_clusters_find_parts_that_fire_together() -> None:
    rng = np.random.default_rng(6)
    concepts = rng.random((400, 5)) < 0.15
    parts = np.repeat(concepts, [1, 2, 3, 1, 2], axis=1)
    labels = greedy_clusters(parts, 1.0, 1.5)
    np.testing.assert_array_equal(labels, np.unique(np.repeat(np.arange(5), [1, 2, 3, 1, 2]), return_inverse=True)[1])
    assert clustering_length(parts, 1.0, 1.5, labels).total < clustering_length(parts, 1.0, 1.5).total
    assert greedy_clusters(parts, 1.0, 0.0).max() < 4  # alpha = 0: one part
    rare = greedy_clusters(np.eye(40, dtype=bool), 1.0, 20.0)
    np.testing.assert_array_equal(rare, np.arange(40))  # alpha large: every part alone


def test_the_frequency_term() -> None:
    gates = np.array([[0.0, 1.0, 0.5], [0.0, 1.0, 0.0], [0.0, 1.0, 0.5], [0.0, 0.0, 0.0]])
    assert frequency_bits(gates) == pytest.approx((3 * 2 + 1 * 1) / 4)
    assert frequency_bits(gates, power=2.0) == pytest.approx((3 * 2 + 0.5 * math.log2(1.5)) / 4)
    assert firing_of(gates, 0.5).nnz == 3


def test_codes_of_the_index(firing: np.ndarray) -> None:
    found = index_codes(firing)
    share = firing.mean(0)
    entropy = -sum(p * math.log2(p) + (1 - p) * math.log2(1 - p) for p in share)
    assert found["independent"].value == pytest.approx(entropy)
    assert found["list"].value == pytest.approx(firing.sum() / DATA * math.log2(PARTS))
    sets = np.mean([math.log2(math.comb(PARTS, int(k))) for k in firing.sum(1)]) + 3  # 0 .. 7
    assert found["set"].value == pytest.approx(sets)
    learning = found["adaptive"].value - entropy
    assert 0 < learning < PARTS * (0.5 * math.log2(DATA) + 1) / DATA
    assert [found[name].obtained for name in ("independent", "adaptive")] == ["estimate", "codelength"]


def test_of_rare_parts_the_entropy_code_is_the_shortest() -> None:
    rng = np.random.default_rng(7)
    rates = np.exp(rng.uniform(np.log(1e-3), np.log(0.3), 300))
    found = {name: code.value for name, code in index_codes(rng.random((2000, 300)) < rates).items()}
    assert found["independent"] < found["adaptive"] < found["set"] < found["list"]


OURS = TwoPart(index=9.0, residual=4.0, content=700.0, values=2.0, gate=30.0, leftover=50.0, header=11.0)


@pytest.mark.parametrize("data", [1.0, 60.0, 1e6])
def test_the_difference_adds_up(firing: np.ndarray, data: float) -> None:
    published = apd_length(firing, 2.0, 16.0)
    first, *steps, last = explained_difference(published, OURS, data)
    assert first.bits == pytest.approx(data * published.total)
    assert last.bits == pytest.approx(791 + 15 * data)
    assert first.bits + math.fsum(s.bits for s in steps) == pytest.approx(last.bits)
    assert len({s.name for s in steps}) == 9
    assert all(s.why for s in (first, *steps, last))


def test_at_one_datum_nothing_is_sent_twice_and_for_many_everything_is(firing: np.ndarray) -> None:
    published = apd_length(firing, 2.0, 16.0)
    once = {n: {line.name: line.bits for line in explained_difference(published, OURS, n)} for n in (1.0, 1e9)}
    assert once[1.0]["content once"] == pytest.approx(0.0, abs=1e-9)
    assert once[1e9]["content once"] == pytest.approx(PARTS * 32.0 - 1e9 * published.content_bits)
    assert once[1e9]["content in bits"] == pytest.approx(700 - PARTS * 32.0)


def test_of_the_same_code_all_that_differs_is_what_was_free(firing: np.ndarray) -> None:
    """alpha such that alpha r are the bits of a part's factors, and the index as a set: at N = 1 the two agree."""
    published = apd_length(firing, 1.0, 8.0 * (5 + 3))
    ours = TwoPart(index=published.set_bits, residual=0.0, content=published.content_on_first_use(1.0))
    steps = explained_difference(published, ours, 1.0)[1:-1]
    left = {line.name: line.bits for line in steps if abs(line.bits) > 1e-9}
    assert set(left) == {"order of names"}
    assert left["order of names"] < 0


def test_what_makes_no_sense_is_refused(firing: np.ndarray) -> None:
    with pytest.raises(ExplanationError, match=r"ranks of shape \(3,\) for 7 parts"):
        apd_length(firing, np.ones(3), 1.0)
    with pytest.raises(ExplanationError, match="data by parts"):
        apd_bits(np.zeros((0, 3), bool), 1.0, 1.0)
    for labels in (np.zeros(3, int), np.array([0, 2, 0, 0, 0, 0, 0]), np.full(PARTS, -1)):
        with pytest.raises(ExplanationError, match="a label for each"):
            grouped(firing, labels)
    with pytest.raises(ExplanationError, match="a merge takes two"):
        merge_change(Pair(0.1, 0.1, 0.1), 1.0, 1, 1.0)
    with pytest.raises(ExplanationError, match="at least one"):
        explained_difference(apd_length(firing, 1.0, 1.0), OURS, 0.0)
