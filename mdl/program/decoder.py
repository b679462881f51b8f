"""The fixed interpreter: a decoder whose program came in the message.

    section = header (program [length, 1] | constants), parts (row i of each is part i)

Everything about a program is checked before it runs: types, operands, bounds on what it computes and holds. A program
cannot loop, read a file, see a later position, or name a part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy.sparse

from mdl.alphabets import Alphabet, DenseAlphabet, IndexAlphabet, JoinedAlphabet, NoAlphabet, SparseAlphabet
from mdl.errors import ExplanationError, MessageError
from mdl.message import Section
from mdl.program.machine import Arrays, Tape, Value, execute, ids_of, rows_found
from mdl.program.opcodes import Instruction, from_integers
from mdl.program.shapes import EVER, EVERY, NO_PART, PARTS, TOKENS, Scope, Touch, Type, flops, infer
from mdl.protocols import Inputs
from mdl.state import DenseState, IndexState, JoinedState, SparseState, State

KIND = "program"
MAX_FLOPS = 1 << 30  # a token
MAX_SETUP_FLOPS = 1 << 36  # once
MAX_TOKEN_NUMBERS = 1 << 18  # of all values of one token together: 1 MiB
MAX_STATIC_NUMBERS = 1 << 27  # of all static values together: 512 MiB
MAX_CLASSES = 256
BLOCK_NUMBERS = 1 << 25  # token values held at a time, unless one sequence has more
STATES = ("state_sparse", "state_dense", "state_index")


@dataclass(frozen=True)
class ProgramDecoder:
    """Runs a program of the message: `instructions`, the types of their values, and the values that are static."""

    instructions: tuple[Instruction, ...]
    types: tuple[Type, ...]
    scope: Scope
    arrays: Arrays
    static: dict[int, np.ndarray]

    @classmethod
    def from_section(cls, section: Section) -> ProgramDecoder:
        """Header: program [length, 1], step 1, then constants. Parts: whatever the program reads.

        **Raises:** `MessageError` if it is no program, its values do not fit together, or it asks for too much.
        """
        instructions = from_integers(_program_of(section))
        with np.errstate(all="ignore"):  # a step of 2^1000 is an infinity, and refused with what it leads to
            headers, parts = (tuple(a.values() for a in group) for group in (section.header[1:], section.parts))
        shapes = tuple((a.shape[0], a.shape[1]) for a in headers)
        scope = Scope(shapes, tuple(a.shape[1] for a in parts), section.n_parts)
        types: tuple[Type, ...] = ()
        for place, instruction in enumerate(instructions):
            types += (infer(instruction, place, types, scope),)
        check_whole(instructions, types)
        check_caps(instructions, types, scope)
        arrays = Arrays(headers, parts)
        return cls(instructions, types, scope, arrays, _static_values(instructions, types, arrays))

    @property
    def alphabet(self) -> Alphabet:
        """What the program is told: that of its state instruction, or of several, one after the other."""
        found = [self._alphabet(place) for place in self._state_places()]
        if len(found) > 1:
            return JoinedAlphabet(tuple(found))
        return found[0] if found else NoAlphabet()

    def predict(self, inputs: Inputs, state: State) -> np.ndarray:
        """The region's outputs at the scored positions, float32 [n, d].

        **Raises:** `MessageError` if the state is not of the program's alphabet, the region's inputs are not what it
        reads, it takes too many operations for this state, or the result is not finite.
        """
        symbols = self._symbols(inputs, state)
        spent = self.flops_per_token(inputs, state)
        if spent > MAX_FLOPS:
            raise MessageError(_too_much("operations a token with this state", spent, MAX_FLOPS))
        blocks = _blocks(
            inputs, max(1, BLOCK_NUMBERS // max(1, _token_numbers(self.instructions, self.types, self.scope)))
        )
        outputs = [self._run(_tape(inputs, symbols, *block)) for block in blocks]
        width = self.types[-1].columns
        output = np.concatenate(outputs) if outputs else np.zeros((0, width), np.float32)
        if not np.isfinite(output).all():
            bad = int((~np.isfinite(output)).any(1).sum())
            raise MessageError(
                f"the program's prediction is not finite for {bad} of {len(output)} tokens: it overflows or divides "
                "by zero"
            )
        return output

    def touched(self, inputs: Inputs, state: State) -> scipy.sparse.csr_array | None:
        """The parts that each token's prediction needs, [n, n_parts], those of earlier positions that it reaches back
        to among them; None if a token needs all."""
        last, n_parts = self.types[-1], self.scope.n_parts
        if EVERY in last.touches or (last.rows != TOKENS and last.needs != NO_PART) or not self.scope.parts:
            return None
        symbols = self._symbols(inputs, state)
        tape = Tape(inputs.tokens, inputs.scored, inputs.values, symbols)
        total = scipy.sparse.csr_array((inputs.n_tokens, n_parts), dtype=np.int32)
        for touch in sorted(last.touches):
            total = total + self._touch(tape, touch)
        return scipy.sparse.csr_array(total != 0)

    def flops_per_token(self, inputs: Inputs, state: State) -> float:
        """Operations a token of `predict`, counted from the instructions and the number of symbols that are on."""
        first = state.streams[0] if isinstance(state, JoinedState) else state
        active = len(first.values) / max(state.n_tokens, 1) if isinstance(first, SparseState) else 1.0
        return _flops(self.instructions, self.types, self.scope, active, static=False)

    def _state_places(self) -> list[int]:
        return [place for place, one in enumerate(self.instructions) if one.opcode.name in STATES]

    def _alphabet(self, place: int) -> Alphabet:
        """Of one state instruction."""
        one = self.instructions[place]
        if one.opcode.name == "state_index":
            return IndexAlphabet(self.scope.n_parts)
        if one.opcode.name == "state_dense":
            columns = self.types[place].columns
            return DenseAlphabet(self.scope.length(columns), columns == PARTS)
        return SparseAlphabet(_classes(self.static[one.operands[0]]), bool(one.attributes[0]))

    def _symbols(self, inputs: Inputs, state: State) -> dict[int, Value]:
        """The symbols that each state instruction reads, a row a token.

        **Raises:** `MessageError` if the state is not of the program's alphabet.
        """
        places = self._state_places()
        try:
            accepted = self.alphabet.accept(state, inputs.n_tokens)
        except ExplanationError as error:
            raise MessageError(f"the program cannot read this state: {error}") from error
        streams = accepted.streams if isinstance(accepted, JoinedState) else (accepted,)
        return {place: _rows(stream) for place, stream in zip(places, streams, strict=False)}

    def _run(self, tape: Tape) -> np.ndarray:
        """The prediction for a block of sequences; a value is dropped after its last use."""
        last_use = {operand: place for place, one in enumerate(self.instructions) for operand in one.operands}
        values: dict[int, Value] = {}
        for place, one in enumerate(self.instructions):
            if self.types[place].rows != TOKENS:
                continue
            operands = tuple(self.static[o] if o in self.static else values[o] for o in one.operands)
            values[place] = execute(one, place, operands, tape, self.arrays)
            for operand in one.operands:
                if last_use[operand] == place:
                    values.pop(operand, None)
        last = len(self.instructions) - 1
        n = int(tape.scored.sum())
        output = values[last] if last in values else self.static[last]
        return np.broadcast_to(np.asarray(output, np.float32), (n, output.shape[1]))

    def _touch(self, tape: Tape, touch: Touch) -> scipy.sparse.csr_array:
        """Parts that instruction `touch[0]` names at each position, or at earlier ones, int32 [n, n_parts]."""
        source, lag = touch
        found = self._named(tape, source)
        n = found.shape[0]
        if lag == EVER:
            starts = np.concatenate([np.full(s.stop - s.start, s.start) for s in tape.sequences()])
            counts = np.arange(n) - starts + 1
            columns = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts - starts, counts)
            rows = np.repeat(np.arange(n), counts)
        else:
            earlier = np.arange(n) if lag == 0 else tape.previous(lag)
            rows = np.flatnonzero(earlier >= 0)
            columns = earlier[rows]
        reach = scipy.sparse.csr_array((np.ones(len(rows), np.int32), (rows, columns)), shape=(n, n))
        return scipy.sparse.csr_array(reach @ found)

    def _named(self, tape: Tape, source: int) -> scipy.sparse.csr_array:
        one, n_parts = self.instructions[source], self.scope.n_parts
        if one.opcode.name == "table":
            position, found = rows_found(ids_of(self.static[one.operands[0]]), tape.tokens[tape.scored])
            rows, columns = np.flatnonzero(found), position[found]
            return scipy.sparse.csr_array((np.ones(len(rows), np.int32), (rows, columns)), shape=(len(found), n_parts))
        if one.opcode.name == "state_index":
            indices = np.asarray(tape.symbols[source])
            ones = np.ones(len(indices), np.int32)
            return scipy.sparse.csr_array((ones, (np.arange(len(indices)), indices)), shape=(len(indices), n_parts))
        return scipy.sparse.csr_array(scipy.sparse.csr_array(tape.symbols[source]) != 0).astype(np.int32)


def _rows(state: State) -> Value:
    """A state's symbols, a row a token."""
    if isinstance(state, SparseState):
        return state.matrix().astype(np.float32)
    if isinstance(state, IndexState):
        return state.indices
    assert isinstance(state, DenseState)
    return state.values.astype(np.float32)


