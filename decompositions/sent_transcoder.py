"""Transcoders that the receiver runs: encoder and decoder are sent once, and nothing for a token.

    a_f = max(x . w_f + b_f, 0) if x . w_f + b_f > threshold_f, else 0;  prediction = sum_f a_f atom_f + bias + x @ skip

x are the region's inputs. Which features are on is known only after every encoder row has been looked at, so that the
encoder is in the header; an atom is a part, which a token touches where its feature is on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import scipy.sparse

from decompositions.dictionary import KNOBS as DICTIONARY_KNOBS
from decompositions.dictionary import FeatureStatistics
from decompositions.transcoder import SkipPath
from mdl.alphabets import NoAlphabet
from mdl.errors import MessageError
from mdl.message import QuantisedArray, Section
from mdl.protocols import Inputs, Sample, Settings
from mdl.state import NoState, State
from mdl.static_rows import metric_rows, predict_columns

KIND = "transcoder"
AS_IT_IS, NORM, NORM_AND_MEAN = 0, 1, 2  # what is done to an input in front of the encoder
EPSILON = 1e-5  # of sae-lens's layer norm
CHUNK_ELEMENTS = 1 << 22  # pre-activations held densely at a time
RIDGE = 1e-6  # of the inputs' mean square: a LayerNorm leaves a direction empty
KNOBS: Mapping[str, Sequence[float]] = {
    "static": DICTIONARY_KNOBS["static"],
    # A feature at its threshold jumps, and costs in proportion to the error: encoders are wanted finer than atoms.
    "encoder": tuple(2.0**e for e in range(-8, 4)),
}


@dataclass(frozen=True)
class Encoder:
    """Which features are on, and how far: `rows` [F, d_in + 1], the bias last; `thresholds` [F], or one for all.

    A ReLU is a single threshold of 0. `normalisation`: AS_IT_IS; NORM scales each input to the norm sqrt(d_in);
    NORM_AND_MEAN takes its mean off and divides it by its standard deviation.
    """

    rows: np.ndarray
    thresholds: np.ndarray
    normalisation: int = AS_IT_IS

    def extended(self, inputs: np.ndarray) -> np.ndarray:
        """What multiplies the rows: inputs [n, d_in], normalised, and 1; float64 [n, d_in + 1]."""
        x = inputs.astype(np.float64)
        if self.normalisation == NORM:
            x *= np.sqrt(x.shape[1]) / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30)
        elif self.normalisation == NORM_AND_MEAN:
            x -= x.mean(1, keepdims=True)
            x /= x.std(1, ddof=1, keepdims=True) + EPSILON
        return np.concatenate([x, np.ones((len(x), 1))], 1)

    def activations(self, inputs: np.ndarray) -> scipy.sparse.csr_array:
        """[n, F], float64: a feature near its threshold must not depend on the order in which products are added up."""
        size, found = max(1, CHUNK_ELEMENTS // max(len(self.rows), 1)), []
        rows = self.rows.astype(np.float64).T
        for start in range(0, len(inputs), size):
            before = self.extended(inputs[start : start + size]) @ rows
            found.append(scipy.sparse.csr_array(np.maximum(before, 0.0) * (before > self.thresholds)))
        return scipy.sparse.vstack(found, format="csr") if found else scipy.sparse.csr_array((0, len(self.rows)))


@dataclass(frozen=True)
class TranscoderDecoder:
    """The receiver's side: the encoder, `atoms` [F, d], `bias` [d], and `skip` [d_in, d] if there is one; float32."""

    encoder: Encoder
    atoms: np.ndarray
    bias: np.ndarray
    skip: np.ndarray | None = None
    # The latest inputs with their activations: predict, touched and flops_per_token are asked of the same ones.
    known: list[tuple[Inputs, scipy.sparse.csr_array]] = field(default_factory=list, compare=False, repr=False)

    @classmethod
    def from_section(cls, section: Section) -> TranscoderDecoder:
        """Header: bias [1, d], normalisation [1, 1], encoder [F, d_in + 1], thresholds [F, 1] or [1, 1], and skip
        [d_in, d] if there is one. Parts: atoms [F, d].

        **Raises:** `MessageError` if the arrays do not fit together.
        """
        if len(section.header) not in (4, 5) or len(section.parts) != 1:
            counts = f"{len(section.header)} header and {len(section.parts)} part arrays"
            raise MessageError(
                f"a 'transcoder' section has 4 or 5 header arrays and 1 part array; this one has {counts}"
            )
        bias = section.header[0].vector("the bias of a 'transcoder' section")
        what = "the normalisation of a 'transcoder' section"
        normalisation = section.header[1].integers(what, AS_IT_IS, NORM_AND_MEAN, 1)
        rows, thresholds = (array.values() for array in section.header[2:4])
        atoms = section.parts[0].values()
        if len(normalisation) != 1 or atoms.shape[1] != len(bias) or len(rows) != len(atoms) or rows.shape[1] < 2:
            raise MessageError(
                f"'transcoder': encoder rows {rows.shape}, atoms {atoms.shape}, a bias of {len(bias)} and "
                f"{len(normalisation)} normalisations do not fit together"
            )
        if thresholds.shape not in ((1, 1), (len(atoms), 1)):
            raise MessageError(
                f"'transcoder': thresholds {thresholds.shape} for {len(atoms)} features: one, or one each"
            )
        skip = section.header[4].values() if len(section.header) == 5 else None
        if skip is not None and skip.shape != (rows.shape[1] - 1, len(bias)):
            raise MessageError(f"'transcoder': a skip path {skip.shape} from {rows.shape[1] - 1} inputs to {len(bias)}")
        return cls(Encoder(rows, thresholds[:, 0], int(normalisation[0, 0])), atoms, bias, skip)

    @property
    def alphabet(self) -> NoAlphabet:
        return NoAlphabet()

    def _activations(self, inputs: Inputs) -> scipy.sparse.csr_array:
        """[n, F]. **Raises:** `MessageError` for inputs of another width."""
        if not self.known or self.known[0][0] is not inputs:
            x, width = inputs.scored_values(), self.encoder.rows.shape[1] - 1
            if x.shape[1] != width:
                raise MessageError(f"a 'transcoder' of {width} inputs; {x.shape[1]} enter this region")
            self.known[:] = [(inputs, self.encoder.activations(x))]
        return self.known[0][1]

    def predict(self, inputs: Inputs, state: State) -> np.ndarray:
        """The region's outputs at the scored positions, float32 [n, d]."""
        output = self._activations(inputs) @ self.atoms.astype(np.float64) + self.bias
        if self.skip is not None:
            output += inputs.scored_values().astype(np.float64) @ self.skip
        return np.asarray(output, np.float32)

    def touched(self, inputs: Inputs, state: State) -> scipy.sparse.csr_array:
        """The features that are on, [n, F]."""
        return scipy.sparse.csr_array(self._activations(inputs) != 0)

    def flops_per_token(self, inputs: Inputs, state: State) -> float:
        """2 (d_in + 1) for each feature, 2 d for each that is on, and the skip path."""
        active = self._activations(inputs).nnz / max(inputs.n_tokens, 1)
        skip = 0 if self.skip is None else self.skip.size
        return 2.0 * (self.encoder.rows.size + active * self.atoms.shape[1] + skip)


