"""Which neurons of a region's MLPs to do without, and what the others make good.

A neuron that goes is replaced by its mean, in the bias behind it. With `refit`, the output weights of those that stay
take over what they can predict of it (optimal brain surgeon, Hassibi and Stork 1993, on the second moments of the
hidden activations): removing neuron j raises the expected squared error by

    |w_j|_B^2 / (S^-1)_jj,   S the covariance of hidden activations, w_j its output weights, B the metric behind them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from decompositions.weights.curvature import RIDGE, Curvatures, MeasuredCurvature
from decompositions.weights.usage import activations
from mdl.models.networks import Network

LEAST_BITS = 0.05  # what a number that rounds to zero saves by not being there


@dataclass(frozen=True)
class MLP:
    """Names of a hidden layer's weights: matrices and biases into the neurons, the matrix and bias out of them."""

    into: tuple[str, ...]
    biases: tuple[str, ...]
    out: str
    bias_out: str | None


def mlps(network: Network) -> list[MLP]:
    """The hidden layers of a network: `PREFIX.W_in` (and `W_gate`) into neurons that `PREFIX.W_out` reads."""
    found = []
    for out in (name for name in network.matrices if name.endswith("W_out")):
        prefix = out.removesuffix("W_out")
        into = tuple(n for n in (f"{prefix}W_in", f"{prefix}W_gate") if n in network.matrices)
        biases = tuple(n for n in (f"{prefix}b_in", f"{prefix}b_gate") if n in network.vectors)
        bias_out = f"{prefix}b_out" if f"{prefix}b_out" in network.vectors else None
        if into:
            found.append(MLP(into, biases, out, bias_out))
    return found


@dataclass(frozen=True)
class Pruned:
    """Weights that change, for each share of neurons that is kept."""

    weights: Mapping[float, Mapping[str, np.ndarray]]

    def at(self, share: float) -> Mapping[str, np.ndarray]:
        return self.weights[share]


@dataclass
class _Layer:
    """One hidden layer while neurons are taken out of it.

    `gain` [h]: bits that a neuron's weights take, about; `idle` [h]: always at its mean, so that nothing is lost.
    """

    mlp: MLP
    mean: np.ndarray
    inverse: np.ndarray
    output: np.ndarray
    metric: np.ndarray
    gain: np.ndarray
    idle: np.ndarray
    alive: np.ndarray

    def scores(self) -> np.ndarray:
        """Error a bit saved; infinite where a neuron is gone."""
        harm = np.einsum("hd,de,he->h", self.output, self.metric, self.output) / np.diag(self.inverse)
        return np.where(self.alive, np.where(self.idle, 0.0, harm / self.gain), np.inf)

    def remove(self, j: int, refit: bool) -> None:
        if refit:
            direction = self.inverse[:, j] / self.inverse[j, j]
            self.output -= np.outer(direction * self.alive, self.output[j])
            self.inverse -= np.outer(direction, self.inverse[j])
            self.inverse[j, j] = 1.0
        self.output[j] = 0.0
        self.alive[j] = False


def prune(source: MeasuredCurvature, curvature: Curvatures, shares: tuple[float, ...], refit: bool) -> Pruned:
    """Take neurons out one by one, the cheapest a bit first, and note the weights at each share that is kept."""
    seen = activations(source.network, source.weights, source.inputs)
    layers = [_layer(source, mlp, seen[mlp.out], curvature, refit) for mlp in mlps(source.network)]
    total = sum(len(layer.alive) for layer in layers)
    found: dict[float, Mapping[str, np.ndarray]] = {}
    left = total
    scores = [layer.scores() for layer in layers]
    for share in sorted(shares, reverse=True):
        while left > round(share * total):
            which = int(np.argmin([s.min() for s in scores]))
            layers[which].remove(int(np.argmin(scores[which])), refit)
            scores[which] = layers[which].scores()
            left -= 1
        found[share] = {k: v for layer in layers for k, v in _changed(source.weights, layer).items()}
    return Pruned(found)


def _layer(source: MeasuredCurvature, mlp: MLP, hidden: np.ndarray, curvature: Curvatures, refit: bool) -> _Layer:
    """A hidden layer with all its neurons, whose activations are `hidden` [n, h]."""
    mean = hidden.mean(0, dtype=np.float64)
    covariance = np.cov(hidden.T.astype(np.float64), bias=True)
    idle = np.diag(covariance) == 0
    covariance[np.diag_indices(len(mean))] += RIDGE * np.trace(covariance) / len(mean) + 1e-30
    inverse = np.linalg.inv(covariance) if refit else np.diag(1.0 / np.diag(covariance))
    output = np.array(source.weights[mlp.out], np.float64)
    gain = _magnitude_bits(output) + sum(_magnitude_bits(source.weights[name].T) for name in mlp.into)
    return _Layer(mlp, mean, inverse, output, curvature.matrices[mlp.out].outputs, gain, idle, np.ones(len(mean), bool))


def _magnitude_bits(rows: np.ndarray) -> np.ndarray:
    """Bits of each row [h, d], up to a step that all share: log2(1 + |w| / scale), summed."""
    scale = np.sqrt(np.mean(np.square(rows, dtype=np.float64))) / 4
    return np.log2(1.0 + np.abs(rows) / max(scale, 1e-30)).sum(1) + LEAST_BITS * rows.shape[1]


def _changed(weights: Mapping[str, np.ndarray], layer: _Layer) -> dict[str, np.ndarray]:
    """The layer's weights without the neurons that are gone; means go into the bias."""
    mlp, gone = layer.mlp, ~layer.alive
    found: dict[str, np.ndarray] = {mlp.out: layer.output.copy()}
    for name in (*mlp.into, *mlp.biases):
        kept = np.array(weights[name], np.float64)
        kept[..., gone] = 0.0
        found[name] = kept
    if mlp.bias_out is not None:
        lost = np.asarray(weights[mlp.out], np.float64) - layer.output
        found[mlp.bias_out] = weights[mlp.bias_out] + layer.mean @ lost
    return found
