"""What the interpreter refuses: programs that are none, that ask for too much, or that look ahead; and a fuzz of it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse

from mdl.alphabets import Alphabet, DenseAlphabet, IndexAlphabet, JoinedAlphabet, SparseAlphabet
from mdl.errors import MessageError
from mdl.message import QuantisedArray, Section
from mdl.program import Program, ProgramDecoder, opcodes
from mdl.program import decoder as interpreter
from mdl.program.opcodes import LONGEST, OPCODES, Instruction, from_integers, language_table, opcode_number, to_integers
from mdl.program.shapes import PARTS as PART_AXIS
from mdl.program.shapes import TOKENS
from mdl.protocols import Inputs
from mdl.state import DenseState, IndexState, JoinedState, NoState, SparseState, State

from . import conftest as made


def section_of(integers: list[int], headers: tuple[QuantisedArray, ...] = (), parts: Any = ()) -> Section:
    return Section("program", (QuantisedArray.from_integers(np.array(integers, np.int64)), *headers), tuple(parts))


def listing(*lines: tuple[Any, ...]) -> list[int]:
    """Integers of a program written as (name, operand or attribute, ...), operands as numbers of instructions."""
    program: list[Instruction] = []
    for line in lines:
        opcode = OPCODES[opcode_number(line[0])]
        cut = 1 + len(opcode.operands)
        program.append(Instruction.make(len(program), line[0], line[1:cut], line[cut:]))
    return [int(i) for i in to_integers(program)]


ROW, COLUMN = made.random_values(1, 4, 0), made.random_values(4, 1, 1)
PART, CLASSES = made.random_values(6, 4, 2), QuantisedArray.from_integers(np.arange(6))
REFUSED: list[tuple[str, list[int], tuple[Any, ...], tuple[Any, ...], str]] = [
    ("nothing", [], (), (), "an empty program"),
    ("unknown opcode", [99], (), (), f"opcode 99, but there are {len(OPCODES)}"),
    ("cut", [opcode_number("add"), 0], (), (), "the program ends in its middle"),
    ("operand ahead", [*listing(("inputs", 4)), opcode_number("relu"), -1], (), (), "operands point backwards"),
    ("operand before all", [*listing(("inputs", 4)), opcode_number("relu"), 5], (), (), "only values 0 to 0 exist"),
    ("attribute", [opcode_number("inputs"), 0], (), (), "width = 0 is outside 1 to"),
    ("too long", [opcode_number("inputs"), 4] * 300, (), (), "more than 256 instructions"),
    ("far too long", [0] * 5000, (), (), "a program of 5000 integers"),
    ("no such header", listing(("header", 1)), (ROW,), (), "there are 1 header arrays"),
    ("no such part", listing(("part", 0)), (ROW,), (), "there are 0 part arrays"),
    ("idle", listing(("inputs", 4), ("header", 0)), (ROW,), (), r"instructions \[0\] are never used"),
    ("axes", listing(("inputs", 5), ("header", 0), ("add", 0, 1)), (ROW,), (), "axes 5 and 4 do not go together"),
    ("inner axes", listing(("inputs", 4), ("header", 0), ("matmul", 0, 1)), (ROW,), (), "columns 4 of the first"),
    ("over tokens", listing(("header", 0), ("inputs", 4), ("matmul", 0, 1)), (COLUMN,), (), "contracts over tokens"),
    ("transposed tokens", listing(("inputs", 4), ("transpose", 0)), (), (), "nothing contracts over tokens"),
    ("static shift", listing(("header", 0), ("shift", 0, 1)), (ROW,), (), "no earlier positions"),
    ("columns", listing(("inputs", 4), ("select", 0, 2, 3)), (), (), "columns 2 to 4 of 4"),
    ("gram of parts", listing(("part", 0), ("transpose", 0), ("matmul", 0, 1)), (), (PART,), "parts along both axes"),
    ("part as a prediction", listing(("part", 0)), (), (PART,), r"the last value is \[parts, 4\]"),
    ("parts as columns", listing(("state_dense", 0)), (), (PART,), r"the last value is \[tokens, parts\]"),
    ("choice of parts", listing(("state_dense", 0), ("select", 0, 0, 1)), (), (PART,), "cannot be selected by number"),
    ("index as number", listing(("state_index",), ("relu", 0)), (), (PART,), "an index is no number"),
    ("index of nothing", listing(("state_index",)), (ROW,), (), "an index needs parts"),
    ("two states", listing(("state_dense", 4), ("state_dense", 4), ("add", 0, 1)), (), (), "it is read once"),
    ("classes", listing(("part", 0), ("state_sparse", 0, 0)), (), (PART,), "one column of a part array"),
    ("empty array", listing(("header", 0)), (QuantisedArray.from_integers(np.zeros((0, 3))),), (), "0 x 3 is empty"),
    (
        "a name for a part",
        listing(("part", 0), ("part", 1), ("state_sparse", 1, 0), ("header", 0), ("add", 2, 3), ("matmul", 4, 0)),
        (made.random_values(1, 6, 0),),
        (PART, CLASSES),
        "a plain axis never stands for that of parts",
    ),
    (
        "table among reordered parts",
        listing(("part", 0), ("part", 1), ("table", 1, 0), ("state_sparse", 1, 0), ("matmul", 3, 0), ("add", 2, 4)),
        (),
        (PART, QuantisedArray.from_integers(np.arange(1, 7))),
        "in the order of token ids",
    ),
    (
        "ids that do not increase",
        listing(("part", 0), ("part", 1), ("table", 1, 0)),
        (),
        (PART, CLASSES),
        "ids increase from row to row",
    ),
    (
        "classes that are no integers",
        listing(("part", 0), ("part", 1), ("state_sparse", 1, 0), ("matmul", 2, 0)),
        (),
        (PART, made.random_values(6, 1, 5)),
        "integers from 0 to 255",
    ),
]


@pytest.mark.parametrize(
    ("integers", "headers", "parts", "reason"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED]
)
def test_refused(integers: list[int], headers: Any, parts: Any, reason: str) -> None:
    with pytest.raises(MessageError, match=reason):
        ProgramDecoder.from_section(section_of(integers, headers, parts))


def test_a_section_without_a_program_is_refused() -> None:
    with pytest.raises(MessageError, match="begins with a header array, the program"):
        ProgramDecoder.from_section(Section("program", (), ()))
    for wrong in (QuantisedArray.from_integers(np.zeros((2, 2))), QuantisedArray.from_values(np.ones((2, 1)), 0.5)):
        with pytest.raises(MessageError, match="a column of integers of step 1"):
            ProgramDecoder.from_section(Section("program", (wrong,), ()))


CAPS: dict[str, Callable[[Program], Any]] = {
    "operations a token": lambda p: wide(p, p.inputs(4096), 40),
    "operations once": lambda p: p.inputs(4096) @ wide(p, big(p), 4),
    "numbers in the values of one token": lambda p: p.sum(p.inputs(1 << 17) + p.inputs(1 << 17)),
    "numbers in static values": lambda p: p.transpose(p.sum(tall(p) * p.transpose(tall(p)))),
}


def big(p: Program) -> Any:
    """A matrix of 4,096 x 4,096 for the price of a row and a column."""
    return p.header(made.random_values(4096, 1, 0)) * p.header(made.random_values(1, 4096, 0))


def wide(p: Program, x: Any, times: int) -> Any:
    matrix = big(p)
    for _ in range(times):
        x = x @ matrix
    return x


def tall(p: Program) -> Any:
    return p.header(made.random_values(1 << 14, 1, 0))


@pytest.mark.parametrize("what", sorted(CAPS))
def test_free_computation_is_capped(what: str) -> None:
    """Cheat 17: what a decoder computes costs no bits, so it is bounded before anything runs."""
    p = Program()
    with pytest.raises(MessageError, match=rf"the program takes .* {what}; at most \d+ are allowed. Computing is not"):
        p.section(CAPS[what](p))


def test_operations_of_a_dense_state_are_capped_too(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    section = made.dictionary_section()
    decoder = ProgramDecoder.from_section(made.dictionary_program(section))
    monkeypatch.setattr("mdl.program.decoder.MAX_FLOPS", 200)
    decoder.predict(inputs, made.sparse_state(section, inputs.n_tokens, 4))
    with pytest.raises(MessageError, match="operations a token with this state"):
        decoder.predict(inputs, made.sparse_state(section, inputs.n_tokens, 9))


def test_a_state_of_another_alphabet_is_refused(inputs: Inputs) -> None:
    n, section = inputs.n_tokens, made.dictionary_section()
    sparse = ProgramDecoder.from_section(made.dictionary_program(section))
    state = made.sparse_state(section, n)
    wrong: list[tuple[State, str]] = [
        (NoState(n), "reads a SparseState, the explanation's encode returned NoState"),
        (made.sparse_state(section, n - 1), "a state of 113 tokens"),
        (replace(state, features=state.features + 7), "features from 7 to 46; the decoder has 40"),
        (replace(state, values=-state.values), "a value of -8 for a decoder whose values are never negative"),
    ]
    for other, reason in wrong:
        with pytest.raises(MessageError, match=reason):
            sparse.predict(inputs, other)
    dense = ProgramDecoder.from_section(made.components_program(made.components_section()))
    with pytest.raises(MessageError, match=r"coefficients \(114, 5\); the decoder reads \(114, 6\)"):
        dense.predict(inputs, DenseState(np.zeros((n, 5), np.int64)))
    index = ProgramDecoder.from_section(made.clusters_program(made.clusters_section()))
    with pytest.raises(MessageError, match="indices from 9 to 9; the decoder has 9"):
        index.predict(inputs, IndexState(np.full(n, 9), 9))


def test_inputs_of_another_region_are_refused(inputs: Inputs) -> None:
    decoder = ProgramDecoder.from_section(made.affine_program(made.affine_section()))
    with pytest.raises(MessageError, match="token ids alone"):
        decoder.predict(replace(inputs, values=None), NoState(inputs.n_tokens))
    assert inputs.values is not None
    with pytest.raises(MessageError, match="inputs of width 16; here they have 3"):
        decoder.predict(replace(inputs, values=inputs.values[..., :3]), NoState(inputs.n_tokens))


def test_an_overflow_is_refused(inputs: Inputs) -> None:
    p = Program()
    x = p.inputs(made.WIDTH)
    decoder = ProgramDecoder.from_section(p.section(x / (x - x)))
    with pytest.raises(MessageError, match="not finite for 114 of 114 tokens"):
        decoder.predict(inputs, NoState(inputs.n_tokens))


def test_an_operand_that_does_not_fit_is_refused_where_it_is_written() -> None:
    p, other = Program(), Program()
    x = p.inputs(4)
    with pytest.raises(MessageError, match=r"v2 = add v0 v1 \(\[tokens, 4\], \[1, 5\]\): axes 4 and 5"):
        x + p.header(made.random_values(1, 5, 0))
    with pytest.raises(MessageError, match="a value of another program"):
        x + other.inputs(4)
    p.part(made.random_values(3, 2, 0))
    with pytest.raises(MessageError, match="a part array of 4 rows beside one of 3"):
        p.part(made.random_values(4, 2, 0))


def test_programs_survive_the_integers() -> None:
    section = made.dictionary_program(made.dictionary_section())
    integers = section.header[0].symbols[:, 0]
    assert (to_integers(from_integers(integers)) == integers).all()
    assert max(1 + len(o.operands) + len(o.attributes) for o in OPCODES) == LONGEST
    assert len({o.name for o in OPCODES}) == len(OPCODES)
    with pytest.raises(MessageError, match="no opcode 'attend'"):
        opcode_number("attend")


# Fuzz.


def random_program(rng: np.random.Generator) -> list[int]:
    """Mostly well-formed instructions, so that type checks, caps and the machine are reached, with some noise."""
    program: list[int] = []
    count = int(rng.integers(1, 12))
    for place in range(count):
        leaf = place == 0 or rng.random() < 0.25
        chosen = [i for i, o in enumerate(OPCODES) if bool(o.operands) != leaf]
        opcode = OPCODES[int(rng.choice(chosen))]
        small = [max(a.lowest, int(rng.choice([0, 1, 2, 4]))) for a in opcode.attributes]
        near = [int(min(rng.geometric(0.5) - 1, place - 1)) for _ in opcode.operands]
        program += [opcode_number(opcode.name), *near, *small]
    if rng.random() < 0.1:
        program[int(rng.integers(len(program)))] = int(rng.integers(-3, 300))
    return program


def grown_program(rng: np.random.Generator) -> list[int]:
    """A program grown instruction by instruction, those that do not fit left out."""
    p = Program()
    nodes = [p.header(a) for a in HEADERS] + [p.part(a) for a in PARTS]
    nodes += [p.inputs(4)]
    nodes += [[p.state_dense, p.state_index, lambda: p.state_sparse(nodes[4], False)][rng.integers(3)]()]
    nodes += [p.state_dense(3)]
    for _ in range(int(rng.integers(3, 30))):
        opcode = OPCODES[int(rng.integers(len(OPCODES)))]
        if not opcode.operands or opcode.name == "state_sparse":
            continue
        operands = [nodes[-1 - int(min(rng.geometric(0.15) - 1, len(nodes) - 1))] for _ in opcode.operands]
        attributes = [max(a.lowest, int(rng.choice([0, 1, 2, 4]))) for a in opcode.attributes]
        with contextlib.suppress(MessageError):
            nodes.append(p._append(opcode.name, tuple(operands), tuple(attributes)))
    # Most would never bring the state's columns together with the parts' rows.
    for rows in [n for n in nodes if p.types[n.place].rows == PART_AXIS][-2:]:
        for symbols in [n for n in nodes if p.types[n.place].rows == TOKENS][-3:]:
            with contextlib.suppress(MessageError):
                nodes.append(p.gather(symbols, rows) if p.types[symbols.place].index else symbols @ rows)
    output = next(n for n in reversed(nodes) if p.types[n.place].rows in (TOKENS, 1) and p.types[n.place].columns > 0)
    with contextlib.suppress(MessageError):
        return [int(i) for i in p.section(output).header[0].symbols[:, 0]]
    return random_program(rng)


HEADERS = (ROW, COLUMN, made.random_values(4, 4, 3))
PARTS = (PART, CLASSES, QuantisedArray.from_integers(np.arange(1, 7)))


def state_of(decoder: ProgramDecoder, n: int, seed: int = 0) -> State:
    return symbols_of(decoder.alphabet, n, np.random.default_rng(seed))


def symbols_of(alphabet: Alphabet, n: int, rng: np.random.Generator) -> State:
    if isinstance(alphabet, JoinedAlphabet):
        return JoinedState(tuple(symbols_of(a, n, rng) for a in alphabet.alphabets))
    if isinstance(alphabet, DenseAlphabet):
        return DenseState(rng.integers(-3, 4, (n, alphabet.width)), alphabet.parts)
    if isinstance(alphabet, IndexAlphabet):
        return IndexState(rng.integers(0, alphabet.n_parts, n), alphabet.n_parts)
    if isinstance(alphabet, SparseAlphabet):
        shape = (n, len(alphabet.classes))
        symbols = rng.integers(-2 if alphabet.signed else 0, 3, shape) * (rng.random(shape) < 0.3)
        return SparseState.from_matrix(scipy.sparse.csr_array(symbols), alphabet.classes, alphabet.signed)
    return NoState(n)


def first_positions(inputs: Inputs, state: State, kept: int, seed: int) -> tuple[Inputs, State]:
    """Other tokens, inputs and symbols from position `kept` on, in every sequence."""
    rng = np.random.default_rng(seed)
    tokens, values = inputs.tokens.copy(), np.array(inputs.values)
    tokens[:, kept:] = rng.integers(0, made.VOCABULARY, tokens[:, kept:].shape)
    values[:, kept:] += rng.normal(size=values[:, kept:].shape)
    late = (np.arange(tokens.shape[1])[None] >= kept).repeat(len(tokens), 0)[inputs.scored]
    changed = other_symbols(state, late)
    return replace(inputs, tokens=tokens, values=values.astype(np.float32)), changed


def other_symbols(state: State, late: np.ndarray) -> State:
    """Other symbols where `late` is set."""
    if isinstance(state, JoinedState):
        return JoinedState(tuple(other_symbols(s, late) for s in state.streams))
    if isinstance(state, DenseState):
        return replace(state, values=np.where(late[:, None], state.values[::-1], state.values))
    if isinstance(state, IndexState):
        return replace(state, indices=np.where(late, state.indices[::-1], state.indices))
    if isinstance(state, SparseState):
        dense = state.matrix().toarray()
        mixed = scipy.sparse.csr_array(np.where(late[:, None], dense[::-1], dense))
        return SparseState.from_matrix(mixed, state.classes, state.signed)
    return state


def well_behaved(integers: list[int], inputs: Inputs) -> str:
    """Run a program, if it is one: its prediction does not look ahead, and needs no part that it does not name."""
    try:
        decoder = ProgramDecoder.from_section(section_of(integers, HEADERS, PARTS))
    except MessageError:
        return "refused"
    state = state_of(decoder, inputs.n_tokens)
    try:
        predicted = decoder.predict(inputs, state)
        other = decoder.predict(*first_positions(inputs, state, 9, 1))
    except MessageError:
        return "refused in use"
    early = (np.arange(inputs.tokens.shape[1])[None] < 9).repeat(len(inputs.tokens), 0)[inputs.scored]
    np.testing.assert_array_equal(other[early], predicted[early])
    return "spared parts" if check_parts(decoder, inputs, state, predicted) else "ran"


def check_parts(decoder: ProgramDecoder, inputs: Inputs, state: State, predicted: np.ndarray) -> bool:
    """A part's numbers change no prediction that does not touch it. Returns whether there is such a prediction."""
    touched = decoder.touched(inputs, state)
    assert decoder.flops_per_token(inputs, state) >= 0
    if touched is None:
        return False
    numbers = made.random_values(6, 4, 99).symbols
    for part in range(6):
        symbols = PART.symbols.copy()
        symbols[part] = numbers[part]
        changed = (QuantisedArray(symbols, PART.exponents), *PARTS[1:])
        integers = [int(i) for i in to_integers(decoder.instructions)]
        try:
            other = ProgramDecoder.from_section(section_of(integers, HEADERS, changed)).predict(inputs, state)
        except MessageError:
            continue
        free = ~touched.toarray()[:, part].astype(bool)
        np.testing.assert_allclose(other[free], predicted[free], rtol=1e-4, atol=1e-4)
    return bool(0 < touched.nnz < touched.shape[0] * touched.shape[1])


