"""The types of a program's values: axes, which parts a value depends on, and what it costs.

A value is static, computed once from the message, or belongs to a token. An axis is a number, or PARTS, or (rows only)
TOKENS. The axis of parts is told apart from plain ones even where the lengths agree: no instruction can name one part,
so that a program means the same in whatever order its parts are sent. Nothing contracts over TOKENS: only `shift` and
`cumulative_mean` reach other positions, and both reach back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from mdl.errors import MessageError
from mdl.program.opcodes import Instruction

TOKENS, PARTS = -1, -2
# Of a static value: it depends on no part; its row (or column) of part i on part i alone; on all parts.
NO_PART, OWN_PART, ALL_PARTS = 0, 1, 2
EVER = -1  # a lag: all positions up to this one
Touch = tuple[int, int]
EVERY: Touch = (-1, 0)  # every part is needed, whatever the state
MAX_TOUCHES = 64


@dataclass(frozen=True)
class Type:
    """Axes of a value, and its dependence on parts.

    **Arguments:** `needs`: of a static value; `touches`: (instruction, lag) for each way in which a token's value needs
    parts: those that the instruction names `lag` positions earlier; `support`: its columns are parts, and it is zero
    outside its touches; `sparse`: kept as a sparse matrix; `index`: a part's number, which only `gather` reads.
    """

    rows: int
    columns: int
    needs: int = NO_PART
    touches: frozenset[Touch] = frozenset()
    support: bool = False
    sparse: bool = False
    index: bool = False

    def text(self) -> str:
        """As "[tokens, 64]"."""
        return "index" if self.index else f"[{_axis(self.rows)}, {_axis(self.columns)}]"


@dataclass(frozen=True)
class Scope:
    """The arrays that a section has: shapes of its header arrays behind the program, columns of its part arrays."""

    headers: tuple[tuple[int, int], ...]
    parts: tuple[int, ...]
    n_parts: int

    def length(self, axis: int) -> int:
        """An axis in numbers; 1 for TOKENS, because costs are counted a token."""
        return {PARTS: self.n_parts, TOKENS: 1}.get(axis, axis)

    def elements(self, value: Type) -> int:
        """Numbers in a static value, or in one token's; a sparse one is as small as the state, and counts as none."""
        return 0 if value.sparse else self.length(value.rows) * self.length(value.columns)


def infer(instruction: Instruction, place: int, earlier: tuple[Type, ...], scope: Scope) -> Type:
    """The type of an instruction's value, from those of all earlier values.

    **Raises:** `MessageError` if operands do not fit.
    """
    types = tuple(earlier[operand] for operand in instruction.operands)
    name = instruction.opcode.name
    try:
        if any(t.index for t in types) and name != "gather":
            raise MessageError("an index is no number to calculate with: only `gather` reads it")
        return _limited(RULES[name](place, types, instruction.attributes, scope))
    except MessageError as error:
        shapes = ", ".join(t.text() for t in types)
        raise MessageError(f"{instruction.text(place)} ({shapes}): {error}") from error


def _axis(axis: int) -> str:
    return {TOKENS: "tokens", PARTS: "parts"}.get(axis, str(axis))


def _limited(value: Type) -> Type:
    """Too many different lags are replaced by all of them: more parts needed, never fewer."""
    if len(value.touches) <= MAX_TOUCHES:
        return value
    return replace(value, touches=frozenset((source, EVER if source >= 0 else 0) for source, _ in value.touches))


def _static(types: tuple[Type, ...]) -> None:
    if any(t.rows == TOKENS for t in types):
        raise MessageError("this operand has to be static, a value of arrays alone: nothing contracts over tokens")


def _together(a: int, b: int) -> int:
    """The axis of two that are calculated together; one of length 1 is repeated."""
    if a != b and 1 not in (a, b):
        hint = "; a plain axis never stands for that of parts" if PARTS in (a, b) else ""
        raise MessageError(f"axes {_axis(a)} and {_axis(b)} do not go together{hint}")
    return b if a == 1 else a


def _header(_: int, types: tuple[Type, ...], attributes: tuple[int, ...], scope: Scope) -> Type:
    if attributes[0] >= len(scope.headers):
        raise MessageError(f"there are {len(scope.headers)} header arrays behind the program")
    rows, columns = scope.headers[attributes[0]]
    if rows * columns == 0:
        raise MessageError(f"header array {attributes[0]} of {rows} x {columns} is empty")
    return Type(rows, columns)


def _part(_: int, types: tuple[Type, ...], attributes: tuple[int, ...], scope: Scope) -> Type:
    if attributes[0] >= len(scope.parts):
        raise MessageError(f"there are {len(scope.parts)} part arrays")
    if scope.parts[attributes[0]] == 0:
        raise MessageError(f"part array {attributes[0]} has no columns")
    return Type(PARTS, scope.parts[attributes[0]], OWN_PART)