@dataclass(frozen=True)
class SentTranscoderExplanation:
    r"""The sender's side.

    An error e of a feature's encoder row costs $P(on) \, |atom|_G^2 \, E[(e \cdot x)^2]$, so that encoder rows are
    rounded under the second moment of what multiplies them, with the energy $P(on) \, |atom|_G^2$ (the moment over all
    tokens stands for that over those where a feature is on); the knob `encoder` is their precision, `static` that of
    all else.

    **Arguments:** `encoder`: exact; `atoms` [F, d], `bias` [d]; `statistics`: of the features on fit data; `moment`
    [d_in + 1, d_in + 1]: E[x x^T] there of what multiplies the encoder's rows; `skip`: the linear path.
    """

    name: str
    encoder: Encoder
    atoms: np.ndarray
    bias: np.ndarray
    statistics: FeatureStatistics
    moment: np.ndarray
    skip: SkipPath | None = None
    notes: tuple[str, ...] = ()
    kind: str = KIND
    knobs: Mapping[str, Sequence[float]] = field(default_factory=lambda: dict(KNOBS))

    def section(self, settings: Settings) -> Section:
        """Of features that fit data never use, or whose atom rounds to zero, nothing is sent."""
        used = np.flatnonzero(self.statistics.frequency > 0)
        energy, frequency = self.statistics.energy[used], self.statistics.frequency[used]
        atoms = metric_rows(self.atoms[used], energy, settings, self.prediction, frequency)
        sent = np.flatnonzero(np.any(atoms.symbols, axis=1))
        header = [
            QuantisedArray.from_values(self.bias, settings.static_step(np.ones(1))),
            QuantisedArray.from_integers(np.array([[self.encoder.normalisation]])),
            *self._encoder_arrays(used[sent], settings),
        ]
        if self.skip is not None:
            header.append(metric_rows(self.skip.matrix, self.skip.energy, settings, self.skip.prediction))
        return Section(self.kind, tuple(header), (atoms.rows(sent),))

    def _encoder_arrays(self, kept: np.ndarray, settings: Settings) -> tuple[QuantisedArray, QuantisedArray]:
        """Rows and thresholds of the features `kept`."""
        reach = np.square(np.linalg.norm(self.atoms[kept] @ settings.root.T, axis=1))
        energy = self.statistics.frequency[kept] * reach
        own = replace(settings, root=self.root, knobs={"static": settings.knobs.get("encoder", 1.0)})
        rows = metric_rows(self.encoder.rows[kept], energy, own, self.encoder_prediction)
        steps, thresholds = own.metric_step(energy), self.encoder.thresholds
        if len(thresholds) == 1:
            least = steps.min(initial=1.0 if len(steps) == 0 else np.inf)
            return rows, QuantisedArray.from_values(thresholds[:, None], least)
        return rows, QuantisedArray.from_values(thresholds[kept][:, None], steps)

    @cached_property
    def root(self) -> np.ndarray:
        """The square root [d_in + 1, d_in + 1] of the moment."""
        values, vectors = np.linalg.eigh(self.moment)
        floor = RIDGE * float(values.mean())
        return np.asarray(np.sqrt(np.maximum(values, floor))[:, None] * vectors.T)

    @cached_property
    def prediction(self) -> np.ndarray | None:
        """Of an atom's columns from those before them; it does not depend on the settings."""
        return predict_columns(self.atoms[self.statistics.frequency > 0])

    @cached_property
    def encoder_prediction(self) -> np.ndarray | None:
        """The same of encoder rows."""
        return predict_columns(self.encoder.rows[self.statistics.frequency > 0])

    def encode(self, decoder: TranscoderDecoder, sample: Sample, settings: Settings) -> NoState:
        return NoState(sample.inputs.n_tokens)
