"""scikit-learn's online dictionary learning as a decomposition."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import Lasso

from decompositions.dictionary_learning import DictionaryLearning, learn, penalty_for
from decompositions.random_dictionary import RandomDictionary, encode
from mdl.errors import ExplanationError
from mdl.message import decode_message, encode_message
from mdl.protocols import Settings
from mdl.receiver import decoder_of
from mdl.task import Task


def sparse_data(n: int = 1500, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Points that are sums of two of 12 atoms in 8 dimensions, and the atoms."""
    rng = np.random.default_rng(seed)
    atoms = rng.normal(size=(12, 8))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    codes = np.zeros((n, 12))
    for row in codes:
        row[rng.choice(12, 2, replace=False)] = rng.uniform(1, 2, 2) * rng.choice([-1, 1], 2)
    return atoms, codes @ atoms


def test_the_atoms_of_sparse_data_are_found() -> None:
    atoms, points = sparse_data()
    found = learn(points, 16, 2, 4, seed=0)
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    nearest = np.abs(atoms @ found.T).max(1)
    directions = np.random.default_rng(1).normal(size=(16, 8))
    chance = np.abs(atoms @ (directions / np.linalg.norm(directions, axis=1, keepdims=True)).T).max(1)
    assert np.median(nearest) > 0.9 > np.median(chance) + 0.1


def test_the_penalty_gives_about_so_many_atoms() -> None:
    atoms, points = sparse_data(200)
    alpha = penalty_for(points, atoms, 2)
    lasso = Lasso(alpha / 8, fit_intercept=False, max_iter=500)  # its loss is a mean over the 8 coordinates
    counts = [np.count_nonzero(lasso.fit(atoms.T, x).coef_) for x in points]
    assert np.mean(counts) == pytest.approx(2, abs=0.2)


def test_learnt_atoms_beat_random_ones_and_reach_the_receiver(tiny_task: Task) -> None:
    task, options = tiny_task.for_fitting(), {"features": 32, "k": 3}
    explanation = DictionaryLearning(tokens=600, epochs=1, **options).fit(task)
    assert explanation.name == "dictionary learning (32, k=3)"
    sample = tiny_task.held_out.sample()
    settings = Settings(1e9, 0.02, np.eye(16), {"static": 1.0, "value": 1.0})
    decoder = decoder_of(decode_message(encode_message([explanation.section(settings)]).data)[0])
    state = explanation.encode(decoder, sample, settings)
    left = sample.outputs - decoder.predict(sample.inputs, state)
    exact = encode(explanation.atoms, explanation.bias, 3, sample.outputs) @ explanation.atoms + explanation.bias
    assert np.square(left).mean() == pytest.approx(np.square(sample.outputs - exact).mean(), rel=0.05)
    random = RandomDictionary(**options).fit(task).dictionary
    control = random.activations(sample.outputs) @ random.atoms + random.bias
    assert np.square(left).mean() < 0.8 * np.square(sample.outputs - control).mean()


def test_a_seed_gives_the_same_atoms_and_another_others() -> None:
    _, points = sparse_data(300)
    first, again, other = (learn(points, 10, 2, 1, seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.allclose(first, other)


@pytest.mark.parametrize("options", [{"k": 0}, {"k": 9, "features": 8}, {"tokens": 0}, {"epochs": 0}, {"seed": -1}])
def test_options_out_of_range_are_refused(options: dict[str, int], tiny_task: Task) -> None:
    with pytest.raises(ExplanationError, match="needed are 1 <= k <= features"):
        DictionaryLearning(**options).fit(tiny_task.for_fitting())
