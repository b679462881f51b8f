"""What the benchmark codes: synthetic integers, and symbols of the embedded model's explanations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from decompositions.dictionary import DictionaryDecoder
from decompositions.sae import SAE
from mdl.codes import AdaptiveInteger, BitReader, BitWriter, IntroductionCode
from mdl.codes.arrays import read_shortest, write_shortest
from mdl.data import Sizes, embedded_text
from mdl.message import Section, decode_message, encode_message
from mdl.protocols import Settings
from mdl.score import embedded_model, embedded_saes
from mdl.state import DenseState, SparseState
from mdl.task import Task, build_task
from mdl.transform_coding import TransformCoder, moments, principal_axes

REGION = "upstream of blocks.2.hook_resid_pre"
SAE_NAME, RANK = "topk-16x", 24
STEP, HORIZON = 0.5, 1e6  # Euclidean: a step of half a unit of the residual stream; one million tokens
KNOBS: Mapping[str, float] = {
    "static": 8.0,
    "value": 2.0,
}  # coarser, as what a residual coder mends may be


@dataclass(frozen=True)
class Coded:
    """An array and our code for it.

    `values`: the symbols as an integer array, what other compressors get; `symbols`: how many are counted; `write`
    gives the bytes and their information in bits; `read` the symbols again, to be equal to `values`.
    """

    name: str
    code: str
    values: np.ndarray
    symbols: int
    write: Callable[[], tuple[bytes, float]]
    read: Callable[[bytes], np.ndarray]


def in_stream(write: Callable[[BitWriter], object]) -> tuple[bytes, float]:
    writer = BitWriter()
    write(writer)
    return writer.to_bytes(), writer.information_bits


def menu(name: str, values: np.ndarray) -> Coded:
    """A vector under the shortest code of the messages' menu."""
    flat = values.ravel()
    return Coded(
        name,
        "menu of messages",
        values,
        flat.size,
        lambda: in_stream(lambda writer: write_shortest(writer, flat)),
        lambda data: read_shortest(BitReader(data), flat.size).reshape(values.shape),
    )


def synthetic(size: int) -> list[Coded]:
    """Integers of the two families; Gaussian of scale 10 and Laplace of scale 7."""
    rng = np.random.default_rng(0)
    gaussian = np.rint(10.0 * rng.normal(size=size)).astype(np.int64)
    laplace = np.rint(7.0 * rng.laplace(size=size)).astype(np.int64)
    return [menu("Gaussian integers, scale 10", gaussian), menu("Laplace integers, scale 7", laplace)]


def message_of(name: str, section: Section) -> Coded:
    """A whole message; the symbols counted are those of its largest array."""
    largest = max((*section.header, *section.parts), key=lambda array: array.symbols.size).symbols

    def write() -> tuple[bytes, float]:
        message = encode_message([section])
        return message.data, message.information_bits

    def read(data: bytes) -> np.ndarray:
        received = decode_message(data)[0]
        return max((*received.header, *received.parts), key=lambda array: array.symbols.size).symbols

    return Coded(name, "whole message", largest, largest.size, write, read)


def coefficients(name: str, state: DenseState) -> Coded:
    """Quantised coefficients under the adaptive code, a class for each axis."""
    width = state.values.shape[1]
    return Coded(
        name,
        "adaptive integer",
        state.values,
        state.values.size,
        lambda: in_stream(state.write),
        lambda data: DenseState.read(BitReader(data), state.n_tokens, width).values,
    )


def supports(name: str, state: SparseState) -> Coded:
    """Which features are on, numbered by first use; the other compressors get the numbers, token after token."""
    pairs = (state.tokens, state.features)

    def read(data: bytes) -> np.ndarray:
        tokens, ranks = IntroductionCode().read(BitReader(data), state.n_tokens)
        assert np.array_equal(tokens, state.tokens)
        return ranks

    def write() -> tuple[bytes, float]:
        return in_stream(lambda writer: IntroductionCode().write(writer, pairs, state.n_tokens))

    return Coded(name, "introduction + Bernoulli (KT)", state.features, state.features.size, write, read)


def sparse_values(name: str, state: SparseState) -> Coded:
    """The non-zero values of features, under the adaptive code by the feature's class."""
    code, classes = AdaptiveInteger(signed=state.signed, with_zero=False), state.classes[state.features]
    groups = int(state.classes.max()) + 1
    return Coded(
        name,
        "adaptive integer",
        state.values,
        state.values.size,
        lambda: in_stream(lambda writer: code.write(writer, state.values, classes, groups)),
        lambda data: code.read(BitReader(data), classes, groups),
    )


def embedded(sequences: int) -> list[Coded]:
    """Dictionary rows, supports and values of the embedded SAE; PCA axes and coefficients; on so many sequences."""
    model = embedded_model()
    data = embedded_text(model.tokenizer, 256, Sizes(fit=64, tune=2, held_out=sequences), 0)
    task = build_task(model, REGION, data, lambda *_: None)
    settings = Settings(HORIZON, STEP, np.eye(task.width), KNOBS)
    return [*_sae(task, settings), *_pca(task, settings)]


def _sae(task: Task, settings: Settings) -> list[Coded]:
    path = next(p for p in embedded_saes() if p.name == SAE_NAME)
    explanation = SAE(path=str(path)).fit(task.for_fitting())
    section = explanation.section(settings)
    state = explanation.encode(DictionaryDecoder.from_section(section), task.held_out.sample(), settings)
    state = by_first_use(state)
    return [
        message_of(f"dictionary rows of {SAE_NAME}", section),
        supports(f"supports of {SAE_NAME}", state),
        sparse_values(f"values of {SAE_NAME}", state),
    ]


def by_first_use(state: SparseState) -> SparseState:
    """Features numbered as the receiver numbers them: by first use, and at one token by the sender's order."""
    features = state.features
    distinct, first = np.unique(features, return_index=True)
    rest = np.setdiff1d(np.arange(state.n_parts), distinct)
    return state.reordered(np.concatenate([distinct[np.argsort(first)], rest]))


def _pca(task: Task, settings: Settings) -> list[Coded]:
    outputs = task.fit.outputs
    axes = principal_axes(*moments(outputs), settings.root).first(RANK)
    coder = TransformCoder.fit(axes, outputs, settings.step)
    state = coder.encode(task.held_out.sample().outputs)
    whole = TransformCoder.fit(principal_axes(*moments(outputs), settings.root), outputs, settings.step)
    return [
        coefficients(f"PCA coefficients, rank {RANK}", state),
        message_of("PCA axes, all of them", whole.section(settings)),
    ]
