"""Programs that say what built-in decoders do: equal predictions, parts and operations, and little longer messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.special

from decompositions.baselines import AffineDecoder, TableDecoder
from decompositions.clusters import ClustersDecoder
from decompositions.dictionary import DictionaryDecoder
from mdl.alphabets import JoinedAlphabet
from mdl.message import QuantisedArray, Section, decode_message, encode_message
from mdl.program import Program, ProgramDecoder, prices, render
from mdl.protocols import Decoder, Inputs
from mdl.state import IndexState, JoinedState, NoState, State, first_use_order
from mdl.transform_coding import ComponentsDecoder

from . import conftest as made


def state_for(name: str, section: Section, n: int) -> State:
    if name == "dictionary":
        return made.sparse_state(section, n)
    if name == "normalised":
        return JoinedState((made.sparse_state(section, n), made.dense_state(n, 2, parts=False)))
    if name == "components":
        return made.dense_state(n)
    if name == "clusters":
        return IndexState(np.random.default_rng(0).integers(0, section.n_parts, n), section.n_parts)
    return NoState(n)


CASES = [
    ("table", made.table_section, made.table_program, TableDecoder, made.WIDTH),
    ("affine", made.affine_section, made.affine_program, AffineDecoder, 2 * made.WIDTH**2 + made.WIDTH),
    ("dictionary", made.dictionary_section, made.dictionary_program, DictionaryDecoder, None),
    ("normalised", made.normalised_section, made.normalised_program, DictionaryDecoder, None),
    ("components", made.components_section, made.components_program, ComponentsDecoder, None),
    ("clusters", made.clusters_section, made.clusters_program, ClustersDecoder, 0),
]


@pytest.mark.parametrize(("name", "original", "translate", "kind", "flops"), CASES, ids=[c[0] for c in CASES])
def test_a_program_is_the_built_in_decoder(
    name: str,
    original: Callable[[], Section],
    translate: Callable[[Section], Section],
    kind: Any,
    flops: float | None,
    inputs: Inputs,
) -> None:
    section = original()
    messages = encode_message([section]), encode_message([translate(section)])
    built_in = kind.from_section(decode_message(messages[0].data)[0])
    program = ProgramDecoder.from_section(decode_message(messages[1].data)[0])
    state = state_for(name, section, inputs.n_tokens)
    predicted, expected = program.predict(inputs, state), built_in.predict(inputs, state)
    assert predicted.dtype == np.float32
    assert predicted.shape == (inputs.n_tokens, made.WIDTH)
    np.testing.assert_allclose(predicted, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(messages[1].part_bits[0], messages[0].part_bits[0])
    assert messages[1].whole_bits - messages[0].whole_bits < 200
    touched = program.touched(inputs, state), built_in.touched(inputs, state)
    assert (touched[0] is None) == (touched[1] is None)
    if touched[0] is not None:
        np.testing.assert_array_equal(touched[0].toarray(), touched[1].toarray() != 0)
    if flops is not None:
        assert program.flops_per_token(inputs, state) == flops
    assert isinstance(program, Decoder)


def test_operations_of_a_dictionary_follow_the_symbols_that_are_on(inputs: Inputs) -> None:
    section = made.dictionary_section()
    program = ProgramDecoder.from_section(made.dictionary_program(section))
    for active in (1, 4, 9):
        state = made.sparse_state(section, inputs.n_tokens, active)
        # the values' steps; two for each number of an atom; the bias
        assert program.flops_per_token(inputs, state) == active + 2 * active * made.WIDTH + made.WIDTH


@pytest.mark.parametrize(("name", "original", "translate", "kind", "flops"), CASES, ids=[c[0] for c in CASES])
def test_alphabets(name: str, original: Any, translate: Any, kind: Any, flops: float | None) -> None:
    """A program says what it is told just as the built-in decoder does."""
    section = original()
    expected = kind.from_section(section).alphabet
    found = ProgramDecoder.from_section(translate(section)).alphabet
    assert type(found) is type(expected)
    streams = [(found, expected)]
    if isinstance(found, JoinedAlphabet):
        streams = list(zip(found.alphabets, expected.alphabets, strict=True))
    for one, other in streams:
        assert type(one) is type(other)
        for field, value in vars(one).items():
            np.testing.assert_array_equal(value, vars(other)[field])


def test_the_order_of_parts_does_not_matter(inputs: Inputs) -> None:
    """Parts travel in the order of their first use; a program cannot tell."""
    section = made.dictionary_section()
    state = made.sparse_state(section, inputs.n_tokens, 2)
    order = first_use_order(state.touched())
    program = made.dictionary_program(section)
    before = ProgramDecoder.from_section(program).predict(inputs, state)
    after = ProgramDecoder.from_section(program.reordered(order)).predict(inputs, state.reordered(order))
    np.testing.assert_allclose(after, before, atol=1e-5)
    assert (order != np.arange(len(order))).any()


def test_a_dictionary_of_no_parts_predicts_its_bias(inputs: Inputs) -> None:
    section = made.dictionary_section(0)
    state = made.sparse_state(section, inputs.n_tokens)
    decoder = ProgramDecoder.from_section(made.dictionary_program(section))
    np.testing.assert_array_equal(decoder.predict(inputs, state)[3], section.header[0].values()[0])
    touched = decoder.touched(inputs, state)
    assert touched is not None
    assert touched.shape == (inputs.n_tokens, 0)


def test_a_constant_program(inputs: Inputs) -> None:
    p = Program()
    mean = made.random_values(1, made.WIDTH, 0)
    decoder = ProgramDecoder.from_section(p.section(p.header(mean)))
    predicted = decoder.predict(inputs, NoState(inputs.n_tokens))
    assert predicted.shape == (inputs.n_tokens, made.WIDTH)
    assert (predicted == mean.values()).all()
    assert decoder.touched(inputs, NoState(inputs.n_tokens)) is None


def test_a_transcoder_needs_all_its_encoders(inputs: Inputs) -> None:
    """relu(x W + b) V: whether a feature is on is known only after its encoder has been looked at."""
    p = Program()
    arrays = [made.random_values(made.FEATURES, c, s) for c, s in ((made.WIDTH, 0), (1, 1), (made.WIDTH, 2))]
    encoder, bias, decoder = (p.part(a) for a in arrays)
    hidden = p.relu(p.inputs(made.WIDTH) @ p.transpose(encoder) + p.transpose(bias))
    program = ProgramDecoder.from_section(p.section(hidden @ decoder))
    w, b, v = (a.values() for a in arrays)
    x, state = inputs.scored_values(), NoState(inputs.n_tokens)
    np.testing.assert_allclose(program.predict(inputs, state), np.maximum(x @ w.T + b.T, 0) @ v, rtol=1e-4, atol=1e-4)
    assert program.touched(inputs, state) is None


def normal_like(a: np.ndarray, centre: bool) -> np.ndarray:
    a = a - a.mean(1, keepdims=True) * centre
    return a / np.sqrt(np.square(a).mean(1, keepdims=True) + 1e-5)


FUNCTIONS: list[tuple[str, tuple[Any, ...], Callable[[np.ndarray], np.ndarray]]] = [
    ("relu", (), lambda a: np.maximum(a, 0)),
    ("absolute", (), np.abs),
    ("step", (), lambda a: a > 0),
    ("gelu", (False,), lambda a: a * 0.5 * (1 + scipy.special.erf(a / np.sqrt(2)))),
    ("gelu", (True,), lambda a: a * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))),
    ("exp", (), np.exp),
    ("exp2", (), np.exp2),
    ("tanh", (), np.tanh),
    ("sigmoid", (), lambda a: 1 / (1 + np.exp(-a))),
    ("sum", (), lambda a: a.sum(1, keepdims=True)),
    ("softmax", (), lambda a: np.exp(a) / np.exp(a).sum(1, keepdims=True)),
    ("layer_normalise", (), lambda a: normal_like(a, True)),
    ("rms_normalise", (), lambda a: normal_like(a, False)),
    ("top_k", (3,), lambda a: np.where(a >= np.sort(a, 1)[:, [-3]], a, 0)),
    ("top_k", (99,), lambda a: a),
    ("scale", (3,), lambda a: a * 2**0.75),
    ("select", (2, 5), lambda a: a[:, 2:7]),
]


@pytest.mark.parametrize(("name", "arguments", "expected"), FUNCTIONS)
def test_functions_of_a_row(name: str, arguments: tuple[Any, ...], expected: Any, inputs: Inputs) -> None:
    p = Program()
    section = p.section(getattr(p, name)(p.inputs(made.WIDTH), *arguments))
    predicted = ProgramDecoder.from_section(section).predict(inputs, NoState(inputs.n_tokens))
    x = inputs.scored_values().astype(np.float64)
    np.testing.assert_allclose(predicted, expected(x), rtol=1e-5, atol=1e-6)


def test_earlier_positions(inputs: Inputs) -> None:
    """`shift` counts positions, and finds 0 at special ones; `cumulative_mean` averages the explained ones."""
    state = NoState(inputs.n_tokens)

    def run(write: Callable[[Program], Any]) -> np.ndarray:
        p = Program()
        return ProgramDecoder.from_section(p.section(write(p))).predict(inputs, state)

    shifted = run(lambda p: p.shift(p.inputs(made.WIDTH), 3))
    mean = run(lambda p: p.cumulative_mean(p.inputs(made.WIDTH)))
    places = np.argwhere(inputs.scored)
    assert inputs.values is not None
    for row, (sequence, position) in enumerate(places):
        earlier = position >= 3 and inputs.scored[sequence, position - 3]
        wanted = inputs.values[sequence, position - 3] if earlier else np.zeros(made.WIDTH)
        np.testing.assert_array_equal(shifted[row], wanted)
        before = inputs.values[sequence, : position + 1][inputs.scored[sequence, : position + 1]]
        np.testing.assert_allclose(mean[row], before.mean(0), atol=1e-5)
    assert (run(lambda p: p.shift(p.inputs(made.WIDTH), 1000)) == 0).all()


def test_parts_of_earlier_positions_are_needed_too(inputs: Inputs) -> None:
    section, n = made.dictionary_section(), inputs.n_tokens
    state = made.sparse_state(section, n, 2)
    on = state.touched().toarray()

    def touched(back: Callable[[Program, Any], Any]) -> np.ndarray:
        p = Program()
        atoms, _, classes = (p.part(a) for a in section.parts)
        decoder = ProgramDecoder.from_section(p.section(back(p, p.state_sparse(classes, False)) @ atoms))
        found = decoder.touched(inputs, state)
        assert found is not None
        return found.toarray()

    shifted = touched(lambda p, x: p.shift(x, 2))
    ever = touched(lambda p, x: p.cumulative_mean(x))
    assert (touched(lambda p, x: x) == on).all()
    assert (touched(lambda p, x: x + p.shift(x, 2)) == (on | shifted)).all()
    numbers = np.where(inputs.scored, np.cumsum(inputs.scored).reshape(inputs.scored.shape) - 1, -1)
    for row, (sequence, position) in enumerate(np.argwhere(inputs.scored)):
        earlier = numbers[sequence, position - 2] if position >= 2 else -1
        assert (shifted[row] == (on[earlier] if earlier >= 0 else 0)).all()
        before = numbers[sequence, : position + 1]
        assert (ever[row] == on[before[before >= 0]].any(0)).all()


@pytest.mark.parametrize("what", ["add", "transposed", "softmax_of_parts", "unsupported"])
def test_parts_used_otherwise_are_all_needed(what: str, inputs: Inputs) -> None:
    """Only a product with the state's own zeros spares a token the other parts."""
    section = made.dictionary_section()
    p = Program()
    atoms, exponents, classes = (p.part(a) for a in section.parts)
    symbols, row = p.state_sparse(classes, False), p.transpose(exponents)
    coefficients = {
        "add": lambda: symbols + row,
        "transposed": lambda: symbols * (p.inputs(made.WIDTH) @ p.transpose(atoms)),
        "softmax_of_parts": lambda: symbols * p.softmax(row),
        "unsupported": lambda: p.softmax(symbols),
    }[what]()
    decoder = ProgramDecoder.from_section(p.section(coefficients @ atoms))
    assert decoder.touched(inputs, made.sparse_state(section, inputs.n_tokens)) is None