def _inputs(_: int, types: tuple[Type, ...], attributes: tuple[int, ...], scope: Scope) -> Type:
    return Type(TOKENS, attributes[0])


def _state_sparse(place: int, types: tuple[Type, ...], attributes: tuple[int, ...], scope: Scope) -> Type:
    if (types[0].rows, types[0].columns, types[0].needs) != (PARTS, 1, OWN_PART):
        raise MessageError("classes of sparse symbols are one column of a part array, [parts, 1]")
    return Type(TOKENS, PARTS, touches=frozenset({(place, 0)}), support=True, sparse=True)


def _state_dense(place: int, types: tuple[Type, ...], attributes: tuple[int, ...], scope: Scope) -> Type:
    if attributes[0]:
        return Type(TOKENS, attributes[0])
    if not scope.parts:
        raise MessageError("width 0 is a column for each part, and there are no part arrays")
    return Type(TOKENS, PARTS, touches=frozenset({(place, 0)}), support=True)


def _state_index(place: int, types: tuple[Type, ...], attributes: tuple[int, ...], scope: Scope) -> Type:
    if not scope.n_parts:
        raise MessageError("an index needs parts to choose from, and there are none")
    return Type(TOKENS, 1, touches=frozenset({(place, 0)}), index=True)


def _gather(_: int, types: tuple[Type, ...], attributes: tuple[int, ...], scope: Scope) -> Type:
    index, rows = types
    if not index.index:
        raise MessageError("the first operand has to be an index")
    if rows.rows != PARTS:
        raise MessageError("rows are gathered from a value of [parts, columns]")
    return Type(TOKENS, rows.columns, touches=index.touches | ({EVERY} if rows.needs == ALL_PARTS else set()))


def _table(place: int, types: tuple[Type, ...], attributes: tuple[int, ...], scope: Scope) -> Type:
    _static(types)
    increments, rows = types
    if increments.columns != 1 or increments.rows != rows.rows or rows.columns == PARTS:
        raise MessageError("a table needs increments [rows, 1] and rows [rows, columns], both of parts or neither")
    if ALL_PARTS in (increments.needs, rows.needs):
        return Type(TOKENS, rows.columns, touches=frozenset({EVERY}))
    return Type(TOKENS, rows.columns, touches=frozenset({(place, 0)} if rows.rows == PARTS else ()))


def _points(_: int, types: tuple[Type, ...], attributes: tuple[int, ...], scope: Scope) -> Type:
    symbols, shifts = types
    _static((shifts,))
    if symbols.rows != TOKENS or symbols.columns != shifts.rows or shifts.columns == PARTS:
        raise MessageError("points need a token's symbols [tokens, columns] and shifts [columns, levels]")
    spared = shifts.needs == NO_PART or (shifts.needs == OWN_PART and symbols.support)
    return replace(symbols, sparse=False, touches=symbols.touches | (set() if spared else {EVERY}))


def _matmul(_: int, types: tuple[Type, ...], attributes: tuple[int, ...], scope: Scope) -> Type:
    a, b = types
    _static((b,))
    if a.columns != b.rows:
        raise MessageError(f"columns {_axis(a.columns)} of the first have to be the rows of the second")
    if a.rows == TOKENS:
        spared = b.needs == NO_PART or (b.needs == OWN_PART and a.columns == PARTS and a.support)
        return Type(TOKENS, b.columns, touches=a.touches | (set() if spared else {EVERY}))
    needs = max(a.needs, b.needs)
    return _checked(Type(a.rows, b.columns, ALL_PARTS if a.columns == PARTS else needs))


def _checked(value: Type) -> Type:
    if value.rows == value.columns == PARTS:
        raise MessageError("a value cannot have parts along both axes")
    return value


def _zero_with(a: Type, b: Type) -> bool:
    """Whether a * b needs of b no part outside a's touches: a is zero there."""
    return a.support and b.rows != TOKENS and b.needs <= OWN_PART


def _elementwise(types: tuple[Type, ...], product: bool, additive: bool) -> Type:
    a, b = types
    rows, columns = _together(a.rows, b.rows), _together(a.columns, b.columns)
    if rows != TOKENS:
        return _checked(Type(rows, columns, max(a.needs, b.needs)))
    touches = a.touches | b.touches
    for one, other in ((a, b), (b, a)):
        if other.rows != TOKENS and other.needs != NO_PART and not (product and _zero_with(one, other)):
            touches |= {EVERY}
    support = (product and (a.support or b.support)) or (additive and a.support and b.support)
    return Type(TOKENS, columns, touches=touches, support=support, sparse=product and (a.sparse or b.sparse))


def _multiply(_: int, types: tuple[Type, ...], attributes: tuple[int, ...], scope: Scope) -> Type:
    return _elementwise(types, product=True, additive=False)


def _add(_: int, types: tuple[Type, ...], attributes: tuple[int, ...], scope: Scope) -> Type:
    return _elementwise(types, product=False, additive=True)


