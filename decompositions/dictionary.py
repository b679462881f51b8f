"""Sparse dictionaries: the receiver's side that all of them share, and the sender's quantisation.

    prediction = s_t * (sum_i q_ti * step_i * atom_i + bias) + m_t

with integers q that are zero for most features; s_t and m_t are side information of tokens, which only dictionaries
that normalise every token need, and which is charged as state. The encoder is the sender's tool and is not sent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import scipy.sparse

from mdl.alphabets import Alphabet, DenseAlphabet, JoinedAlphabet, SparseAlphabet
from mdl.errors import ExplanationError, MessageError
from mdl.message import LARGEST_EXPONENT, STEPS_PER_OCTAVE, QuantisedArray, Section, step_exponent
from mdl.protocols import Inputs, Sample, Settings
from mdl.state import DenseState, JoinedState, SparseState, State
from mdl.static_rows import metric_rows, predict_columns

KIND = "dictionary"
NO_SIDE, SCALE, SCALE_AND_MEAN = 0, 1, 2  # what a token's side information is
VALUE_CLASSES = 16
MAX_SIDE_STEP = 1.0  # octaves for the scale: a coarser step would be of no use to any sender
REMEMBERED = 8  # samples whose activations are kept: several views of fit, tuning and held-out data
KNOBS: Mapping[str, Sequence[float]] = {
    "static": (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0),
    "value": (0.5, 1.0, 2.0, 3.0, 4.5, 7.0, 10.0, 14.0, 20.0, 28.0, 40.0),
}


def support_of(state: State) -> SparseState:
    """The sparse symbols of a dictionary's state, with or without side information."""
    first = state.streams[0] if isinstance(state, JoinedState) else state
    assert isinstance(first, SparseState)
    return first


