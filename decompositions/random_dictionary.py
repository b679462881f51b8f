"""The control for every learned dictionary: random directions, of which a seed tells the receiver everything.

Directions are isotropic Gaussian, scaled to unit norm. They are not drawn in the whitened space of the data: a
covariance is knowledge about the model, and would have to be charged; here nothing but the seed is. The stream is
`numpy.random.Generator(numpy.random.Philox(seed)).standard_normal((features, d))`, rows then divided by their norms in
float64 and rounded to float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import scipy.sparse

from decompositions.dictionary import (
    KNOBS,
    DictionaryDecoder,
    DictionaryExplanation,
    build_decoder,
    fit_dictionary,
    header_arrays,
    quantise,
    value_classes,
    value_exponents,
)
from decompositions.matching_pursuit import pursue
from mdl.errors import ExplanationError, MessageError
from mdl.message import QuantisedArray, Section
from mdl.protocols import Sample, Settings
from mdl.state import State

KIND = "random-dictionary"
LARGEST_SEED = (1 << 60) - 1
MAX_DIRECTIONS = 1 << 25  # numbers a receiver draws, in half a second: 43,690 features of width 768
DRAWN = 1 << 20  # numbers held at a time


def random_directions(seed: int, features: int, width: int) -> np.ndarray:
    """Unit rows [features, width], float32, from the stream that the module names."""
    return chosen_directions(seed, np.arange(features), width)


def chosen_directions(seed: int, chosen: np.ndarray, width: int) -> np.ndarray:
    """The rows `chosen` (distinct) of the directions of a seed, in that order; holds no more than DRAWN others."""
    stream = np.random.Generator(np.random.Philox(seed))
    found = np.zeros((len(chosen), width), np.float32)
    order = np.argsort(chosen)
    block = max(1, DRAWN // max(width, 1))
    for start in range(0, int(chosen.max(initial=-1)) + 1, block):
        rows = stream.standard_normal((block, width))
        wanted = order[slice(*np.searchsorted(chosen, [start, start + block], sorter=order))]
        some = rows[chosen[wanted] - start]
        found[wanted] = some / np.linalg.norm(some, axis=1, keepdims=True)
    return found


class RandomDictionaryDecoder:
    """Rebuilds the directions from the seed; header (bias, flags, [seed, features]), parts (row, exponent, class).

    A part says which row of the stream its feature is, for parts travel in the order of their first use.
    """

    @classmethod
    def from_section(cls, section: Section) -> DictionaryDecoder:
        """A dictionary's decoder. **Raises:** `MessageError` if the arrays do not fit together."""
        if len(section.header) != 3 or len(section.parts) != 3 or section.header[2].symbols.shape != (1, 2):
            counts = f"{len(section.header)} header and {len(section.parts)} part arrays"
            raise MessageError(
                f"a random dictionary has 3 header arrays, the last [1, 2], and 3 of parts, not {counts}"
            )
        size = section.header[2].integers("a random dictionary's seed and size", 0, LARGEST_SEED, 2)
        seed, features = (int(v) for v in size[0])
        width = section.header[0].symbols.shape[1]
        if not 0 < features * width <= MAX_DIRECTIONS:
            raise MessageError(
                f"a random dictionary of {features} x {width}: a receiver draws between 1 and {MAX_DIRECTIONS} numbers"
            )
        rows = section.parts[0].integers("a random dictionary's array of rows", 0, features - 1, 1)[:, 0]
        if len(np.unique(rows)) != len(rows):
            raise MessageError("a random dictionary names a row twice")
        return build_decoder(section, chosen_directions(seed, rows, width), *section.parts[1:])


def encode(atoms: np.ndarray, bias: np.ndarray, k: int, outputs: np.ndarray) -> scipy.sparse.csr_array:
    """Activations [n, F], of either sign, by matching pursuit on outputs minus the bias."""
    return pursue(atoms, outputs - bias, k, signed=True)


@dataclass(frozen=True)
class RandomDictionaryExplanation:
    """The sender's side: as a dictionary's, but the seed travels in place of the atoms."""

    dictionary: DictionaryExplanation
    seed: int
    kind: str = KIND
    knobs: Mapping[str, Sequence[float]] = field(default_factory=lambda: dict(KNOBS))

    @property
    def name(self) -> str:
        return self.dictionary.name

    def section(self, settings: Settings) -> Section:
        """Bias, seed and size once; of every feature in use its row's number, value step and class."""
        dictionary, kept = self.dictionary, self._kept()
        exponents = value_exponents(dictionary.atoms, dictionary.statistics, settings)
        classes = value_classes(dictionary.statistics, exponents)
        size = QuantisedArray.from_integers(np.array([[self.seed, len(dictionary.atoms)]]))
        header = (*header_arrays(dictionary.bias, True, dictionary.side, settings), size)
        parts = tuple(QuantisedArray.from_integers(array) for array in (kept, exponents[kept], classes[kept]))
        return Section(self.kind, header, parts)

    def _kept(self) -> np.ndarray:
        return np.flatnonzero(self.dictionary.statistics.frequency > 0)

    def encode(self, decoder: DictionaryDecoder, sample: Sample, settings: Settings) -> State:
        """The state symbols of a sample, under the decoder that came out of the message."""
        return quantise(decoder, self.dictionary.activations(sample.outputs)[:, self._kept()], sample.outputs)


@dataclass(frozen=True)
class RandomDictionary:
    """Random unit directions and orthogonal matching pursuit with `k` steps on outputs minus their mean."""

    features: int = 1024
    k: int = 8
    seed: int = 0

    def fit(self, task: Any) -> RandomDictionaryExplanation:
        """Measure the random features on fit data. **Raises:** `ExplanationError` for options out of range."""
        if self.features < 1 or not 1 <= self.k <= self.features or self.seed < 0:
            raise ExplanationError(
                f"random-dictionary: features={self.features}, k={self.k}, seed={self.seed}; needed are at least one "
                "feature, 1 <= k <= features and a seed that is not negative"
            )
        outputs = task.fit.outputs
        if self.features * outputs.shape[1] > MAX_DIRECTIONS or self.seed > LARGEST_SEED:
            raise ExplanationError(
                f"random-dictionary: {self.features} features of width {outputs.shape[1]} from the seed {self.seed}; a "
                f"receiver draws {MAX_DIRECTIONS} numbers at most, from a seed below 2**60"
            )
        bias = outputs.mean(0)
        atoms = random_directions(self.seed, self.features, outputs.shape[1])
        encoder = partial(encode, atoms, bias, self.k)
        name = f"random dictionary ({self.features}, k={self.k})"
        return RandomDictionaryExplanation(fit_dictionary(name, atoms, bias, encoder, outputs, signed=True), self.seed)