def outcomes_of(inputs: Inputs, seed: int, random: int, grown: int) -> Counter[str]:
    """What became of so many programs on two short sequences."""
    rng = np.random.default_rng(seed)
    short = Inputs(inputs.tokens[-2:, :14], inputs.scored[-2:, :14], np.array(inputs.values)[-2:, :14, :4])
    programs = [random_program(rng) for _ in range(random)] + [grown_program(rng) for _ in range(grown)]
    return Counter(well_behaved(program, short) for program in programs)


def test_random_programs_are_refused_or_behave(inputs: Inputs) -> None:
    """1,680 instruction lists: a decoder or a `MessageError`, never another exception, a later token or a free part."""
    counts = outcomes_of(inputs, 0, 1500, 180)
    assert counts["ran"] > 50, counts
    assert counts["spared parts"] > 20, counts
    assert counts["refused"] > 1000, counts


@pytest.mark.slow
def test_many_random_programs_are_refused_or_behave(inputs: Inputs) -> None:
    counts = outcomes_of(inputs, 1, 20000, 5000)
    assert counts["spared parts"] > 300, counts


def test_noise_is_refused(inputs: Inputs) -> None:
    rng = np.random.default_rng(1)
    for _ in range(2000):
        integers = [int(i) for i in rng.integers(-2, len(OPCODES) + 2, rng.integers(0, 20))]
        well_behaved(integers, inputs)


