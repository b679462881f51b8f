"""k-means, one index a token."""

from __future__ import annotations

import numpy as np
import pytest

from decompositions.clusters import Clusters, ClustersDecoder, lloyd, nearest_centroids
from mdl.errors import ExplanationError, MessageError
from mdl.message import Section, decode_message, encode_message
from mdl.protocols import Settings
from mdl.state import IndexState, first_use_order
from mdl.task import Task


def blobs(n: int = 900, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centres = np.array([[0.0, 0], [10, 0], [0, 10]])
    return centres, (centres[rng.integers(0, 3, n)] + rng.normal(size=(n, 2))).astype(np.float32)


def test_well_separated_clusters_are_found() -> None:
    centres, points = blobs()
    best = min((lloyd(points, 3, 20, seed)[0] for seed in range(5)), key=lambda c: distortion(points, c))
    assert np.allclose(best[np.lexsort(best.T.round())], centres[np.lexsort(centres.T)], atol=0.3)


def distortion(points: np.ndarray, centroids: np.ndarray) -> float:
    return float(np.square(points - centroids[nearest_centroids(points, centroids)]).sum())


def test_more_rounds_and_more_clusters_do_not_hurt() -> None:
    _, points = blobs()
    by_rounds = [distortion(points, lloyd(points, 8, rounds, 1)[0]) for rounds in (1, 3, 10)]
    assert by_rounds == sorted(by_rounds, reverse=True)
    assert distortion(points, lloyd(points, 32, 10, 1)[0]) < by_rounds[-1]


def test_the_nearest_centroid_is_the_nearest() -> None:
    rng = np.random.default_rng(3)
    points, centroids = rng.normal(size=(20_000, 5)), rng.normal(size=(40, 5))
    chosen = rng.integers(0, 20_000, 300)
    expected = np.square(points[chosen, None] - centroids).sum(2).argmin(1)
    assert np.array_equal(nearest_centroids(points, centroids)[chosen], expected)


def test_a_cluster_for_every_point_leaves_nothing() -> None:
    _, points = blobs(40)
    centroids, counts = lloyd(points, 40, 3, 0)
    assert distortion(points, centroids) == pytest.approx(0, abs=1e-3)
    assert counts.sum() == 40


def test_duplicates_leave_clusters_empty_and_these_are_not_sent(tiny_task: Task) -> None:
    explanation = Clusters(k=300).fit(tiny_task.for_fitting())
    assert (explanation.frequency > 0).all()
    assert explanation.frequency.sum() == pytest.approx(1.0)
    assert len(explanation.centroids) == len(explanation.frequency) <= 300


def test_from_fit_to_what_the_receiver_sees(tiny_task: Task) -> None:
    explanation = Clusters(k=24, rounds=5).fit(tiny_task.for_fitting())
    settings = Settings(1e9, 0.01, np.eye(16))
    message = encode_message([explanation.section(settings)])
    decoder = ClustersDecoder.from_section(decode_message(message.data)[0])
    assert explanation.name == "clusters-24"
    sample = tiny_task.held_out.sample()
    state = explanation.encode(decoder, sample, settings)
    assert isinstance(state, IndexState)
    predicted = decoder.predict(sample.inputs, state)
    assert predicted.shape == sample.outputs.shape
    everywhere = np.square(sample.outputs[:, None] - decoder.centroids).sum(2)
    assert np.square(sample.outputs - predicted).sum(1) == pytest.approx(everywhere.min(1), rel=1e-3)
    assert (decoder.touched(sample.inputs, state).sum(1) == 1).all()
    assert 0 < state.length().total / state.n_tokens < np.log2(24) + 1


def test_the_order_of_centroids_changes_nothing(tiny_task: Task) -> None:
    explanation = Clusters(k=24, rounds=3).fit(tiny_task.for_fitting())
    settings = Settings(1e6, 0.05, np.eye(16))
    section = explanation.section(settings)
    decoder, sample = ClustersDecoder.from_section(section), tiny_task.held_out.sample()
    state = explanation.encode(decoder, sample, settings)
    order = first_use_order(state.touched())
    moved = ClustersDecoder.from_section(section.reordered(order))
    again = state.reordered(order)
    assert np.array_equal(moved.predict(sample.inputs, again), decoder.predict(sample.inputs, state))
    assert again.length().total == pytest.approx(state.length().total)


def test_the_metric_decides_which_centroid_is_nearest(tiny_task: Task) -> None:
    explanation = Clusters(k=16, rounds=3).fit(tiny_task.for_fitting())
    plain = Settings(1e9, 0.01, np.eye(16))
    skewed = Settings(1e9, 0.01, np.diag([100.0, *[1.0] * 15]))
    decoder = ClustersDecoder.from_section(explanation.section(plain))
    sample = tiny_task.held_out.sample()
    gaps = [
        np.abs(sample.outputs - decoder.predict(sample.inputs, explanation.encode(decoder, sample, s)))[:, 0].mean()
        for s in (plain, skewed)
    ]
    assert gaps[1] < gaps[0]


@pytest.mark.parametrize("k", [0, 10**6])
def test_impossible_numbers_of_clusters_are_refused(k: int, tiny_task: Task) -> None:
    with pytest.raises(ExplanationError, match=rf"k = {k}, but there are 1200 tokens"):
        Clusters(k=k).fit(tiny_task.for_fitting())


def test_sections_of_the_wrong_make_are_refused() -> None:
    with pytest.raises(MessageError, match="one part array"):
        ClustersDecoder.from_section(Section("clusters"))


def test_a_seed_gives_the_same_clusters_and_another_others(tiny_task: Task) -> None:
    first, again, other = (Clusters(k=12, rounds=2, seed=s).fit(tiny_task.for_fitting()) for s in (0, 0, 1))
    assert np.array_equal(first.centroids, again.centroids)
    assert not np.array_equal(first.centroids, other.centroids)
