"""Small real messages of every kind that is shipped, out of the senders themselves."""

from __future__ import annotations

from operator import attrgetter

import numpy as np
import scipy.sparse

from decompositions.baselines import AffineExplanation, ConstantExplanation, TableExplanation
from decompositions.block_sparse import BlockSparseExplanation
from decompositions.circuits.decoder import SUBSPACE
from decompositions.clusters import ClustersExplanation
from decompositions.dictionary import (
    NO_SIDE,
    SCALE_AND_MEAN,
    DictionaryExplanation,
    Remembered,
    feature_statistics,
    fit_dictionary,
)
from decompositions.predictor import PredictorExplanation
from decompositions.random_dictionary import RandomDictionaryExplanation, random_directions
from decompositions.sent_transcoder import Encoder, SentTranscoderExplanation
from decompositions.sums import SumExplanation
from decompositions.token_pairs import SPAN, TokenPairsExplanation
from decompositions.transcoder import SkipPath, TranscoderExplanation
from decompositions.weights.gated import INDICES, PROGRAM, Layout
from mdl.message import QuantisedArray, Section
from mdl.protocols import Inputs, Sample, Settings
from mdl.static_rows import metric_rows, predict_columns
from mdl.transform_coding import TransformCoder, moments, principal_axes
from tests.program.conftest import dictionary_program, table_program

WIDTH, TOKENS = 4, 64


def settings(horizon: float) -> Settings:
    return Settings(horizon, 0.2, np.eye(WIDTH))


def outputs() -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.normal(size=(TOKENS, WIDTH)) * [3.0, 1.0, 0.5, 0.2] + 0.3).astype(np.float32)


def dictionary(atoms: np.ndarray, side: int, signed: bool) -> DictionaryExplanation:
    def encode(values: np.ndarray) -> scipy.sparse.csr_array:
        overlap = values @ atoms.T
        return scipy.sparse.csr_array(overlap * (np.abs(overlap) > 1.0) if signed else np.maximum(overlap - 1.0, 0.0))

    return fit_dictionary("dictionary", atoms, np.full(WIDTH, 0.3, np.float32), encode, outputs(), signed, side)


def components(horizon: float) -> Section:
    values, chosen = outputs(), settings(horizon)
    return TransformCoder.fit(principal_axes(*moments(values), chosen.root), values, chosen.step).section(chosen)


