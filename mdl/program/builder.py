"""Writing a program in Python: each call appends an instruction and gives a handle of its value.

    p = Program()
    symbols = p.state_sparse(p.part(classes), signed=False)
    steps = p.transpose(p.exp2(p.scale(p.part(exponents), -8)))
    section = p.section(symbols * steps @ p.part(atoms) + p.header(bias))

An operand that does not fit is refused in the line that names it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from mdl.codes.arrays import write_shortest
from mdl.codes.bitstream import BitWriter
from mdl.errors import MessageError
from mdl.message import QuantisedArray, Section
from mdl.program.decoder import KIND, ProgramDecoder
from mdl.program.opcodes import Instruction, to_integers
from mdl.program.shapes import Scope, Type, infer


@dataclass(frozen=True, eq=False)
class Node:
    """The value of an instruction of a program that is being written; + - * / @ append further ones."""

    program: Program
    place: int

    def __add__(self, other: Node) -> Node:
        return self.program.add(self, other)

    def __sub__(self, other: Node) -> Node:
        return self.program.subtract(self, other)

    def __mul__(self, other: Node) -> Node:
        return self.program.multiply(self, other)

    def __truediv__(self, other: Node) -> Node:
        return self.program.divide(self, other)

    def __matmul__(self, other: Node) -> Node:
        return self.program.matmul(self, other)


@dataclass(eq=False)
class Program:
    """A program that is being written, with the arrays that it reads. Methods are named as the opcodes.

    Each raises `MessageError` if its operands or attributes do not fit.
    """

    instructions: list[Instruction] = field(default_factory=list)
    types: list[Type] = field(default_factory=list)
    headers: list[QuantisedArray] = field(default_factory=list)
    parts: list[QuantisedArray] = field(default_factory=list)

    def section(self, output: Node) -> Section:
        """The section whose decoder predicts `output`; instructions that it does not need are left out.

        **Raises:** `MessageError` if the program is refused as a whole.
        """
        kept = _needed(self.instructions, self._place(output))
        new = {old: place for place, old in enumerate(kept)}
        short = []
        for old in kept:
            one = self.instructions[old]
            operands = [new[o] for o in one.operands]
            short.append(Instruction.make(new[old], one.opcode.name, operands, one.attributes))
        program = QuantisedArray.from_integers(to_integers(short))
        section = Section(KIND, (program, *self.headers), tuple(self.parts))
        ProgramDecoder.from_section(section)
        return section

    def part(self, array: QuantisedArray) -> Node:
        """A part array: row i belongs to part i."""
        if self.parts and len(self.parts[0].symbols) != len(array.symbols):
            rows = len(array.symbols), len(self.parts[0].symbols)
            raise MessageError(f"a part array of {rows[0]} rows beside one of {rows[1]}: row i of each is part i")
        self.parts.append(array)
        return self._append("part", (), (len(self.parts) - 1,))

    def header(self, array: QuantisedArray) -> Node:
        """A constant, sent with the header."""
        self.headers.append(array)
        return self._append("header", (), (len(self.headers) - 1,))

    def inputs(self, width: int) -> Node:
        return self._append("inputs", (), (width,))

    def state_sparse(self, classes: Node, signed: bool) -> Node:
        return self._append("state_sparse", (classes,), (int(signed),))

    def state_dense(self, width: int = 0) -> Node:
        """`width` columns, or (0) one for each part."""
        return self._append("state_dense", (), (width,))

    def state_index(self) -> Node:
        return self._append("state_index", (), ())

    def gather(self, index: Node, rows: Node) -> Node:
        return self._append("gather", (index, rows), ())

    def table(self, increments: Node, rows: Node) -> Node:
        """The row of the current token's id; `increments` [rows, 1]: the first id plus 1, then id minus id before."""
        return self._append("table", (increments, rows), ())

    def points(self, symbols: Node, shifts: Node) -> Node:
        return self._append("points", (symbols, shifts), ())

    def matmul(self, a: Node, b: Node) -> Node:
        return self._append("matmul", (a, b), ())

    def add(self, a: Node, b: Node) -> Node:
        return self._append("add", (a, b), ())

    def subtract(self, a: Node, b: Node) -> Node:
        return self._append("subtract", (a, b), ())

    def multiply(self, a: Node, b: Node) -> Node:
        return self._append("multiply", (a, b), ())

    def divide(self, a: Node, b: Node) -> Node:
        return self._append("divide", (a, b), ())

    def transpose(self, a: Node) -> Node:
        return self._append("transpose", (a,), ())

    def scale(self, a: Node, quarters: int) -> Node:
        """a * 2^(quarters / 4)."""
        return self._append("scale", (a,), (quarters,))

    def relu(self, a: Node) -> Node:
        return self._append("relu", (a,), ())

    def absolute(self, a: Node) -> Node:
        return self._append("absolute", (a,), ())

    def step(self, a: Node) -> Node:
        return self._append("step", (a,), ())

    def gelu(self, a: Node, tanh: bool = False) -> Node:
        return self._append("gelu", (a,), (int(tanh),))

    def exp(self, a: Node) -> Node:
        return self._append("exp", (a,), ())

    def exp2(self, a: Node) -> Node:
        return self._append("exp2", (a,), ())

    def tanh(self, a: Node) -> Node:
        return self._append("tanh", (a,), ())

    def sigmoid(self, a: Node) -> Node:
        return self._append("sigmoid", (a,), ())

    def sum(self, a: Node) -> Node:
        return self._append("sum", (a,), ())

    def softmax(self, a: Node) -> Node:
        return self._append("softmax", (a,), ())

    def layer_normalise(self, a: Node) -> Node:
        return self._append("layer_normalise", (a,), ())

    def rms_normalise(self, a: Node) -> Node:
        return self._append("rms_normalise", (a,), ())

    def top_k(self, a: Node, k: int) -> Node:
        return self._append("top_k", (a,), (k,))

    def select(self, a: Node, first: int, count: int) -> Node:
        return self._append("select", (a,), (first, count))

    def shift(self, a: Node, back: int) -> Node:
        return self._append("shift", (a,), (back,))

    def cumulative_mean(self, a: Node) -> Node:
        return self._append("cumulative_mean", (a,), ())

    def _place(self, node: Node) -> int:
        if node.program is not self:
            raise MessageError("a value of another program: a program reads its own values only")
        return node.place

    def _append(self, name: str, operands: tuple[Node, ...], attributes: tuple[int, ...]) -> Node:
        place = len(self.instructions)
        one = Instruction.make(place, name, [self._place(o) for o in operands], attributes)
        shapes = tuple((a.symbols.shape[0], a.symbols.shape[1]) for a in self.headers)
        columns = tuple(a.symbols.shape[1] for a in self.parts)
        scope = Scope(shapes, columns, len(self.parts[0].symbols) if self.parts else 0)
        self.types.append(infer(one, place, tuple(self.types), scope))
        self.instructions.append(one)
        return Node(self, place)


def _needed(instructions: list[Instruction], output: int) -> list[int]:
    """The instructions that the value `output` depends on, in order; itself is the last."""
    needed = {output}
    for place in range(output, -1, -1):
        if place in needed:
            needed |= set(instructions[place].operands)
    return sorted(needed)


def prices(section: Section) -> np.ndarray:
    """Bits of each instruction under the code that the container takes for the program's integers, [instructions].

    The code's own table and the array's shape are left out; they are a few bytes.
    """
    decoder = ProgramDecoder.from_section(section)
    bits = write_shortest(BitWriter(), section.header[0].symbols[:, 0])
    lengths = [len(one.integers(place)) for place, one in enumerate(decoder.instructions)]
    return np.add.reduceat(bits, np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64))


def render(section: Section) -> str:
    """The program as text, a line an instruction: its type and its price in bits behind it."""
    decoder = ProgramDecoder.from_section(section)
    lines = [one.text(place) for place, one in enumerate(decoder.instructions)]
    width = max(len(line) for line in lines)
    rows = zip(lines, decoder.types, prices(section), strict=True)
    return "\n".join(f"{line:<{width}}   {value.text():<18} {bits:5.1f} bits" for line, value, bits in rows)