def test_blocks_of_sequences_change_nothing(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    section = made.dictionary_section()
    p = Program()
    atoms, _, classes = (p.part(a) for a in section.parts)
    y = p.state_sparse(classes, False) @ atoms
    decoder = ProgramDecoder.from_section(p.section(p.shift(y, 1) + p.cumulative_mean(y) + p.inputs(made.WIDTH)))
    state = made.sparse_state(section, inputs.n_tokens)
    whole = decoder.predict(inputs, state)
    monkeypatch.setattr("mdl.program.decoder.BLOCK_NUMBERS", 1)
    np.testing.assert_allclose(decoder.predict(inputs, state), whole, atol=1e-6)


def test_sparse_products_equal_dense_ones(inputs: Inputs) -> None:
    section = made.dictionary_section()
    state = made.sparse_state(section, inputs.n_tokens)
    q = state.matrix().toarray().astype(np.float32)
    p = Program()
    atoms, exponents, classes = (p.part(a) for a in section.parts)
    s = p.state_sparse(classes, False)
    inner = p.relu(s * s * p.transpose(exponents)) * p.sum(p.inputs(made.WIDTH)) * p.shift(s, 1)
    predicted = ProgramDecoder.from_section(p.section(inner @ atoms)).predict(inputs, state)
    earlier = np.zeros_like(q)
    numbers = np.where(inputs.scored, np.cumsum(inputs.scored).reshape(inputs.scored.shape) - 1, -1)
    for row, (sequence, position) in enumerate(np.argwhere(inputs.scored)):
        if position and numbers[sequence, position - 1] >= 0:
            earlier[row] = q[numbers[sequence, position - 1]]
    e, a = section.parts[1].values().T, section.parts[0].values()
    dense = np.maximum(q * q * e, 0) * inputs.scored_values().sum(1, keepdims=True) * earlier
    np.testing.assert_allclose(predicted, dense @ a, rtol=1e-4, atol=1e-3)


def test_a_listing_shows_types_and_prices() -> None:
    section = made.dictionary_program(made.dictionary_section())
    lines = render(section).splitlines()
    assert len(lines) == 11
    assert lines[0].startswith("v0 = part array=0")
    assert "v3 = state_sparse v2 signed=0" in lines[3]
    assert "[tokens, parts]" in lines[3]
    assert all(line.endswith(" bits") for line in lines)
    bits = prices(section)
    assert bits.shape == (11,)
    assert 40 < bits.sum() < 200
    empty = Section("program", (QuantisedArray.from_integers(np.zeros(0)), *section.header[1:]), section.parts)
    extra = encode_message([section]).whole_bits - encode_message([empty]).whole_bits
    assert bits.sum() == pytest.approx(extra, abs=80)


def test_unneeded_instructions_are_not_sent() -> None:
    p = Program()
    mean = p.header(made.random_values(1, 4, 0))
    p.exp(mean)
    other = p.tanh(mean)
    assert len(ProgramDecoder.from_section(p.section(other)).instructions) == 2