@pytest.mark.parametrize("name", ["shift", "cumulative_mean", "table", "dictionary"])
def test_no_program_sees_a_later_position(name: str, inputs: Inputs) -> None:
    p = Program()
    if name == "table":
        section = made.table_program(made.table_section())
    elif name == "dictionary":
        section = made.dictionary_program(made.dictionary_section())
    else:
        x = p.inputs(made.WIDTH)
        section = p.section(p.shift(x, 2) * x if name == "shift" else p.cumulative_mean(x) - x)
    decoder = ProgramDecoder.from_section(section)
    state = state_of(decoder, inputs.n_tokens)
    predicted = decoder.predict(inputs, state)
    for kept in (1, 5, 23):
        other = decoder.predict(*first_positions(inputs, state, kept, kept))
        early = (np.arange(made.POSITIONS)[None] < kept).repeat(made.SEQUENCES, 0)[inputs.scored]
        np.testing.assert_array_equal(other[early], predicted[early])
        assert (other[~early] != predicted[~early]).any()


def test_the_documentation_lists_the_language() -> None:
    """The table of opcodes and the bounds are those of the code."""
    text = Path(opcodes.__file__).with_name("LANGUAGE.md").read_text()
    assert language_table() in text
    bounds = {30: interpreter.MAX_FLOPS, 36: interpreter.MAX_SETUP_FLOPS, 18: interpreter.MAX_TOKEN_NUMBERS}
    for exponent, bound in (bounds | {27: interpreter.MAX_STATIC_NUMBERS}).items():
        assert bound == 1 << exponent
        assert f"2^{exponent}" in text
    assert f"{opcodes.MAX_INSTRUCTIONS}\ninstructions" in text
