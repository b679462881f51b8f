"""Sparse dictionaries: quantisation, side information, the random control, what a message carries."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse

from decompositions.dictionary import (
    NO_SIDE,
    REMEMBERED,
    SCALE,
    SCALE_AND_MEAN,
    DictionaryDecoder,
    DictionaryExplanation,
    Remembered,
    fit_dictionary,
    support_of,
    token_side,
)
from decompositions.random_dictionary import (
    RandomDictionary,
    RandomDictionaryDecoder,
    encode,
    random_directions,
)
from mdl.codes.bitstream import BitReader, BitWriter
from mdl.errors import ExplanationError, MessageError
from mdl.message import QuantisedArray, Section, decode_message, encode_message
from mdl.protocols import Decoder, Decomposition, Explanation, Inputs, Sample, Settings
from mdl.state import IndexState, JoinedState, State, first_use_order
from mdl.streams import choose

WIDTH, FEATURES, TOKENS = 6, 12, 200
GOLDEN_ROW = [-0.15522154, -0.09709725, -0.21838497, -0.95853346]  # Philox(0), 3 x 4


def settings(step: float = 1e-4, horizon: float = 1e4, width: int = WIDTH, **knobs: float) -> Settings:
    return Settings(horizon, step, np.eye(width), knobs)


def sample_of(outputs: np.ndarray) -> Sample:
    tokens = np.zeros((1, len(outputs)), np.int32)
    return Sample(Inputs(tokens, np.ones_like(tokens, bool)), outputs.astype(np.float32))


def task_of(outputs: np.ndarray) -> SimpleNamespace:
    return SimpleNamespace(fit=sample_of(outputs), width=outputs.shape[1])


def linear_encoder(atoms: np.ndarray, bias: np.ndarray, outputs: np.ndarray) -> scipy.sparse.csr_array:
    return scipy.sparse.csr_array(np.maximum((outputs - bias) @ atoms.T - 0.5, 0).astype(np.float32))


def example(side: int = NO_SIDE, seed: int = 0) -> tuple[DictionaryExplanation, np.ndarray]:
    """A dictionary with one dead feature and one of zero norm, and outputs to explain."""
    rng = np.random.default_rng(seed)
    atoms, bias = rng.normal(size=(FEATURES, WIDTH)).astype(np.float32), rng.normal(size=WIDTH).astype(np.float32)
    atoms[5] = 0.0

    def encoder(outputs: np.ndarray) -> scipy.sparse.csr_array:
        found = linear_encoder(atoms + (np.arange(FEATURES) == 5)[:, None], bias, outputs).tolil()
        found[:, 3] = 0
        return found.tocsr()

    outputs = (rng.normal(size=(TOKENS, WIDTH)) * rng.uniform(1, 3, (TOKENS, 1)) + 0.3).astype(np.float32)
    return fit_dictionary("example", atoms, bias, encoder, outputs, side=side), outputs


def receive(explanation: Explanation, chosen: Settings, kind: type) -> tuple[Decoder, float]:
    message = encode_message([explanation.section(chosen)])
    (section,) = decode_message(message.data)
    return kind.from_section(section), message.whole_bits


@pytest.mark.parametrize("side", [NO_SIDE, SCALE, SCALE_AND_MEAN])
def test_fine_steps_reproduce_the_exact_decoding(side: int):
    explanation, outputs = example(side)
    chosen = settings()
    decoder, _ = receive(explanation, chosen, DictionaryDecoder)
    sample = sample_of(outputs)
    state = explanation.encode(decoder, sample, chosen)
    exact = explanation.activations(outputs) @ explanation.atoms + explanation.bias
    if side:
        scale, mean = token_side(outputs, side)
        exact = exact * scale[:, None] + mean[:, None]
    predicted = decoder.predict(sample.inputs, state)
    assert predicted.dtype == np.float32
    np.testing.assert_allclose(predicted, exact, atol=2e-3)
    assert isinstance(decoder, Decoder)
    assert isinstance(explanation, Explanation)
    assert isinstance(state, State)


def test_dead_and_zero_features_do_not_travel():
    explanation, outputs = example()
    section = explanation.section(settings())
    assert section.n_parts == FEATURES - 2
    decoder = DictionaryDecoder.from_section(section)
    state = support_of(explanation.encode(decoder, sample_of(outputs), settings()))
    kept = [i for i in range(FEATURES) if i not in (3, 5)]
    on = (explanation.activations(outputs)[:, kept] != 0).toarray()
    np.testing.assert_array_equal((state.matrix() != 0).toarray(), on)
    np.testing.assert_array_equal(decoder.touched(sample_of(outputs).inputs, state).toarray(), on)
    assert decoder.flops_per_token(sample_of(outputs).inputs, state) == pytest.approx(2 * WIDTH * on.sum(1).mean())


def test_value_error_is_at_most_half_a_step_in_the_metric():
    explanation, outputs = example()
    rng = np.random.default_rng(1)
    chosen = Settings(1e12, 0.3, rng.normal(size=(WIDTH, WIDTH)), {"value": 2.0})
    decoder = DictionaryDecoder.from_section(explanation.section(chosen))
    gain = np.linalg.norm(decoder.atoms @ chosen.root.T, axis=1)
    # steps lie on the grid 2^(e/4), at most an eighth of an octave from the wanted one
    ratio = decoder.value_steps * gain / (2.0 * 0.3)
    assert np.all((ratio <= 2**0.126) & (ratio >= 2**-0.126))
    state = support_of(explanation.encode(decoder, sample_of(outputs), chosen))
    kept, _ = explanation.kept(chosen)
    error = state.matrix().toarray() * decoder.value_steps - explanation.activations(outputs)[:, kept].toarray()
    assert np.all(np.abs(error) <= 0.5001 * decoder.value_steps)


def test_atom_steps_grow_with_rarity():
    explanation, _ = example()
    kept, atoms = explanation.kept(settings(step=0.1))
    order = np.argsort(explanation.statistics.energy[kept])
    assert len(kept) > 2
    assert np.all(np.diff(atoms.exponents[order]) <= 0)
    assert atoms.exponents.min() < atoms.exponents.max()


def test_coarser_knobs_cost_fewer_bits():
    explanation, outputs = example()
    lengths = {}
    for static, value in [(1.0, 0.5), (16.0, 0.5), (1.0, 3.0)]:
        chosen = settings(step=0.05, static=static, value=value)
        decoder, bits = receive(explanation, chosen, DictionaryDecoder)
        lengths[static, value] = bits, explanation.encode(decoder, sample_of(outputs), chosen).length().total
    assert lengths[16.0, 0.5][0] < lengths[1.0, 0.5][0]
    assert lengths[1.0, 3.0][1] < lengths[1.0, 0.5][1]


@pytest.mark.parametrize("side", [NO_SIDE, SCALE, SCALE_AND_MEAN])
def test_state_survives_the_stream_in_order_of_first_use(side: int):
    explanation, outputs = example(side)
    chosen = settings(step=0.05)
    sample = sample_of(outputs)
    section = explanation.section(chosen)
    decoder = DictionaryDecoder.from_section(section)
    state = explanation.encode(decoder, sample, chosen)
    order = first_use_order(state.touched())
    writer = BitWriter()
    sent = state.reordered(order)
    coded = choose(sent, sample.inputs.context())
    coded.write(writer)
    assert writer.information_bits == pytest.approx(coded.length.total, rel=1e-6)
    assert coded.length.per_token.sum() == pytest.approx(coded.length.total)

    (received,) = decode_message(encode_message([section.reordered(order)]).data)
    far = DictionaryDecoder.from_section(received)
    reader = BitReader(writer.to_bytes())
    read = far.alphabet.read(reader, sample.inputs.context()).state
    reader.finish()
    np.testing.assert_allclose(
        far.predict(sample.inputs, read), decoder.predict(sample.inputs, state), rtol=1e-5, atol=1e-5
    )


def test_side_information_is_charged_and_uses_no_part():
    explanation, outputs = example(SCALE_AND_MEAN)
    chosen = settings(step=0.05)
    decoder = DictionaryDecoder.from_section(explanation.section(chosen))
    state = explanation.encode(decoder, sample_of(outputs), chosen)
    assert isinstance(state, JoinedState)
    sparse, side = state.streams
    assert side.values.shape == (TOKENS, 2)
    both, alone = state.length(), sparse.length()
    assert both.total == pytest.approx(alone.total + side.length().total)
    assert side.length().total > TOKENS
    assert state.touched().shape == (TOKENS, explanation.section(chosen).n_parts)


def test_a_dictionary_of_which_nothing_is_worth_sending():
    explanation, outputs = example()
    chosen = settings(step=1e6)
    decoder, _ = receive(explanation, chosen, DictionaryDecoder)
    sample = sample_of(outputs)
    state = explanation.encode(decoder, sample, chosen)
    assert decoder.touched(sample.inputs, state).shape == (TOKENS, 0)
    np.testing.assert_array_equal(decoder.predict(sample.inputs, state), np.tile(decoder.bias, (TOKENS, 1)))
    assert state.length().total < TOKENS / 4


def test_activations_are_computed_once_for_a_sample():
    calls = []

    def encoder(outputs: np.ndarray) -> scipy.sparse.csr_array:
        calls.append(len(outputs))
        return scipy.sparse.csr_array(np.maximum(outputs, 0))

    sizes = list(range(1, REMEMBERED + 2))
    remembered, arrays = Remembered(encoder), [np.full((n, 2), n, np.float32) for n in sizes]
    for array in (*arrays[:-1], arrays[0].copy(), arrays[-1], arrays[0]):
        np.testing.assert_array_equal(remembered(array).toarray(), array)
    assert calls == [*sizes, 1]  # the oldest makes room


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: Section(s.kind, s.header[:1], s.parts), "2 header and 3 part arrays"),
        (lambda s: Section(s.kind, (s.parts[0], s.header[1]), s.parts), "need a bias"),
        (lambda s: Section(s.kind, s.header, (*s.parts[:2], s.parts[0])), "value classes has 6 columns"),
        (
            lambda s: Section(
                s.kind, s.header, (*s.parts[:2], QuantisedArray(s.parts[2].symbols + 16, s.parts[2].exponents))
            ),
            "value classes",
        ),
        (
            lambda s: Section(s.kind, (s.header[0], QuantisedArray.from_integers(np.array([[0, 7, 0, 0]]))), s.parts),
            "side=7",
        ),
    ],
)
def test_damaged_sections_are_refused(change, match: str):
    explanation, _ = example()
    with pytest.raises(MessageError, match=match):
        DictionaryDecoder.from_section(change(explanation.section(settings())))


def test_a_decoder_refuses_a_foreign_state():
    explanation, _ = example()
    decoder = DictionaryDecoder.from_section(explanation.section(settings()))
    with pytest.raises(ExplanationError, match="IndexState"):
        decoder.alphabet.accept(IndexState(np.zeros(3, np.int64), 2), 3)


def test_a_dictionary_that_never_fires_is_refused():
    with pytest.raises(ExplanationError, match="none of 12 features"):
        fit_dictionary(
            "dead",
            np.ones((FEATURES, WIDTH), np.float32),
            np.zeros(WIDTH, np.float32),
            lambda x: scipy.sparse.csr_array((len(x), FEATURES)),
            np.ones((3, WIDTH), np.float32),
        )


def test_random_directions_are_a_function_of_the_seed():
    rows = random_directions(0, 3, 4)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(rows, random_directions(0, 3, 4))
    # golden: the message of a random dictionary holds only as long as numpy's stream does
    expected = np.random.Generator(np.random.Philox(0)).standard_normal((3, 4))
    np.testing.assert_allclose(rows, expected / np.linalg.norm(expected, axis=1, keepdims=True), rtol=1e-6)
    np.testing.assert_allclose(rows[0], GOLDEN_ROW, rtol=1e-6)


def test_random_dictionary_sends_the_seed_instead_of_atoms():
    rng = np.random.default_rng(4)
    outputs = rng.normal(size=(300, 16)).astype(np.float32) + 1.0
    task = task_of(outputs)
    decomposition = RandomDictionary(features=64, k=6)
    assert isinstance(decomposition, Decomposition)
    explanation = decomposition.fit(task)
    assert isinstance(explanation, Explanation)
    chosen = settings(step=1e-3, width=16)
    decoder, bits = receive(explanation, chosen, RandomDictionaryDecoder)
    state = explanation.encode(decoder, task.fit, chosen)
    predicted = decoder.predict(task.fit.inputs, state)
    exact = encode(random_directions(0, 64, 16), outputs.mean(0), 6, outputs) @ random_directions(0, 64, 16)
    np.testing.assert_allclose(predicted, exact + outputs.mean(0), atol=5e-3)
    # a part costs the number of its row and its scale, not its d entries
    assert bits < 64 * (np.log2(64) + 12) + 16 * 30
    order = first_use_order(state.touched())
    moved = RandomDictionaryDecoder.from_section(explanation.section(chosen).reordered(order))
    np.testing.assert_allclose(moved.predict(task.fit.inputs, state.reordered(order)), predicted, atol=1e-5)


@pytest.mark.parametrize("options", [{"features": 0}, {"k": 0}, {"features": 4, "k": 5}, {"seed": -1}])
def test_random_dictionary_refuses_options_out_of_range(options: dict[str, int]):
    with pytest.raises(ExplanationError, match="needed are at least one"):
        RandomDictionary(**options).fit(task_of(np.ones((4, 3), np.float32)))


def test_random_dictionary_refuses_damaged_sections():
    explanation = RandomDictionary(features=8, k=2).fit(task_of(np.eye(6, dtype=np.float32)))
    section = explanation.section(settings())
    huge = QuantisedArray.from_integers(np.array([[0, 1 << 40]]))
    with pytest.raises(MessageError, match="a receiver draws"):
        RandomDictionaryDecoder.from_section(Section(section.kind, (*section.header[:2], huge), section.parts))
    rows = QuantisedArray(section.parts[0].symbols + 8, section.parts[0].exponents)
    with pytest.raises(MessageError, match=r"array of rows has values from .* they lie in \[0, 7\]"):
        RandomDictionaryDecoder.from_section(Section(section.kind, section.header, (rows, *section.parts[1:])))
    with pytest.raises(MessageError, match="3 header arrays"):
        RandomDictionaryDecoder.from_section(Section(section.kind, section.header[:2], section.parts))
