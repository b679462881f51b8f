"""The instructions of the decoder language, and how a list of them travels: as one vector of small integers.

An instruction is the number of its opcode, then each operand as the number of instructions back from here (0: the one
before), then its attributes. The value of the last instruction is the prediction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mdl.errors import MessageError

MAX_INSTRUCTIONS = 256
LARGEST_WIDTH = 1 << 17
LONGEST = 4  # integers of the longest instruction


@dataclass(frozen=True)
class Attribute:
    """A small integer that an instruction carries, from `lowest` to `highest`."""

    name: str
    lowest: int
    highest: int


@dataclass(frozen=True)
class Opcode:
    """An instruction's name, the names of its operands, its attributes, and what it computes."""

    name: str
    operands: tuple[str, ...]
    attributes: tuple[Attribute, ...]
    meaning: str


# The order is part of the language: an opcode is sent as its place here, and small numbers are cheap.
OPCODES: tuple[Opcode, ...] = (
    Opcode("part", (), (Attribute("array", 0, 255),), "a part array, [parts, columns]"),
    Opcode("header", (), (Attribute("array", 0, 255),), "a header array behind the program's own, [rows, columns]"),
    Opcode("matmul", ("a", "b"), (), "a @ b; b is static"),
    Opcode("add", ("a", "b"), (), "a + b; an axis of length 1 is repeated"),
    Opcode("multiply", ("a", "b"), (), "a * b; an axis of length 1 is repeated"),
    Opcode("inputs", (), (Attribute("width", 1, LARGEST_WIDTH),), "the region's inputs at this position, [1, width]"),
    Opcode("transpose", ("a",), (), "a static value's rows as columns"),
    Opcode("scale", ("a",), (Attribute("quarters", -400, 400),), "a * 2^(quarters / 4)"),
    Opcode("relu", ("a",), (), "max(a, 0)"),
    Opcode("state_sparse", ("classes",), (Attribute("signed", 0, 1),), "sparse symbols, [1, parts]; a class for each"),
    Opcode(
        "state_dense", (), (Attribute("width", 0, 1 << 16),), "dense symbols, [1, width]; width 0: a column for a part"
    ),
    Opcode("state_index", (), (), "the index of a part"),
    Opcode("gather", ("index", "rows"), (), "the row of that part"),
    Opcode(
        "table",
        ("increments", "rows"),
        (),
        "the row of this token's id, 0 where there is none; ids are the increments' running sum less 1",
    ),
    Opcode(
        "points",
        ("symbols", "shifts"),
        (),
        "sign(q) (|q| - shift), the shift being that of level min(|q|, levels) in row j of `shifts` for column j",
    ),
    Opcode("exp2", ("a",), (), "2^a"),
    Opcode("subtract", ("a", "b"), (), "a - b; an axis of length 1 is repeated"),
    Opcode("divide", ("a", "b"), (), "a / b; an axis of length 1 is repeated"),
    Opcode("absolute", ("a",), (), "|a|"),
    Opcode("step", ("a",), (), "1 where a > 0, else 0"),
    Opcode("gelu", ("a",), (Attribute("tanh", 0, 1),), "a Phi(a), Phi exact (0) or by the tanh formula (1)"),
    Opcode("exp", ("a",), (), "e^a"),
    Opcode("tanh", ("a",), (), "tanh(a)"),
    Opcode("sigmoid", ("a",), (), "1 / (1 + e^-a)"),
    Opcode("sum", ("a",), (), "the sum over columns, one column"),
    Opcode("softmax", ("a",), (), "softmax over columns"),
    Opcode("layer_normalise", ("a",), (), "(a - mean) / sqrt(variance + 1e-5) over columns"),
    Opcode("rms_normalise", ("a",), (), "a / sqrt(mean of squares + 1e-5) over columns"),
    Opcode("top_k", ("a",), (Attribute("k", 1, LARGEST_WIDTH),), "a where it is among the k largest columns, else 0"),
    Opcode(
        "select",
        ("a",),
        (Attribute("first", 0, LARGEST_WIDTH), Attribute("count", 1, LARGEST_WIDTH)),
        "`count` columns from `first` on",
    ),
    Opcode(
        "shift",
        ("a",),
        (Attribute("back", 1, LARGEST_WIDTH),),
        "a as it was `back` positions earlier; 0 before the sequence and at special positions",
    ),
    Opcode("cumulative_mean", ("a",), (), "the mean of a over the sequence's explained positions up to this one"),
)


def opcode_number(name: str) -> int:
    """The place of an opcode in the language. **Raises:** `MessageError` for an unknown name."""
    for number, opcode in enumerate(OPCODES):
        if opcode.name == name:
            return number
    raise MessageError(f"no opcode {name!r}; there are: {', '.join(o.name for o in OPCODES)}")