@dataclass(frozen=True)
class DictionaryDecoder:
    """The receiver's side: decoded rows, a bias, and for each feature the step and the class of its values.

    **Arguments:** `atoms` [F, d], `bias` [d], `value_steps` [F]: float32; `classes` [F]: integers, features of like
    scale share one adaptive code of values; `signed`: whether values can be negative; `side`: NO_SIDE, SCALE or
    SCALE_AND_MEAN; `side_steps` (2): the step of a token's log2 scale in octaves, and that of its mean.
    """

    atoms: np.ndarray
    bias: np.ndarray
    value_steps: np.ndarray
    classes: np.ndarray
    signed: bool
    side: int
    side_steps: tuple[float, float]

    @classmethod
    def from_section(cls, section: Section) -> DictionaryDecoder:
        """Rebuild from a section: header (bias [1, d], flags [1, 4]); parts (atoms [F, d], exponents, classes [F, 1]).

        **Raises:** `MessageError` if the arrays do not fit together.
        """
        if len(section.header) != 2 or len(section.parts) != 3:
            counts = f"{len(section.header)} header and {len(section.parts)} part arrays"
            raise MessageError(f"a dictionary section has 2 header and 3 part arrays; this one has {counts}")
        return build_decoder(section, section.parts[0].values(), *section.parts[1:])

    @property
    def alphabet(self) -> Alphabet:
        """Features and their values; side information after them, if tokens need it."""
        sparse = SparseAlphabet(self.classes, self.signed)
        return sparse if self.side == NO_SIDE else JoinedAlphabet((sparse, DenseAlphabet(self.side, parts=False)))

    def predict(self, inputs: Inputs, state: State) -> np.ndarray:
        """The region's outputs at the scored positions, float32 [n, d]."""
        output = np.asarray(self._values(state) @ self.atoms, np.float32) + self.bias
        if not isinstance(state, JoinedState):
            return output
        scale, mean = self.side_values(_side_symbols(state))
        return output * scale[:, None] + mean[:, None]

    def _values(self, state: State) -> scipy.sparse.csr_array:
        symbols = support_of(state).matrix().astype(np.float32)
        return symbols.multiply(self.value_steps[None, :]).tocsr().astype(np.float32)

    def terms(self, state: State) -> tuple[scipy.sparse.csr_array, np.ndarray]:
        """Coefficients [n, F], times the token's scale where it has one, and atoms [F, d]."""
        values = self._values(state)
        if isinstance(state, JoinedState):
            values = values.multiply(self.side_values(_side_symbols(state))[0][:, None]).tocsr()
        return values, self.atoms

    def side_values(self, symbols: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scale and mean of each token, float32 [n], from side symbols [n, 1 or 2]."""
        scale = np.exp2(symbols[:, 0] * self.side_steps[0]).astype(np.float32)
        if self.side == SCALE:
            return scale, np.zeros_like(scale)
        return scale, (symbols[:, 1] * self.side_steps[1]).astype(np.float32)

    def touched(self, inputs: Inputs, state: State) -> scipy.sparse.csr_array:
        """The features that are on, [n, F]."""
        return support_of(state).touched()

    def flops_per_token(self, inputs: Inputs, state: State) -> float:
        """2 d for each active feature, and 2 d more for a token's scale and mean."""
        active = len(support_of(state).values) / max(state.n_tokens, 1)
        return 2.0 * self.atoms.shape[1] * (active + (self.side != NO_SIDE))


def _side_symbols(state: JoinedState) -> np.ndarray:
    side = state.streams[1]
    assert isinstance(side, DenseState)
    return side.values


def build_decoder(
    section: Section, atoms: np.ndarray, exponents: QuantisedArray, classes: QuantisedArray
) -> DictionaryDecoder:
    """The decoder for atoms that are already rebuilt. **Raises:** `MessageError` if the arrays do not fit together."""
    limit = LARGEST_EXPONENT
    bias, flags = section.header[0].values(), section.header[1].integers("a dictionary's flags", -limit, limit, 4)
    if bias.shape != (1, atoms.shape[1]) or flags.shape != (1, 4):
        raise MessageError(f"atoms {atoms.shape} need a bias [1, d] and flags [1, 4], not {bias.shape}, {flags.shape}")
    if len(exponents.symbols) != len(atoms) or len(classes.symbols) != len(atoms):
        lengths = f"{len(exponents.symbols)} and {len(classes.symbols)}"
        raise MessageError(f"{len(atoms)} atoms need as many exponents and classes; they are {lengths}")
    signed, side, scale_exponent, mean_exponent = (int(v) for v in flags[0])
    if signed not in (0, 1) or side not in (NO_SIDE, SCALE, SCALE_AND_MEAN):
        raise MessageError(f"dictionary flags signed={signed}, side={side}: this version knows 0-1 and 0-2")
    labels = classes.integers("a dictionary's array of value classes", 0, VALUE_CLASSES - 1, 1)[:, 0]
    octaves = exponents.integers("a dictionary's array of value steps", -limit, limit, 1)[:, 0] / STEPS_PER_OCTAVE
    steps = np.exp2(octaves).astype(np.float32)
    side_steps = (2.0 ** (scale_exponent / STEPS_PER_OCTAVE), 2.0 ** (mean_exponent / STEPS_PER_OCTAVE))
    return DictionaryDecoder(atoms, bias[0], steps, labels, bool(signed), side, side_steps)


@dataclass(frozen=True)
class FeatureStatistics:
    """What fit data says of each feature, [F]: `frequency` of use, `energy` E[(s a)^2] a token, `mean` |a| when on.

    `scale`: root mean square of the tokens' scale s, 1 without side information.
    """

    frequency: np.ndarray
    energy: np.ndarray
    mean: np.ndarray
    scale: float = 1.0


def token_side(outputs: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale and mean of each token [n] as sae-lens takes them: |x|/sqrt(d), or the unbiased std and the mean."""
    if side == SCALE:
        scale = np.linalg.norm(outputs, axis=1) / np.sqrt(outputs.shape[1])
        return np.maximum(scale, 1e-12), np.zeros(len(outputs))
    return np.maximum(outputs.std(1, ddof=1), 1e-12), outputs.mean(1)


def feature_statistics(activations: scipy.sparse.csr_array, outputs: np.ndarray, side: int) -> FeatureStatistics:
    """Measure the features on fit data, activations [n, F] and outputs [n, d]."""
    tokens = max(activations.shape[0], 1)
    on = np.asarray((activations != 0).sum(0)).ravel().astype(np.float64)
    mean = np.asarray(abs(activations).sum(0)).ravel() / np.maximum(on, 1)
    scale = token_side(outputs, side)[0] if side else np.ones(activations.shape[0])
    scaled = activations.multiply(scale[:, None]).tocsr()
    energy = np.asarray(scaled.multiply(scaled).sum(0)).ravel() / tokens
    size = float(np.sqrt(np.mean(scale**2))) if len(scale) else 1.0
    return FeatureStatistics(on / tokens, energy, mean, size)


def value_exponents(atoms: np.ndarray, statistics: FeatureStatistics, settings: Settings) -> np.ndarray:
    """Exponent e_i of each feature's value step 2^(e_i/4): that whose error moves the output by one step of the metric,
    times the knob `value`."""
    gain = np.linalg.norm(atoms @ settings.root.T, axis=1) * statistics.scale
    return step_exponent(settings.knobs.get("value", 1.0) * settings.step / np.maximum(gain, 1e-12))


def value_classes(statistics: FeatureStatistics, exponents: np.ndarray) -> np.ndarray:
    """Half an octave of the mean magnitude of the symbols when on is a class, 0 .. 15."""
    magnitude = statistics.mean / np.exp2(exponents / STEPS_PER_OCTAVE)
    return np.clip(np.round(2 * np.log2(np.maximum(magnitude, 1e-12))), 0, VALUE_CLASSES - 1).astype(np.int64)


def header_arrays(bias: np.ndarray, signed: bool, side: int, settings: Settings) -> tuple[QuantisedArray, ...]:
    """Bias and flags. A token's scale and mean are coefficients too: of the bias, and of the direction of all ones."""
    gain = np.linalg.norm(settings.root @ bias) * np.log(2.0)
    scale = min(settings.step / max(gain, 1e-12), MAX_SIDE_STEP)
    mean = settings.step / max(float(np.linalg.norm(settings.root.sum(1))), 1e-12)
    exponents = step_exponent(np.array([scale, mean])) * (side != NO_SIDE)
    flags = np.array([[int(signed), side, *exponents]])
    return QuantisedArray.from_values(bias, settings.static_step(np.ones(1))), QuantisedArray.from_integers(flags)


def quantise(decoder: DictionaryDecoder, activations: scipy.sparse.csr_array, outputs: np.ndarray) -> State:
    """State symbols for activations [n, F] of the decoder's own features.

    q = rint(a / step); zeros leave the support, as do features whose decoded atom is zero. Values make good what the
    rounding of a token's scale does to them.
    """
    side = None
    if decoder.side != NO_SIDE:
        scale, mean = token_side(outputs, decoder.side)
        columns = [np.rint(np.log2(scale) / decoder.side_steps[0]), np.rint(mean / decoder.side_steps[1])]
        side = np.stack(columns[: decoder.side], 1).astype(np.int64)
        activations = activations.multiply((scale / decoder.side_values(side)[0])[:, None]).tocsr()
    live = np.any(decoder.atoms != 0, axis=1) / decoder.value_steps
    symbols = scipy.sparse.csr_array(activations.multiply(live[None, :]))
    symbols.data = np.rint(symbols.data)
    sparse = SparseState.from_matrix(symbols, decoder.classes, decoder.signed)
    return sparse if side is None else JoinedState((sparse, DenseState(side, parts=False)))


@dataclass(frozen=True)
class Remembered:
    """An encoder that keeps its latest results, by the content of what it was given.

    A scorer encodes the same samples at many settings; activations do not depend on them.
    """

    encoder: Callable[[np.ndarray], scipy.sparse.csr_array]
    results: dict[bytes, scipy.sparse.csr_array] = field(default_factory=dict, repr=False)

    def __call__(self, outputs: np.ndarray) -> scipy.sparse.csr_array:
        key = hashlib.blake2b(np.ascontiguousarray(outputs).data, digest_size=16).digest() + str(outputs.shape).encode()
        if key not in self.results:
            while len(self.results) >= REMEMBERED:
                del self.results[next(iter(self.results))]
            self.results[key] = self.encoder(outputs)
        return self.results[key]


@dataclass(frozen=True)
class DictionaryExplanation:
    """The sender's side of a dictionary whose atoms are sent.

    **Arguments:** `atoms` [F, d], `bias` [d]; `activations`: the encoder, outputs [n, d] to real values [n, F];
    `statistics`: of the features on fit data; `signed`: whether an activation can be negative; `side`: what side
    information tokens need; `notes`: what a reader of the score has to know.
    """

    name: str
    atoms: np.ndarray
    bias: np.ndarray
    activations: Callable[[np.ndarray], scipy.sparse.csr_array]
    statistics: FeatureStatistics
    signed: bool = False
    side: int = NO_SIDE
    notes: tuple[str, ...] = ()
    kind: str = KIND
    knobs: Mapping[str, Sequence[float]] = field(default_factory=lambda: dict(KNOBS))
    # The latest settings met, with what is sent under them: section and encode ask for it in turn.
    rounded: dict[int, tuple[Settings, np.ndarray, QuantisedArray]] = field(
        default_factory=dict, compare=False, repr=False
    )

    def section(self, settings: Settings) -> Section:
        """Bias, and for every feature in use its atom, value step and class."""
        kept, atoms = self.kept(settings)
        exponents = value_exponents(self.atoms, self.statistics, settings)
        classes = value_classes(self.statistics, exponents)
        parts = (atoms, QuantisedArray.from_integers(exponents[kept]), QuantisedArray.from_integers(classes[kept]))
        return Section(self.kind, header_arrays(self.bias, self.signed, self.side, settings), parts)

    def kept(self, settings: Settings) -> tuple[np.ndarray, QuantisedArray]:
        """The features that are sent, and their rounded atoms.

        A feature that fit data never uses, or whose atom rounds to zero, is not sent.
        """
        known = self.rounded.get(id(settings))
        if known is None or known[0] is not settings:
            self.rounded.clear()
            used = np.flatnonzero(self.statistics.frequency > 0)
            atoms = metric_rows(
                self.atoms[used],
                self.statistics.energy[used],
                settings,
                self.prediction,
                self.statistics.frequency[used],
            )
            sent = np.flatnonzero(np.any(atoms.symbols, axis=1))
            self.rounded[id(settings)] = (settings, used[sent], atoms.rows(sent))
        return self.rounded[id(settings)][1:]

    @cached_property
    def prediction(self) -> np.ndarray | None:
        """Of columns from those before them; it does not depend on the settings."""
        return predict_columns(self.atoms[self.statistics.frequency > 0])

    def encode(self, decoder: DictionaryDecoder, sample: Sample, settings: Settings) -> State:
        """The state symbols of a sample, under the decoder that came out of the message."""
        activations = self.activations(sample.outputs)
        return quantise(decoder, activations[:, self.kept(settings)[0]], sample.outputs)


def fit_dictionary(
    name: str,
    atoms: np.ndarray,
    bias: np.ndarray,
    activations: Callable[[np.ndarray], scipy.sparse.csr_array],
    outputs: np.ndarray,
    signed: bool = False,
    side: int = NO_SIDE,
    notes: tuple[str, ...] = (),
) -> DictionaryExplanation:
    """An explanation from a dictionary and its encoder, its features measured on fit data `outputs` [n, d].

    **Raises:** `ExplanationError` if no feature is ever used.
    """
    encoder = Remembered(activations)
    found = encoder(outputs)
    if found.nnz == 0:
        raise ExplanationError(
            f"{name}: none of {found.shape[1]} features is on for any of {len(outputs)} tokens. The dictionary was "
            "probably made for activations of another site, model or scale."
        )
    statistics = feature_statistics(found, outputs, side)
    return DictionaryExplanation(name, atoms, bias, encoder, statistics, signed, side, notes)
