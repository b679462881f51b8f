"""Decompositions of weights that nobody had to learn: what a learned one is compared with, and how one is spoiled.

Each is `Factors`: of any network's matrices, exact where it says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from decompositions.weights.factors import Factors, TensorFactors
from decompositions.weights.pruning import mlps
from mdl.errors import ExplanationError
from mdl.models.networks import Network

Weights = Mapping[str, np.ndarray]
SMALLEST = 1e-10  # of the largest singular value: below it there is no direction


def whole(network: Network, weights: Weights) -> Factors:
    """All matrices as one part, exactly."""
    tensors = {}
    for name, (rows, columns) in network.matrices.items():
        by_rows = rows <= columns
        size = rows if by_rows else columns
        matrix = np.asarray(weights[name], np.float64)
        sides = (np.eye(rows), matrix) if by_rows else (matrix.T, np.eye(columns))
        tensors[name] = TensorFactors(sides[0], sides[1], np.zeros(size, np.int64))
    return Factors(tensors, "one part")


def singular(network: Network, weights: Weights) -> Factors:
    """A part for every singular direction of every matrix, exactly."""
    tensors, count = {}, 0
    for name in network.matrices:
        u, values, v = np.linalg.svd(np.asarray(weights[name], np.float64), full_matrices=False)
        kept = values > SMALLEST * max(values.max(initial=0.0), 1e-30)
        rows = int(kept.sum())
        tensors[name] = TensorFactors(u.T[kept], values[kept, None] * v[kept], np.arange(count, count + rows))
        count += rows
    return Factors(tensors, "singular directions")


def input_columns(network: Network, weights: Weights) -> Factors:
    """A part for every input of every matrix, exactly."""
    tensors, count = {}, 0
    for name, (rows, _) in network.matrices.items():
        tensors[name] = TensorFactors(
            np.eye(rows), np.asarray(weights[name], np.float64), np.arange(count, count + rows)
        )
        count += rows
    return Factors(tensors, "input columns")


def neurons(network: Network, weights: Weights) -> Factors:
    """A part for every hidden unit, spanning the matrices into it and out of it, exactly.

    Hidden units are neurons where a matrix `W_out` reads what `W_in` writes, and else the outputs of each matrix.
    """
    pairs = mlps(network)
    tensors, count = {}, 0
    for pair in pairs:
        size = network.matrices[pair.out][0]
        ids = np.arange(count, count + size)
        for name in pair.into:
            tensors[name] = TensorFactors(np.asarray(weights[name], np.float64).T, np.eye(size), ids)
        tensors[pair.out] = TensorFactors(np.eye(size), np.asarray(weights[pair.out], np.float64), ids)
        count += size
    for name in (n for n in network.matrices if n not in tensors):
        size = network.matrices[name][1]
        ids = np.arange(count, count + size)
        tensors[name] = TensorFactors(np.asarray(weights[name], np.float64).T, np.eye(size), ids)
        count += size
    return Factors({name: tensors[name] for name in network.matrices}, "neurons")


def random_parts(network: Network, weights: Weights, seed: int = 0, share: float = 1.0) -> Factors:
    """Parts of random input directions, as many as a matrix has inputs times `share`; outputs by least squares.

    Exact where there are as many parts as inputs, or more.
    """
    rng, tensors, count = np.random.default_rng(seed), {}, 0
    for name, (rows, _) in network.matrices.items():
        size = max(1, round(share * rows))
        directions = rng.normal(size=(size, rows)) / np.sqrt(rows)
        outputs = np.linalg.lstsq(directions.T, np.asarray(weights[name], np.float64), rcond=None)[0]
        tensors[name] = TensorFactors(directions, outputs, np.arange(count, count + size))
        count += size
    return Factors(tensors, "random parts")


KINDS: Mapping[str, Callable[[Network, Weights], Factors]] = {
    "whole": whole,
    "singular": singular,
    "columns": input_columns,
    "neurons": neurons,
    "random": random_parts,
}


def merged(factors: Factors, first: int, second: int, name: str = "") -> Factors:
    """Two components as one, the later of whose numbers is closed up."""
    _check_ids(factors, first, second)
    low, high = sorted((first, second))

    def renumbered(ids: np.ndarray) -> np.ndarray:
        joined = np.where(ids == high, low, ids)
        return np.where(joined > high, joined - 1, joined)

    tensors = {
        n: TensorFactors(t.inputs, t.outputs, renumbered(t.component), t.gates) for n, t in factors.tensors.items()
    }
    return Factors(tensors, name or f"{factors.name}, two merged")


def split(factors: Factors, component: int, seed: int = 0, name: str = "") -> Factors:
    """One component as two, whose output factors add up to its own: each is half of it, and random besides."""
    _check_ids(factors, component)
    rng, last = np.random.default_rng(seed), factors.n_components
    tensors = {}
    for matrix, t in factors.tensors.items():
        mine = t.component == component
        half = t.outputs[mine] / 2
        shift = rng.normal(size=half.shape) * np.linalg.norm(half, axis=1, keepdims=True) / np.sqrt(half.shape[1])
        outputs = t.outputs.copy()
        outputs[mine] = half + shift
        tensors[matrix] = TensorFactors(
            np.concatenate([t.inputs, t.inputs[mine]]),
            np.concatenate([outputs, half - shift]),
            np.concatenate([t.component, np.full(int(mine.sum()), last)]),
        )
    return Factors(tensors, name or f"{factors.name}, one split")


def _check_ids(factors: Factors, *ids: int) -> None:
    """**Raises:** `ExplanationError` for numbers that are no components', or the same twice."""
    if len(set(ids)) < len(ids) or not all(0 <= i < factors.n_components for i in ids):
        raise ExplanationError(f"{factors.name} has components 0 to {factors.n_components - 1}; given were {ids}")