def _divide(_: int, types: tuple[Type, ...], attributes: tuple[int, ...], scope: Scope) -> Type:
    return _elementwise(types, product=False, additive=False)


def _transpose(_: int, types: tuple[Type, ...], attributes: tuple[int, ...], scope: Scope) -> Type:
    _static(types)
    return replace(types[0], rows=types[0].columns, columns=types[0].rows)


def _same(_: int, types: tuple[Type, ...], attributes: tuple[int, ...], scope: Scope) -> Type:
    """Functions that are 0 at 0."""
    return types[0]


def _anywhere(_: int, types: tuple[Type, ...], attributes: tuple[int, ...], scope: Scope) -> Type:
    """Functions that are not 0 at 0."""
    return replace(types[0], support=False, sparse=False)


def _mixing(_: int, types: tuple[Type, ...], attributes: tuple[int, ...], scope: Scope) -> Type:
    """Functions of a whole row."""
    needs = ALL_PARTS if types[0].columns == PARTS and types[0].needs else types[0].needs
    return replace(types[0], needs=needs, support=False, sparse=False)


def _sum(place: int, types: tuple[Type, ...], attributes: tuple[int, ...], scope: Scope) -> Type:
    return replace(_mixing(place, types, attributes, scope), columns=1)


def _top_k(place: int, types: tuple[Type, ...], attributes: tuple[int, ...], scope: Scope) -> Type:
    return replace(_mixing(place, types, attributes, scope), support=types[0].support)


def _select(_: int, types: tuple[Type, ...], attributes: tuple[int, ...], scope: Scope) -> Type:
    if types[0].columns == PARTS:
        raise MessageError("columns that are parts cannot be selected by number")
    if sum(attributes) > types[0].columns:
        raise MessageError(f"columns {attributes[0]} to {sum(attributes) - 1} of {types[0].columns}")
    return replace(types[0], columns=attributes[1])


def _back(types: tuple[Type, ...], lag: int) -> Type:
    if types[0].rows != TOKENS:
        raise MessageError("a static value has no earlier positions")
    moved = {(s, EVER if EVER in (lag, old) else old + lag) if s >= 0 else EVERY for s, old in types[0].touches}
    return replace(types[0], touches=frozenset(moved))


def _shift(_: int, types: tuple[Type, ...], attributes: tuple[int, ...], scope: Scope) -> Type:
    return _back(types, attributes[0])


def _cumulative_mean(_: int, types: tuple[Type, ...], attributes: tuple[int, ...], scope: Scope) -> Type:
    return replace(_back(types, EVER), sparse=False)


Rule = Callable[[int, tuple[Type, ...], tuple[int, ...], Scope], Type]
RULES: Mapping[str, Rule] = {
    "header": _header,
    "part": _part,
    "inputs": _inputs,
    "state_sparse": _state_sparse,
    "state_dense": _state_dense,
    "state_index": _state_index,
    "gather": _gather,
    "table": _table,
    "points": _points,
    "matmul": _matmul,
    "add": _add,
    "subtract": _add,
    "multiply": _multiply,
    "divide": _divide,
    "transpose": _transpose,
    "select": _select,
    "shift": _shift,
    "cumulative_mean": _cumulative_mean,
    "sum": _sum,
    "top_k": _top_k,
    "relu": _same,
    "scale": _same,
    "absolute": _same,
    "step": _same,
    "gelu": _same,
    "tanh": _same,
    "exp": _anywhere,
    "exp2": _anywhere,
    "sigmoid": _anywhere,
    "softmax": _mixing,
    "layer_normalise": _mixing,
    "rms_normalise": _mixing,
}


def flops(
    instruction: Instruction, value: Type, operands: tuple[Type, ...], scope: Scope, active: float = 1.0
) -> float:
    """Floating-point operations of one instruction, a token or (static) once; a multiply-add is two.

    An elementary function counts as one, normalising functions as 4 an element, `top_k` as 8. `active` is the number of
    symbols that are on, for values kept sparse.
    """
    name = instruction.opcode.name
    size = active if value.sparse else float(math.prod(scope.length(a) for a in (value.rows, value.columns)))
    if name == "matmul":
        a, b = operands
        inner = active if a.sparse else scope.length(b.rows)
        return 2.0 * inner * scope.length(a.rows) * scope.length(b.columns)
    if name == "sum":
        return float(active if operands[0].sparse else scope.elements(operands[0]))
    free = ("header", "part", "inputs", "state_sparse", "state_dense", "state_index")
    if name in (*free, "gather", "table", "transpose", "select", "shift"):
        return 0.0
    weights = {"softmax": 4.0, "layer_normalise": 4.0, "rms_normalise": 4.0, "top_k": 8.0, "points": 3.0}
    return weights.get(name, 2.0 if name == "cumulative_mean" else 1.0) * size