def predictor() -> PredictorExplanation:
    inputs = Inputs(np.zeros((4, TOKENS // 4), np.int64), np.ones((4, TOKENS // 4), bool))
    mean = outputs().mean(0, dtype=np.float64)
    return PredictorExplanation(mean, 0.5 * np.eye(WIDTH), Sample(inputs, outputs()), 1e-3)


def block_sparse() -> BlockSparseExplanation:
    """Five groups of two rows, of which every token takes two."""
    rng = np.random.default_rng(4)

    def groups_of(values: np.ndarray) -> scipy.sparse.csr_array:
        chosen = np.stack([np.arange(len(values)) % 3, 3 + np.arange(len(values)) % 2], 1)
        ends = 2 * np.arange(len(values) + 1)
        return scipy.sparse.csr_array((np.ones(chosen.size), chosen.ravel(), ends), shape=(len(values), 5))

    decoder, bias = rng.normal(size=(5, 2, WIDTH)), np.full(WIDTH, 0.3, np.float32)
    return BlockSparseExplanation(decoder, bias, 2, Remembered(groups_of), outputs(), "block-sparse")


def transcoder(skip: bool) -> SentTranscoderExplanation:
    """Ten features, run on the outputs in place of inputs."""
    rng, values = np.random.default_rng(5), outputs()
    encoder = Encoder(rng.normal(size=(10, WIDTH + 1)), 0.3 * rng.random(10) if skip else np.zeros(1))
    atoms, x = rng.normal(size=(10, WIDTH)), encoder.extended(values)
    statistics = feature_statistics(encoder.activations(values), values, NO_SIDE)
    path = SkipPath.of(np.eye(WIDTH), values) if skip else None
    return SentTranscoderExplanation("sent", encoder, atoms, values.mean(0), statistics, x.T @ x / TOKENS, path)


def explanations(horizon: float) -> list[Section]:
    """One section of every kind, as precise as the horizon asks."""
    rng, chosen = np.random.default_rng(1), settings(horizon)
    mean = outputs().mean(0, dtype=np.float64)
    share = np.array([0.5, 0.25, 0.15, 0.05, 0.04, 0.01])
    ids = np.array([1, 2, 5, 17, 300, 50_000])
    atoms = random_directions(7, 10, WIDTH)
    table = TableExplanation(mean, ids, rng.normal(size=(6, WIDTH)), share)
    keys = np.array([1, 1, 2, 17, 17, 300]) * SPAN + np.array([0, 4, 0, 2, 90, 1])
    senders = [
        ConstantExplanation(mean),
        table,
        AffineExplanation(rng.normal(size=(3, WIDTH)), mean, np.array([4.0, 1.0, 0.1])),
        ClustersExplanation(rng.normal(size=(6, WIDTH)), share, "clusters"),
        dictionary(atoms, NO_SIDE, signed=False),
        dictionary(atoms, SCALE_AND_MEAN, signed=True),
        RandomDictionaryExplanation(dictionary(atoms, NO_SIDE, signed=True), 7),
        TranscoderExplanation(
            dictionary(atoms, NO_SIDE, signed=False), attrgetter("outputs"), SkipPath.of(np.eye(WIDTH), outputs())
        ),
        TokenPairsExplanation(mean, keys, 3 * rng.normal(size=(6, WIDTH)), share),
        SumExplanation(table, dictionary(atoms, NO_SIDE, signed=False), "sum"),
        predictor(),
        block_sparse(),
        transcoder(skip=True),
        transcoder(skip=False),
    ]
    sections = [sender.section(chosen) for sender in senders]
    programs = [table_program(sections[1]), dictionary_program(sections[4])]
    return [
        components(horizon),
        *sections,
        weights(horizon),
        parts(horizon, gated=False),
        parts(horizon, gated=True),
        circuit(horizon),
        clock(horizon),
        waves(horizon),
        sparse(),
        *programs,
    ]


def rounded(rng: np.random.Generator, horizon: float, *shape: int) -> QuantisedArray:
    return QuantisedArray.from_values(rng.normal(size=shape), 1.0 / np.sqrt(horizon))


def weights(horizon: float) -> Section:
    """A matrix as it is, one as a product of two, and a bias."""
    rng = np.random.default_rng(6)
    arrays = [rounded(rng, horizon, *shape) for shape in ((4, 3), (3, 2), (2, 4), (1, 4))]
    return Section("weights", (QuantisedArray.from_integers(np.array([[0, 2]])), *arrays))


def parts(horizon: float, gated: bool) -> Section:
    """Five components of one matrix [4, 3], which has a rest and a bias; with gates of two hidden units, or lists."""
    rng = np.random.default_rng(7)
    gates = [rounded(rng, horizon, *shape) for shape in ((5, 4), (5, 2), (5, 2), (5, 2), (5, 1))] if gated else []
    layout = Layout(PROGRAM if gated else INDICES, 5, np.array([[1, 1, 0]]))
    header = (layout.integers(), rounded(rng, horizon, 4, 3), *gates, rounded(rng, horizon, 1, 3))
    return Section("parts", header, (rounded(rng, horizon, 5, 3 if gated else 7),))


def circuit(horizon: float) -> Section:
    """A mode, three bytes of edges, two blocks of weights."""
    rng = np.random.default_rng(8)
    head = (
        QuantisedArray.from_integers(np.array([[SUBSPACE]])),
        QuantisedArray.from_integers(np.array([[256, 300, 511]])),
    )
    return Section("circuit", (*head, rounded(rng, horizon, 4, 3), rounded(rng, horizon, 1, 3)))


def clock(horizon: float) -> Section:
    """Three frequencies modulo 11."""
    return Section("fourier", (*frequencies(), rounded(np.random.default_rng(9), horizon, 1, 3)))


def waves(horizon: float) -> Section:
    """The same frequencies of an embedding and an unembedding of width 4, a token more, and two other matrices."""
    rng = np.random.default_rng(10)
    arrays = (rounded(rng, horizon, *shape) for shape in ((7, 4), (1, 4), (4, 7), (4, 3), (3, 4)))
    return Section("fourier-weights", (*frequencies(), *arrays))


def frequencies() -> tuple[QuantisedArray, QuantisedArray]:
    return QuantisedArray.from_integers(np.array([[11]])), QuantisedArray.from_integers(np.array([[1, 3, 1]]))


def sparse() -> Section:
    """Eight bytes of a stream, bit by bit."""
    return Section("sparse", (QuantisedArray.from_integers(np.random.default_rng(9).integers(0, 2, (1, 64))),))


def lattices() -> list[Section]:
    """Rows on lattices, columns predicted and not: enough rows that sender and receiver take to them."""
    rng = np.random.default_rng(3)
    chosen = settings(1e3)
    many = rng.normal(size=(60, WIDTH)) @ rng.normal(size=(WIDTH, WIDTH))
    share, ids = np.full(60, 1 / 60), np.arange(60)
    table = TableExplanation(outputs().mean(0, dtype=np.float64), ids, many, share).section(chosen)
    predicted = metric_rows(many, share, chosen, predict_columns(many))
    plain = metric_rows(rng.normal(size=(20, 8)), rng.random(20), Settings(1e3, 0.2, np.eye(8)))
    found = [
        table,
        Section("clusters", (), (predicted,)),
        Section("clusters", (), (plain,)),
        dictionary(random_directions(7, 24, WIDTH), NO_SIDE, signed=False).section(chosen),
    ]
    rows = [max(section.parts, key=lambda array: array.symbols.size) for section in found]
    assert all(array.lattice is not None for array in rows)
    assert rows[1].lattice is not None
    assert rows[1].lattice.prediction is not None
    return found


def corpus() -> list[list[Section]]:
    """Messages as they are sent: constants of special positions, an explanation, and mostly a residual coder."""
    special = Section("special", (QuantisedArray.from_values(np.ones((1, WIDTH)), 0.01),))
    messages = [[special, section] for section in explanations(1e2)]
    messages += [[special, section, components(1e5)] for section in explanations(1e5)]
    # Arrays long enough for every code of the menu, and steps of several octaves.
    rng = np.random.default_rng(2)
    wide = QuantisedArray.from_values(rng.laplace(size=(60, WIDTH)), np.exp2(rng.integers(-6, 0, 60)))
    outlier = QuantisedArray.from_integers(np.r_[np.arange(40), 1 << 50][None])
    return [
        *messages,
        [],
        [Section("clusters", (), (wide,))],
        [Section("constant", (outlier,), ())],
        *([section] for section in lattices()),
    ]
