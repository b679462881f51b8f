"""How components of weights are used on fit data: how often, with what coefficients, on what inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from decompositions.weights.curvature import BATCH_TOKENS, batches_of, device
from decompositions.weights.factors import Factors
from decompositions.weights.gating import GateParameters, gate_values, hard
from decompositions.weights.masking import clean_pass
from mdl.models.networks import Network
from mdl.protocols import Inputs


def activations(network: Network, weights: Mapping[str, np.ndarray], inputs: Inputs) -> dict[str, np.ndarray]:
    """What enters every matrix of the model itself, [n, d_in]: at the scored positions, at its first use that is not
    transposed."""
    on_device = {name: jnp.asarray(w) for name, w in weights.items()}
    names = tuple(network.matrices)
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for batch in batches_of(inputs, BATCH_TOKENS):
        values, tokens, _ = device(batch)
        _, entering = clean_pass(network, on_device, names, values, tokens)
        for name, entered in entering.items():
            found[name].append(np.asarray(entered, np.float32)[batch.scored])
    return {name: np.concatenate(rows) for name, rows in found.items()}


def importances(factors: Factors, seen: Mapping[str, np.ndarray]) -> np.ndarray:
    """The gates' values on the model's own activations, float32 [n, C]: the largest of a component's subcomponents."""
    count = len(next(iter(seen.values())))
    found = np.zeros((count, factors.n_components), np.float32)
    for name, tensor in factors.tensors.items():
        if not len(tensor.component):
            continue  # a matrix in which nothing is left alive
        assert tensor.gates is not None
        gates = GateParameters.of(tensor.gates)
        for start in range(0, count, BATCH_TOKENS):
            rows = slice(start, start + BATCH_TOKENS)
            inner = jnp.asarray(seen[name][rows] @ tensor.inputs.T.astype(np.float32))
            opened = np.asarray(hard(gate_values(gates, inner)))
            for s, c in enumerate(tensor.component):
                found[rows, c] = np.maximum(found[rows, c], opened[:, s])
    return found


@dataclass(frozen=True)
class MatrixUse:
    """Of the subcomponents of one matrix, with the masks in force.

    `energy` [S]: E[m^2 (V . x)^2]; `spread` [d_in, d_in]: the inputs' second moments where subcomponents are on, of
    all of them together, scaled to a mean of 1 on its diagonal; `size` [S]: that mean for each by itself, times its
    frequency: E[m |x|^2] / d_in.
    """

    energy: np.ndarray
    spread: np.ndarray
    size: np.ndarray


@dataclass(frozen=True)
class Usage:
    """`frequency` [C] of components that are on; `matrices` by name."""

    frequency: np.ndarray
    matrices: Mapping[str, MatrixUse]

    @classmethod
    def of(cls, factors: Factors, seen: Mapping[str, np.ndarray], masks: np.ndarray) -> Usage:
        """**Arguments:** `seen`: `activations`; `masks` [n, C] in [0, 1]."""
        n = len(masks)
        found = {}
        for name, tensor in factors.tensors.items():
            x, mask = seen[name].astype(np.float64), masks[:, tensor.component].astype(np.float64)
            coefficients = mask * (x @ tensor.inputs.T)
            size = mask.T @ np.square(x).mean(1) / n
            weight = mask.sum(1)
            spread = (x * weight[:, None]).T @ x / max(float(weight.sum()), 1e-30)
            found[name] = MatrixUse(np.square(coefficients).mean(0), _unit(spread), size)
        return cls((masks > 0).mean(0, dtype=np.float64), found)


def _unit(moment: np.ndarray) -> np.ndarray:
    """Scaled to a mean of 1 on the diagonal, which a little is added to."""
    mean = float(np.trace(moment)) / len(moment)
    return np.asarray(moment / mean if mean > 0 else np.zeros_like(moment)) + 1e-4 * np.eye(len(moment))