def check_whole(instructions: tuple[Instruction, ...], types: tuple[Type, ...]) -> None:
    """What no single instruction shows. **Raises:** `MessageError`."""
    used = {operand for one in instructions for operand in one.operands}
    idle = [place for place in range(len(instructions) - 1) if place not in used]
    if idle:
        raise MessageError(f"the values of instructions {idle} are never used: a program carries nothing but its work")
    last = types[-1]
    if last.index or last.columns == PARTS or last.rows not in (TOKENS, 1):
        raise MessageError(f"the last value is {last.text()}; a prediction is [tokens, width], or [1, width] for all")
    names = [one.opcode.name for one in instructions]
    states = [place for place, name in enumerate(names) if name in STATES]
    beside = [place for place in states[1:] if names[place] != "state_dense" or types[place].columns == PARTS]
    if beside or (len(states) > 1 and names[states[0]] == "state_dense"):
        raise MessageError(
            f"a program reads the states {[names[p] for p in states]}: after sparse symbols or an index only dense "
            "ones may follow, that belong to no parts. The value of a state can be used again; it is read once."
        )
    over_parts = [p for p, n in enumerate(names) if n == "table" and types[instructions[p].operands[1]].rows == PARTS]
    if over_parts and ("state_sparse" in names or "state_index" in names):
        raise MessageError(
            "a table whose rows are parts needs them in the order of token ids, and sparse and index states need them "
            "in the order of first use: put the table's arrays into the header"
        )


