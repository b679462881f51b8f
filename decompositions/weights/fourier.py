r"""A transformer's weights of which the embedding and the unembedding are sent as waves over the tokens.

With B [p, 2K + 1] the orthonormal columns of the constant and of cos and sin (2 pi k x / p) for K frequencies k,

    W_E[x] = (B C)[x],  x < p;      W_U = D B^T

and C [2K + 1, d], D [d, 2K + 1] take the place of the p rows and columns. What other tokens embed to, and all other
weights, are sent as they are, rounded. Source: Nanda et al. 2023, arXiv:2301.05217, section 4.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from decompositions.baselines import STATIC_KNOB
from decompositions.fourier import read_frequencies, written_frequencies
from decompositions.weights.curvature import Curvature, Curvatures, MeasuredCurvature
from decompositions.weights.dense import architecture, evaluate, rounded_rows
from decompositions.weights.rounding import round_matrix
from mdl.alphabets import NoAlphabet
from mdl.errors import ExplanationError, MessageError
from mdl.message import QuantisedArray, Section
from mdl.models.networks import Network
from mdl.protocols import Inputs, Sample, Settings
from mdl.state import NoState, State
from mdl.task import Task

KIND = "fourier-weights"
EMBED, UNEMBED = "embed.W_E", "unembed.W_U"


def waves(modulus: int, frequencies: np.ndarray) -> np.ndarray:
    """The constant, then cos and sin of each frequency, orthonormal columns, float64 [p, 2K + 1]."""
    angles = 2.0 * np.pi / modulus * (np.outer(np.arange(modulus), np.asarray(frequencies, np.int64)) % modulus)
    pairs = np.stack([np.cos(angles), np.sin(angles)], 2).reshape(modulus, -1)
    every = np.concatenate([np.ones((modulus, 1)), pairs], 1)
    lengths = np.linalg.norm(every, axis=0)
    lengths[lengths < 1e-9] = 1.0  # the sine at half of an even modulus is zero
    return np.asarray(every / lengths)


def wave_power(table: np.ndarray) -> np.ndarray:
    """Of a table [p, d] the share of its power about the mean at each frequency 1 .. p // 2, summing to 1."""
    p = len(table)
    centred = table - table.mean(0)
    power = np.square(np.abs(np.fft.rfft(centred, axis=0))).sum(1)[1:]
    power[: (p - 1) // 2] *= 2.0  # each stands for its mirror image too, but half of an even modulus
    return np.asarray(power / max(float(power.sum()), 1e-300))


@dataclass(frozen=True)
class FourierWeights:
    """The weights, with embedding and unembedding at a few frequencies; `frequencies`: how many, those of the largest
    power in the embedding first."""

    frequencies: int = 5

    def fit(self, task: Task) -> FourierWeightsExplanation:
        """**Raises:** `ExplanationError` for a region without an embedding and an unembedding of its own, or with fewer
        token ids than logits; `TaskError` for a region whose weights are not known."""
        curvature = MeasuredCurvature.of(task)
        weights = curvature.weights
        if EMBED not in weights or UNEMBED not in weights:
            raise ExplanationError(
                f"fourier-weights: the region {task.region.name!r} has not both {EMBED} and {UNEMBED}: take 'model', "
                "of a model in which they are not tied"
            )
        modulus = weights[UNEMBED].shape[1]
        if len(weights[EMBED]) < modulus or not 1 <= self.frequencies <= modulus // 2:
            raise ExplanationError(
                f"fourier-weights: {self.frequencies} frequencies over {modulus} logits, {len(weights[EMBED])} token "
                f"ids: it takes a token id for each logit, and from 1 to {modulus // 2} frequencies"
            )
        power = wave_power(np.asarray(weights[EMBED][:modulus], np.float64))
        chosen = np.sort(np.argsort(-power, kind="stable")[: self.frequencies]) + 1
        name = f"weights at {self.frequencies} frequencies"
        return FourierWeightsExplanation(name, curvature, modulus, chosen)


@dataclass(frozen=True)
class FourierWeightsExplanation:
    """The sender's side."""

    name: str
    curvature: MeasuredCurvature
    modulus: int
    frequencies: np.ndarray
    kind: str = KIND

    @property
    def knobs(self) -> Mapping[str, Sequence[float]]:
        return {"static": STATIC_KNOB}

    def section(self, settings: Settings) -> Section:
        """p, frequencies, C, other tokens' rows, D, then all other weights in the network's order."""
        found, network = self.curvature.under(settings.root), self.curvature.network
        arrays = [*written_frequencies(self.modulus, self.frequencies), *self._ends(found, settings)]
        for name in network.matrices:
            if name != UNEMBED:
                arrays.append(round_matrix(self.curvature.weights[name], found.matrices[name], settings))
        for name in (*network.tables, *network.vectors):
            if name != EMBED:
                arrays.append(rounded_rows(self.curvature.weights[name], found.others[name], settings))
        return Section(KIND, tuple(arrays))

    def _ends(self, found: Curvatures, settings: Settings) -> list[QuantisedArray]:
        basis = waves(self.modulus, self.frequencies)
        table, sensitivity = self.curvature.weights[EMBED], found.others[EMBED]
        coefficients = basis.T @ table[: self.modulus]
        each = np.square(basis).T @ sensitivity[: self.modulus]
        matrix, own = self.curvature.weights[UNEMBED] @ basis, found.matrices[UNEMBED]
        sides = Curvature(own.inputs.copy(), basis.T @ own.outputs @ basis)
        return [
            rounded_rows(coefficients, each, settings),
            rounded_rows(table[self.modulus :], sensitivity[self.modulus :], settings),
            round_matrix(matrix, sides, settings),
        ]

    def encode(self, decoder: FourierWeightsDecoder, sample: Sample, settings: Settings) -> NoState:
        return NoState(sample.inputs.n_tokens)


@dataclass(frozen=True)
class FourierWeightsDecoder:
    """`embedding` C [2K + 1, d], `rest` [tokens beyond p, d], `unembedding` D [d, 2K + 1]; `arrays`: all others."""

    modulus: int
    frequencies: np.ndarray
    embedding: np.ndarray
    rest: np.ndarray
    unembedding: np.ndarray
    arrays: tuple[np.ndarray, ...]

    @classmethod
    def from_section(cls, section: Section) -> FourierWeightsDecoder:
        """Header: p [1, 1], increments of the frequencies [1, K], C, other rows, D, then all other weights.

        **Raises:** `MessageError` for fewer arrays, or shapes that the frequencies do not ask for.
        """
        if section.parts or len(section.header) < 5:
            raise MessageError("a 'fourier-weights' section begins with five arrays, and has no parts")
        modulus, frequencies = read_frequencies(section, KIND)
        embedding, rest, unembedding = (a.values() for a in section.header[2:5])
        size = 2 * len(frequencies) + 1
        if len(embedding) != size or unembedding.shape[1] != size or rest.shape[1:] != embedding.shape[1:]:
            raise MessageError(
                f"'fourier-weights': waves {embedding.shape} and {unembedding.shape}, other rows {rest.shape}, for "
                f"{len(frequencies)} frequencies"
            )
        arrays = tuple(a.values() for a in section.header[5:])
        return cls(modulus, frequencies, embedding, rest, unembedding, arrays)

    @property
    def alphabet(self) -> NoAlphabet:
        return NoAlphabet()

    def weights(self, network: Network) -> dict[str, np.ndarray]:
        """By the network's names. **Raises:** `MessageError` where they do not fit it."""
        shapes: dict[str, tuple[int, ...]] = {**network.matrices, **network.tables}
        shapes |= {name: (1, size) for name, size in network.vectors.items()}
        names = [name for name in shapes if name not in (EMBED, UNEMBED)]
        if len(names) != len(self.arrays):
            raise MessageError(f"'fourier-weights': {len(self.arrays)} arrays for {len(names)} other weights")
        for name, size in ((EMBED, self.modulus + len(self.rest)), (UNEMBED, self.modulus)):
            if shapes.get(name, (0,))[0 if name == EMBED else -1] != size:
                raise MessageError(f"'fourier-weights': {size} tokens or logits for {name}, {shapes.get(name)} here")
        basis = waves(self.modulus, self.frequencies)
        found: dict[str, Any] = dict(zip(names, self.arrays, strict=True))
        found[EMBED] = np.concatenate([basis @ self.embedding, self.rest]).astype(np.float32)
        found[UNEMBED] = (self.unembedding @ basis.T).astype(np.float32)
        for name, weight in found.items():
            if weight.shape != shapes[name]:
                raise MessageError(f"'fourier-weights': {name} is {shapes[name]}; the message has {weight.shape}")
        return {name: w[0] if name in network.vectors else w for name, w in found.items()}

    def predict(self, inputs: Inputs, state: State) -> np.ndarray:
        """The region's outputs at the scored positions, float32 [n, d]."""
        network = architecture(inputs)
        return evaluate(network, self.weights(network), inputs)

    def touched(self, inputs: Inputs, state: State) -> None:
        return None

    def flops_per_token(self, inputs: Inputs, state: State) -> float:
        """Of the products with matrices, zeros left out."""
        network = architecture(inputs)
        weights = self.weights(network)
        return 2.0 * sum(float(np.count_nonzero(weights[name])) for name in network.matrices)
