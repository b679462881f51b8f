"""Matching pursuit: a plain loop, exact solutions, chunks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.optimize
import scipy.sparse

from decompositions import matching_pursuit
from decompositions.matching_pursuit import pursue

WIDTH, FEATURES, TOKENS = 12, 30, 9


def atoms_of(features: int = FEATURES, width: int = WIDTH, seed: int = 1) -> np.ndarray:
    """Rows of different norms."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(features, width)) * rng.uniform(0.2, 3.0, (features, 1))).astype(np.float32)


def targets_of(tokens: int = TOKENS, width: int = WIDTH, seed: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(tokens, width)).astype(np.float32)


def plain_loop(atoms: np.ndarray, target: np.ndarray, k: int, signed: bool) -> np.ndarray:
    """Orthogonal matching pursuit of one token, each fit solved exactly."""
    units, support, found = atoms / np.linalg.norm(atoms, axis=1, keepdims=True), [], np.zeros(len(atoms))
    for _ in range(k):
        overlap = units @ (target - found @ atoms)
        overlap = np.abs(overlap) if signed else overlap
        overlap[support] = -np.inf
        if overlap.max() <= 0:
            break
        support.append(int(np.argmax(overlap)))
        rows = atoms[support].astype(np.float64)
        solved = np.linalg.lstsq(rows.T, target, rcond=None)[0] if signed else scipy.optimize.nnls(rows.T, target)[0]
        found = np.zeros(len(atoms))
        found[support] = solved
    return found


@pytest.mark.parametrize("signed", [True, False])
def test_against_a_plain_loop(signed: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(matching_pursuit, "SWEEPS", 300)
    monkeypatch.setattr(matching_pursuit, "LAST_SWEEPS", 300)
    atoms, targets = atoms_of(), targets_of()
    expected = np.stack([plain_loop(atoms, target.astype(np.float64), 5, signed) for target in targets])
    np.testing.assert_allclose(pursue(atoms, targets, 5, signed).toarray(), expected, atol=2e-4)


def test_few_sweeps_are_nearly_enough():
    atoms, targets = atoms_of(), targets_of(200)
    error = np.square(targets - pursue(atoms, targets, 5, signed=False) @ atoms).sum()
    exact = np.stack([plain_loop(atoms, target.astype(np.float64), 5, signed=False) for target in targets])
    assert error == pytest.approx(np.square(targets - exact @ atoms).sum(), rel=0.02)


def test_orthonormal_rows_give_the_largest_coefficients():
    basis = np.linalg.qr(np.random.default_rng(3).normal(size=(WIDTH, WIDTH)))[0].astype(np.float32)
    targets = targets_of()
    coefficients = targets @ basis.T
    kept = np.abs(coefficients) >= np.sort(np.abs(coefficients), axis=1)[:, -4][:, None]
    found = pursue(2.0 * basis, targets, 4, signed=True).toarray()
    np.testing.assert_allclose(found, np.where(kept, coefficients, 0.0) / 2.0, atol=1e-5)
    rectified = pursue(basis, targets, WIDTH, signed=False).toarray()
    np.testing.assert_allclose(rectified, np.maximum(coefficients, 0.0), atol=1e-5)


def test_a_token_with_nothing_left_to_add_gets_fewer():
    atoms = np.eye(3, dtype=np.float32)
    found = pursue(atoms, np.array([[2.0, 0, 0], [-1, -1, -1], [0, 0, 0]], np.float32), 3, signed=False)
    np.testing.assert_array_equal(found.toarray(), [[2, 0, 0], [0, 0, 0], [0, 0, 0]])
    assert found.nnz == 1


def test_more_steps_never_fit_worse():
    atoms, targets = atoms_of(), targets_of(50)
    for signed in (True, False):
        errors = [np.square(targets - pursue(atoms, targets, k, signed) @ atoms).sum() for k in range(8)]
        assert errors[0] == pytest.approx(np.square(targets).sum())
        assert all(a >= b for a, b in itertools.pairwise(errors))


def test_rows_of_norm_zero_are_never_used():
    atoms = atoms_of()
    atoms[[0, 7]] = 0.0
    found = pursue(atoms, targets_of(), FEATURES, signed=True)
    assert np.isfinite(found.data).all()
    assert not found[:, [0, 7]].nnz


def test_it_is_the_same_in_any_number_of_chunks(monkeypatch: pytest.MonkeyPatch):
    atoms, targets = atoms_of(), targets_of(100)
    whole = pursue(atoms, targets, 3, signed=False).toarray()
    monkeypatch.setattr(matching_pursuit, "CHUNK_ELEMENTS", 7 * FEATURES)
    np.testing.assert_allclose(pursue(atoms, targets, 3, signed=False).toarray(), whole, atol=1e-5)
    assert pursue(atoms, targets[:0], 3, signed=False).shape == (0, FEATURES)
    assert pursue(atoms[:2], targets, 5, signed=True).shape == (100, 2)