@dataclass(frozen=True)
class Instruction:
    """An opcode with its operands, as numbers of earlier instructions, and its attributes."""

    opcode: Opcode
    operands: tuple[int, ...]
    attributes: tuple[int, ...]

    @classmethod
    def make(cls, place: int, name: str, operands: Sequence[int], attributes: Sequence[int]) -> Instruction:
        """Instruction number `place`. **Raises:** `MessageError` if an operand or an attribute is out of bounds."""
        opcode = OPCODES[opcode_number(name)]
        if len(operands) != len(opcode.operands) or len(attributes) != len(opcode.attributes):
            expected = f"{len(opcode.operands)} operands and {len(opcode.attributes)} attributes"
            raise MessageError(f"{name!r} takes {expected}, not {len(operands)} and {len(attributes)}")
        for label, operand in zip(opcode.operands, operands, strict=True):
            if not 0 <= operand < place:
                raise MessageError(
                    f"instruction {place}, {name}: operand {label!r} is value {operand}, but only values 0 to "
                    f"{place - 1} exist before it. Programs are straight-line: operands point backwards."
                )
        for attribute, value in zip(opcode.attributes, attributes, strict=True):
            if not attribute.lowest <= value <= attribute.highest:
                raise MessageError(
                    f"instruction {place}, {name}: {attribute.name} = {value} is outside {attribute.lowest} to "
                    f"{attribute.highest}"
                )
        return cls(opcode, tuple(operands), tuple(attributes))

    def integers(self, place: int) -> list[int]:
        """The instruction as it is sent from `place`: opcode, distances, attributes."""
        distances = [place - 1 - operand for operand in self.operands]
        return [opcode_number(self.opcode.name), *distances, *self.attributes]

    def text(self, place: int) -> str:
        """As a line of a listing: "v5 = multiply v3 v4"."""
        words = [f"v{operand}" for operand in self.operands]
        words += [f"{a.name}={v}" for a, v in zip(self.opcode.attributes, self.attributes, strict=True)]
        return " ".join([f"v{place} =", self.opcode.name, *words])


def to_integers(instructions: Sequence[Instruction]) -> np.ndarray:
    """A program as the integers that are sent, [length]."""
    return np.array([i for place, one in enumerate(instructions) for i in one.integers(place)], np.int64)


def from_integers(integers: np.ndarray) -> tuple[Instruction, ...]:
    """The program in a vector of integers. **Raises:** `MessageError` where it is not one."""
    if integers.size > MAX_INSTRUCTIONS * LONGEST:
        raise MessageError(
            f"a program of {integers.size} integers; at most {MAX_INSTRUCTIONS} instructions are allowed"
        )
    rest = [int(i) for i in integers]
    program: list[Instruction] = []
    position = 0
    while position < len(rest):
        place, number = len(program), rest[position]
        if place == MAX_INSTRUCTIONS:
            raise MessageError(f"a program of more than {MAX_INSTRUCTIONS} instructions")
        if not 0 <= number < len(OPCODES):
            raise MessageError(f"instruction {place}: opcode {number}, but there are {len(OPCODES)} of them")
        opcode = OPCODES[number]
        middle = position + 1 + len(opcode.operands)
        end = middle + len(opcode.attributes)
        if end > len(rest):
            raise MessageError(f"instruction {place}, {opcode.name}: the program ends in its middle")
        operands = [place - 1 - distance for distance in rest[position + 1 : middle]]
        program.append(Instruction.make(place, opcode.name, operands, rest[middle:end]))
        position = end
    if not program:
        raise MessageError("an empty program: the value of its last instruction is the prediction, and there is none")
    return tuple(program)


def language_table() -> str:
    """The opcodes as a Markdown table, with what an instruction costs under a uniform code.

    That is log2 of the number of opcodes, log2 of the number of earlier values for each operand (16 here), log2 of the
    number of values of each attribute, in bits.
    """
    lines = ["| opcode | operands | attributes | bits | value |", "| --- | --- | --- | --- | --- |"]
    for opcode in OPCODES:
        attributes = ", ".join(f"{a.name} {a.lowest}..{a.highest}" for a in opcode.attributes)
        spans = [len(OPCODES), *(16 for _ in opcode.operands), *(a.highest - a.lowest + 1 for a in opcode.attributes)]
        bits = sum(math.log2(span) for span in spans)
        meaning = opcode.meaning.replace("|", "\\|")
        lines.append(f"| `{opcode.name}` | {', '.join(opcode.operands)} | {attributes} | {bits:.0f} | {meaning} |")
    return "\n".join(lines)