def check_caps(instructions: tuple[Instruction, ...], types: tuple[Type, ...], scope: Scope) -> None:
    """Bounds on time and memory, known before anything runs. **Raises:** `MessageError` if one is exceeded."""
    static = sum(scope.elements(t) for t in types if t.rows != TOKENS)
    bounds = (
        ("numbers in static values", static, MAX_STATIC_NUMBERS),
        ("numbers in the values of one token", _token_numbers(instructions, types, scope), MAX_TOKEN_NUMBERS),
        ("operations once", _flops(instructions, types, scope, 1.0, static=True), MAX_SETUP_FLOPS),
        ("operations a token", _flops(instructions, types, scope, 1.0, static=False), MAX_FLOPS),
    )
    for what, amount, most in bounds:
        if amount > most:
            raise MessageError(_too_much(what, float(amount), most))


def _too_much(what: str, amount: float, most: int) -> str:
    return (
        f"the program takes {amount:.4g} {what}; at most {most} are allowed. Computing is not charged in bits, so it "
        "is bounded: a decoder that trains, searches or runs a whole model is refused. Use smaller arrays."
    )


def _program_of(section: Section) -> np.ndarray:
    """The integers of the program, [length]."""
    if not section.header:
        raise MessageError("a 'program' section begins with a header array, the program; this one has none")
    program = section.header[0]
    if program.symbols.ndim != 2 or program.symbols.shape[1] != 1 or not program.plain:
        raise MessageError(f"a program is a column of integers of step 1, not an array {program.symbols.shape}")
    return program.symbols[:, 0]


def _flops(
    instructions: tuple[Instruction, ...], types: tuple[Type, ...], scope: Scope, active: float, static: bool
) -> float:
    return math.fsum(
        flops(one, value, tuple(types[o] for o in one.operands), scope, active)
        for one, value in zip(instructions, types, strict=True)
        if (value.rows != TOKENS) == static
    )


def _token_numbers(instructions: tuple[Instruction, ...], types: tuple[Type, ...], scope: Scope) -> int:
    """Numbers in all values of a token, sparse ones counted where an instruction makes them dense."""
    total = 0
    for one, value in zip(instructions, types, strict=True):
        if value.rows == TOKENS:
            made_dense = not value.sparse and one.opcode.name != "matmul" and any(types[o].sparse for o in one.operands)
            total += scope.elements(value) + (scope.n_parts if made_dense else 0)
    return total


def _static_values(
    instructions: tuple[Instruction, ...], types: tuple[Type, ...], arrays: Arrays
) -> dict[int, np.ndarray]:
    """All static values, and a check of those that name things: ids of tables, classes of symbols."""
    static: dict[int, np.ndarray] = {}
    for place, one in enumerate(instructions):
        if types[place].rows != TOKENS:
            static[place] = execute(one, place, tuple(static[o] for o in one.operands), None, arrays)
        elif one.opcode.name == "table":
            ids_of(static[one.operands[0]])
        elif one.opcode.name == "state_sparse":
            _classes(static[one.operands[0]])
    return static


def _classes(column: np.ndarray) -> np.ndarray:
    values = column[:, 0]
    with np.errstate(invalid="ignore"):
        fine = (values == np.rint(values)) & (values >= 0) & (values < MAX_CLASSES)
    if not fine.all():
        raise MessageError(f"classes of sparse symbols are integers from 0 to {MAX_CLASSES - 1}; these are not")
    return values.astype(np.int64)


def _blocks(inputs: Inputs, most: int) -> list[tuple[slice, slice]]:
    """Whole sequences of together at most `most` explained positions (or one sequence), and their places among all."""
    ends = np.concatenate([[0], np.cumsum(inputs.scored.sum(1))]).astype(np.int64)
    blocks, first = [], 0
    while first < len(ends) - 1:
        last = max(int(np.searchsorted(ends, ends[first] + most, side="right")) - 1, first + 1)
        blocks.append((slice(first, last), slice(int(ends[first]), int(ends[last]))))
        first = last
    return blocks


def _tape(inputs: Inputs, symbols: dict[int, Value], sequences: slice, places: slice) -> Tape:
    values = None if inputs.values is None else inputs.values[sequences]
    own = {place: rows[places] for place, rows in symbols.items()}
    return Tape(inputs.tokens[sequences], inputs.scored[sequences], values, own)
