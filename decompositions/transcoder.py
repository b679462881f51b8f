"""Dictionaries whose codes are made of other activations than those they predict: transcoders, with and without skip.

    prediction = sum_i q_ti * step_i * atom_i + bias + x_t @ skip

The codes are computed by the sender and sent as state. x are the region's inputs, which the receiver knows; `skip` is a
dense matrix, sent once and whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import scipy.sparse

from decompositions.dictionary import KNOBS, DictionaryDecoder, DictionaryExplanation, quantise
from mdl.alphabets import Alphabet
from mdl.errors import MessageError
from mdl.message import Section
from mdl.protocols import Inputs, Sample, Settings
from mdl.state import State
from mdl.static_rows import metric_rows, predict_columns

KIND = "skip-dictionary"


@dataclass(frozen=True)
class SkipDictionaryDecoder:
    """A dictionary, plus a linear map of the region's inputs: `skip` [d_in, d]."""

    dictionary: DictionaryDecoder
    skip: np.ndarray

    @classmethod
    def from_section(cls, section: Section) -> SkipDictionaryDecoder:
        """As a dictionary's, with a third header array (skip [d_in, d]).

        **Raises:** `MessageError` if the arrays do not fit together.
        """
        if len(section.header) != 3:
            raise MessageError(f"a 'skip-dictionary' section has 3 header arrays; this one has {len(section.header)}")
        dictionary = DictionaryDecoder.from_section(Section(section.kind, section.header[:2], section.parts))
        skip = section.header[2].values()
        if skip.ndim != 2 or skip.shape[1] != len(dictionary.bias):
            raise MessageError(f"'skip-dictionary': a matrix {skip.shape} for outputs of {len(dictionary.bias)}")
        return cls(dictionary, skip)

    @property
    def alphabet(self) -> Alphabet:
        return self.dictionary.alphabet

    def predict(self, inputs: Inputs, state: State) -> np.ndarray:
        """The region's outputs at the scored positions, float32 [n, d]."""
        linear = inputs.scored_values().astype(np.float32) @ self.skip
        return (self.dictionary.predict(inputs, state) + linear).astype(np.float32)

    def touched(self, inputs: Inputs, state: State) -> scipy.sparse.csr_array:
        """The features that are on, [n, F]; the matrix belongs to the header."""
        return self.dictionary.touched(inputs, state)

    def flops_per_token(self, inputs: Inputs, state: State) -> float:
        return self.dictionary.flops_per_token(inputs, state) + 2.0 * self.skip.size


@dataclass(frozen=True)
class SkipPath:
    """The sender's side of the linear map: `matrix` [d_in, d], and `energy` [d_in] = E[x_i^2] on fit data."""

    matrix: np.ndarray
    energy: np.ndarray

    @classmethod
    def of(cls, matrix: np.ndarray, inputs: np.ndarray) -> SkipPath:
        """A map, and what it is applied to, [n, d_in]."""
        return cls(matrix.astype(np.float64), np.square(inputs, dtype=np.float64).mean(0))

    @cached_property
    def prediction(self) -> np.ndarray | None:
        """Of columns from those before them; it does not depend on the settings."""
        return predict_columns(self.matrix)


@dataclass(frozen=True)
class TranscoderExplanation:
    """The sender's side: a dictionary whose activations are a function of what `reads` gives for a sample."""

    dictionary: DictionaryExplanation
    reads: Callable[[Sample], np.ndarray] = field(repr=False)
    skip: SkipPath | None = None
    knobs: Mapping[str, Sequence[float]] = field(default_factory=lambda: dict(KNOBS))

    @property
    def name(self) -> str:
        return self.dictionary.name

    @property
    def notes(self) -> tuple[str, ...]:
        return self.dictionary.notes

    @property
    def kind(self) -> str:
        return self.dictionary.kind if self.skip is None else KIND

    def section(self, settings: Settings) -> Section:
        """The dictionary's, with the skip path's matrix as a header array behind its own."""
        section = self.dictionary.section(settings)
        if self.skip is None:
            return section
        matrix = metric_rows(self.skip.matrix, self.skip.energy, settings, self.skip.prediction)
        return Section(KIND, (*section.header, matrix), section.parts)

    def encode(self, decoder: DictionaryDecoder | SkipDictionaryDecoder, sample: Sample, settings: Settings) -> State:
        """The state symbols of a sample, under the decoder that came out of the message."""
        rows = decoder.dictionary if isinstance(decoder, SkipDictionaryDecoder) else decoder
        activations = self.dictionary.activations(self.reads(sample))
        return quantise(rows, activations[:, self.dictionary.kept(settings)[0]], sample.outputs)


@dataclass(frozen=True)
class Remainder:
    """What a skip path leaves of the outputs, for pursuit to make up."""

    matrix: np.ndarray

    def __call__(self, sample: Sample) -> np.ndarray:
        """[n, d]."""
        return np.asarray(sample.outputs - sample.inputs.scored_values() @ self.matrix, np.float32)
