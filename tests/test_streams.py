"""State streams under both codes: what is read is what was written, at the stated length, by whichever is shorter."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy.sparse

from mdl.alphabets import Alphabet, DenseAlphabet, IndexAlphabet, JoinedAlphabet, NoAlphabet, SparseAlphabet
from mdl.codes.bitstream import BitReader, BitWriter
from mdl.errors import CodeError, ExplanationError
from mdl.protocols import Inputs
from mdl.state import Context, DenseState, IndexState, JoinedState, NoState, SparseState, State, first_use_order
from mdl.streams import CodedDense, CodedIndex, CodedSparse, choose, typical_magnitudes

SEQUENCES, POSITIONS, IDS, FEATURES = 40, 16, 6, 24
TOKENS = SEQUENCES * POSITIONS
RNG_SEED = 5
SYMBOLS: dict[type, tuple[str, ...]] = {
    NoState: ("n_tokens",),
    DenseState: ("values",),
    SparseState: ("tokens", "features", "values", "classes"),
    IndexState: ("indices",),
}


def known_context(seed: int = RNG_SEED) -> Context:
    tokens = np.random.default_rng(seed).integers(0, IDS, (SEQUENCES, POSITIONS))
    return Inputs(tokens, np.ones_like(tokens, bool)).context()


def sparse(follows_tokens: bool) -> SparseState:
    """Features that token ids decide, with values that they nearly decide; or features that nothing decides."""
    rng, context = np.random.default_rng(1), known_context()
    chance = rng.beta(0.1, 0.4, (IDS, FEATURES))[context.tokens] if follows_tokens else np.full((1, FEATURES), 0.15)
    size = rng.integers(1, 40, (IDS, FEATURES))[context.tokens]
    values = size if follows_tokens else rng.integers(1, 40, size.shape)
    matrix = scipy.sparse.csr_array(np.where(rng.random(size.shape) < chance, values, 0))
    state = SparseState.from_matrix(matrix, rng.integers(0, 9, FEATURES), False)
    return state.reordered(first_use_order(state.touched()))


def dense(follows_tokens: bool) -> DenseState:
    rng, context = np.random.default_rng(2), known_context()
    mean = rng.normal(0, 8, (IDS, 5))[context.tokens] if follows_tokens else 0
    return DenseState(np.rint(mean + rng.normal(0, 2, (TOKENS, 5))).astype(np.int64))


def index(follows_tokens: bool) -> IndexState:
    rng, context = np.random.default_rng(3), known_context()
    noise = rng.random(TOKENS) < 0.2
    chosen = np.where(noise, rng.integers(0, 12, TOKENS), 2 * context.tokens)
    state = IndexState(chosen if follows_tokens else rng.integers(0, 12, TOKENS), 12)
    return state.reordered(first_use_order(state.touched()))


MAKERS: dict[str, Callable[[bool], State]] = {"sparse": sparse, "dense": dense, "index": index}


def alphabet_of(state: State) -> Alphabet:
    if isinstance(state, SparseState):
        return SparseAlphabet(state.classes, state.signed)
    if isinstance(state, DenseState):
        return DenseAlphabet(state.values.shape[1], state.parts)
    if isinstance(state, IndexState):
        return IndexAlphabet(state.n_parts)
    if isinstance(state, JoinedState):
        return JoinedAlphabet(tuple(alphabet_of(s) for s in state.streams))
    return NoAlphabet()


def read_whole(alphabet: Alphabet, data: bytes, context: Context) -> State:
    reader = BitReader(data)
    found = alphabet.read(reader, context)
    reader.finish()
    return found.state


def equal(a: State, b: State) -> bool:
    """Equal symbols, whatever they are."""
    if isinstance(a, JoinedState):
        return all(equal(x, y) for x, y in zip(a.streams, b.streams, strict=True))
    return type(a) is type(b) and all(np.array_equal(getattr(a, n), getattr(b, n)) for n in SYMBOLS[type(a)])


@pytest.mark.parametrize("follows", [True, False], ids=["token ids decide", "nothing decides"])
@pytest.mark.parametrize("kind", MAKERS)
def test_what_is_read_is_what_was_written_at_its_length(kind: str, follows: bool) -> None:
    state, context = MAKERS[kind](follows), known_context()
    coded, writer = choose(state, context), BitWriter()
    coded.write(writer)
    data = writer.to_bytes()
    reader = BitReader(data)
    found = alphabet_of(state).read(reader, context)
    reader.finish()
    assert equal(found.state, state)
    assert found.length.total == pytest.approx(coded.length.total, rel=1e-12)
    assert writer.information_bits == pytest.approx(coded.length.total, rel=1e-6)
    assert abs(8 * len(data) - coded.length.total) <= 64 + 0.001 * coded.length.total
    assert coded.length.per_token.sum() == pytest.approx(coded.length.total, rel=1e-6)


@pytest.mark.parametrize("kind", MAKERS)
def test_token_ids_are_used_where_they_help_and_only_there(kind: str) -> None:
    context = known_context()
    helped, not_helped = (choose(MAKERS[kind](follows), context) for follows in (True, False))
    assert helped.length.total < 0.9 * helped.state.bits()
    flags = 2 if kind == "sparse" else 1
    assert not_helped.length.total <= not_helped.state.bits() + flags
    assert "token ids" in helped.length.code


def test_streams_one_after_the_other() -> None:
    context = known_context()
    state = JoinedState((sparse(True), dense(False)))
    coded, writer = choose(state, context), BitWriter()
    coded.write(writer)
    reader = BitReader(writer.to_bytes())
    found = alphabet_of(state).read(reader, context)
    reader.finish()
    assert equal(found.state, state)
    assert coded.length.total == pytest.approx(sum(choose(s, context).length.total for s in state.streams))


def test_nothing_is_written_for_nothing() -> None:
    context = known_context()
    for state in (NoState(TOKENS), DenseState(np.zeros((TOKENS, 0), np.int64))):
        coded, writer = choose(state, context), BitWriter()
        coded.write(writer)
        assert writer.information_bits == 0 == coded.length.total
        assert equal(alphabet_of(state).read(BitReader(writer.to_bytes()), context).state, state)


def test_parameters_are_taken_from_a_similar_stream() -> None:
    context = known_context()
    first = choose(sparse(True), context)
    again = choose(sparse(True), context, first)
    assert isinstance(first, CodedSparse)
    assert isinstance(again, CodedSparse)
    assert again.support is first.support


@pytest.mark.parametrize("kind", MAKERS)
def test_a_stream_of_another_message_is_refused(kind: str) -> None:
    state, context = MAKERS[kind](True), known_context()
    writer = BitWriter()
    choose(state, context).write(writer)
    narrow: Alphabet = {
        "sparse": SparseAlphabet(np.zeros(2, np.int64), False),
        "index": IndexAlphabet(2),
        "dense": DenseAlphabet(1),
    }[kind]
    with pytest.raises(CodeError, match=r"cut|another|goes on"):
        read_whole(narrow, writer.to_bytes(), context)


def test_magnitudes_of_classes() -> None:
    classes = np.arange(16)
    np.testing.assert_allclose(typical_magnitudes(classes), 2.0 ** (classes / 2), rtol=1e-15)


def test_context_knows_where_sequences_start_and_what_is_not_scored() -> None:
    scored = np.array([[False, True, True], [True, False, True]])
    context = Inputs(np.array([[9, 1, 2], [3, 9, 4]]), scored).context()
    assert context.tokens.tolist() == [1, 2, 3, 4]
    # The position before the last one is not scored: nothing of it was decoded.
    assert context.previous.tolist() == [-1, 0, -1, -1]


class Sly(DenseState):
    """A state with a pocket."""

    pocket = np.linspace(0, 1, 5)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (Sly(np.zeros((3, 2), np.int64)), "no subclass"),
        (DenseState(np.full((3, 2), 0.5)), "state symbols are integers"),
        (DenseState(np.zeros((3, 3), np.int64)), r"coefficients \(3, 3\); the decoder reads \(3, 2\)"),
        (DenseState(np.zeros((2, 2), np.int64)), "a state of 2 tokens for a sample of 3"),
        (IndexState(np.zeros(3, np.int64), 1), "reads a DenseState, the explanation's encode returned IndexState"),
        (DenseState(np.full((3, 2), 1 << 62)), r"leave \+-\(2\*\*62 - 1\)"),
    ],
)
def test_an_alphabet_accepts_its_symbols_and_nothing_else(state: State, words: str) -> None:
    with pytest.raises(ExplanationError, match=words):
        DenseAlphabet(2).accept(state, 3)


def test_what_is_accepted_is_a_copy() -> None:
    state = DenseState(np.zeros((3, 2), np.int64))
    accepted = DenseAlphabet(2).accept(state, 3)
    state.values[:] = 7
    assert not accepted.values.any()


def test_coded_kinds() -> None:
    context = known_context()
    kinds = {"sparse": CodedSparse, "dense": CodedDense, "index": CodedIndex}
    for name, make in MAKERS.items():
        assert type(choose(make(True), context)) is kinds[name]
