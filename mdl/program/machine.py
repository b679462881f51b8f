"""What each instruction computes: float32 arrays, values of tokens with one row for each explained position.

Arithmetic follows IEEE 754 silently: a division by zero gives an infinity, and the decoder refuses a prediction that is
not finite. Zeros outside a sparse value's support stay zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import scipy.sparse
import scipy.special

from mdl.errors import MessageError
from mdl.program.opcodes import Instruction

LARGEST_ID = 1 << 31
QUARTERS = 4
EPSILON = 1e-5
# An array, or a csr_array, which has no type to check by.
Value: TypeAlias = Any


@dataclass(frozen=True)
class Tape:
    """What a program reads for a block of whole sequences with n explained positions.

    **Arguments:** `tokens`, `scored` [sequences, positions]; `values` [sequences, positions, width] or None;
    `symbols`: what each state instruction reads, a row a position.
    """

    tokens: np.ndarray
    scored: np.ndarray
    values: np.ndarray | None
    symbols: Mapping[int, Value]

    @cached_property
    def numbers(self) -> np.ndarray:
        """The place of each position among the explained ones, [sequences, positions]; -1 for the others."""
        return np.where(self.scored, np.cumsum(self.scored).reshape(self.scored.shape) - 1, -1)

    def previous(self, back: int) -> np.ndarray:
        """For each explained position the place of that `back` positions earlier, [n]; -1 where there is none."""
        earlier = np.full_like(self.numbers, -1)
        if back < earlier.shape[1]:
            earlier[:, back:] = self.numbers[:, :-back]
        return earlier[self.scored]

    def sequences(self) -> list[slice]:
        """The explained positions of each sequence."""
        ends = np.cumsum(self.scored.sum(1))
        return [slice(int(a), int(b)) for a, b in zip(np.concatenate([[0], ends[:-1]]), ends, strict=True)]


def ids_of(increments: np.ndarray) -> np.ndarray:
    """Increasing token ids from a table's increments [rows, 1]. **Raises:** `MessageError` unless they are integers."""
    with np.errstate(all="ignore"):
        whole = np.rint(increments[:, 0].astype(np.float64))
    if not ((whole == increments[:, 0]) & (whole >= 1)).all() or whole.sum() > LARGEST_ID:
        raise MessageError(
            f"table: the increments of token ids have to be integers of at least 1 with a sum of at most {LARGEST_ID}: "
            "ids increase from row to row"
        )
    return np.cumsum(whole.astype(np.int64)) - 1


def rows_found(ids: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The row of each token's id, and whether there is one, [n]."""
    if not len(ids):
        return np.zeros(len(tokens), np.int64), np.zeros(len(tokens), bool)
    position = np.minimum(np.searchsorted(ids, tokens), len(ids) - 1)
    return position, ids[position] == tokens


def execute(
    instruction: Instruction, place: int, operands: tuple[Value, ...], tape: Tape | None, arrays: Arrays
) -> Value:
    """The value of one instruction, number `place`. `tape` is None while static values are computed."""
    name, attributes = instruction.opcode.name, instruction.attributes
    with np.errstate(all="ignore"):
        if name in ("part", "header"):
            return (arrays.parts if name == "part" else arrays.headers)[attributes[0]]
        if tape is not None and place in tape.symbols:
            return tape.symbols[place]
        if name in READERS:
            assert tape is not None
            return READERS[name](tape, operands, attributes)
        if name in ELEMENTWISE and scipy.sparse.issparse(operands[0]):
            return _with_data(operands[0], ELEMENTWISE[name](operands[0].data, attributes))
        if name in ELEMENTWISE:
            return ELEMENTWISE[name](operands[0], attributes)
        if name == "multiply":
            return _multiply(*operands)
        if name == "matmul":
            return np.asarray(operands[0] @ operands[1], np.float32)
        return DENSE[name](*[_dense(o) for o in operands], *attributes)


@dataclass(frozen=True)
class Arrays:
    """The section's arrays in float32: those of the header behind the program, and those of parts."""

    headers: tuple[np.ndarray, ...]
    parts: tuple[np.ndarray, ...]


def _dense(value: Value) -> np.ndarray:
    return value.toarray() if scipy.sparse.issparse(value) else np.asarray(value)


def _with_data(value: scipy.sparse.csr_array, data: np.ndarray) -> scipy.sparse.csr_array:
    return scipy.sparse.csr_array((data, value.indices, value.indptr), shape=value.shape)


def _multiply(a: Value, b: Value) -> Value:
    if scipy.sparse.issparse(b):
        a, b = b, a
    if not scipy.sparse.issparse(a):
        return np.asarray(a * b)
    if scipy.sparse.issparse(b):
        return scipy.sparse.csr_array(a.multiply(b))
    factor = np.broadcast_to(b, a.shape)
    rows = np.repeat(np.arange(a.shape[0]), np.diff(a.indptr))
    return _with_data(a, a.data * factor[rows, a.indices])


def _inputs(tape: Tape, operands: tuple[Value, ...], attributes: tuple[int, ...]) -> Value:
    if tape.values is None:
        raise MessageError(
            "the program reads the region's inputs, and this region's are token ids alone. The explanation belongs to "
            "another region."
        )
    if tape.values.shape[-1] != attributes[0]:
        raise MessageError(
            f"the program reads region inputs of width {attributes[0]}; here they have {tape.values.shape[-1]}"
        )
    return tape.values[tape.scored].astype(np.float32)


def _gather(tape: Tape, operands: tuple[Value, ...], attributes: tuple[int, ...]) -> Value:
    index, rows = operands
    return rows[_dense(index)]


def _table(tape: Tape, operands: tuple[Value, ...], attributes: tuple[int, ...]) -> Value:
    increments, rows = (_dense(o) for o in operands)
    position, found = rows_found(ids_of(increments), tape.tokens[tape.scored])
    out = np.zeros((len(position), rows.shape[1]), np.float32)
    out[found] = rows[position[found]]
    return out


def _shift(tape: Tape, operands: tuple[Value, ...], attributes: tuple[int, ...]) -> Value:
    earlier = tape.previous(attributes[0])
    here = np.flatnonzero(earlier >= 0)
    if scipy.sparse.issparse(operands[0]):
        ones = np.ones(len(here), np.float32)
        chosen = scipy.sparse.csr_array((ones, (here, earlier[here])), shape=(len(earlier), len(earlier)))
        return scipy.sparse.csr_array(chosen @ operands[0])
    out = np.zeros_like(operands[0])
    out[here] = operands[0][earlier[here]]
    return out


def _cumulative_mean(tape: Tape, operands: tuple[Value, ...], attributes: tuple[int, ...]) -> Value:
    value = _dense(operands[0])
    out = np.empty_like(value)
    for one in tape.sequences():
        count = np.arange(1, one.stop - one.start + 1)[:, None]
        out[one] = np.cumsum(value[one], 0, dtype=np.float64) / count
    return out


def _points(symbols: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    size = np.abs(symbols)
    level = np.minimum(np.nan_to_num(size), np.float32(shifts.shape[1])).astype(np.int64)
    padded = np.concatenate([np.zeros((len(shifts), 1), np.float32), shifts], 1)
    return np.sign(symbols) * (size - padded[np.arange(len(shifts)), level])


def _softmax(a: np.ndarray) -> np.ndarray:
    powers = np.exp(a - a.max(-1, keepdims=True, initial=-np.inf))
    return powers / powers.sum(-1, keepdims=True)


def _layer_normalise(a: np.ndarray) -> np.ndarray:
    centred = a - a.sum(-1, keepdims=True) / np.float32(max(a.shape[-1], 1))
    return _rms_normalise(centred)


def _rms_normalise(a: np.ndarray) -> np.ndarray:
    power = np.square(a).sum(-1, keepdims=True) / np.float32(max(a.shape[-1], 1))
    return a / np.sqrt(power + np.float32(EPSILON))


def _top_k(a: np.ndarray, k: int) -> np.ndarray:
    """Those that equal the k-th largest all stay, so that the order of columns decides nothing."""
    if k >= a.shape[-1]:
        return a
    least = np.partition(a, a.shape[-1] - k, axis=-1)[..., a.shape[-1] - k, None]
    return np.where(a >= least, a, np.float32(0))


def _sum(a: np.ndarray) -> np.ndarray:
    return np.asarray(a.sum(-1, keepdims=True))


def _select(a: np.ndarray, first: int, count: int) -> np.ndarray:
    return a[:, first : first + count]


def _relu(a: np.ndarray, attributes: tuple[int, ...]) -> np.ndarray:
    return np.maximum(a, np.float32(0))


def _scale(a: np.ndarray, attributes: tuple[int, ...]) -> np.ndarray:
    return a * np.float32(2.0 ** (attributes[0] / QUARTERS))


def _absolute(a: np.ndarray, attributes: tuple[int, ...]) -> np.ndarray:
    return np.abs(a)


def _step(a: np.ndarray, attributes: tuple[int, ...]) -> np.ndarray:
    return (a > 0).astype(np.float32)


def _tanh(a: np.ndarray, attributes: tuple[int, ...]) -> np.ndarray:
    return np.tanh(a)


def _gelu(a: np.ndarray, attributes: tuple[int, ...]) -> np.ndarray:
    if attributes[0]:
        return np.float32(0.5) * a * (1 + np.tanh(np.float32(np.sqrt(2 / np.pi)) * (a + np.float32(0.044715) * a**3)))
    return np.asarray(a * scipy.special.ndtr(a), np.float32)


READERS: Mapping[str, Callable[[Tape, tuple[Value, ...], tuple[int, ...]], Value]] = {
    "inputs": _inputs,
    "gather": _gather,
    "table": _table,
    "shift": _shift,
    "cumulative_mean": _cumulative_mean,
}
# Functions that are 0 at 0: of a sparse value only what is on is computed.
ELEMENTWISE: Mapping[str, Callable[[np.ndarray, tuple[int, ...]], np.ndarray]] = {
    "relu": _relu,
    "scale": _scale,
    "absolute": _absolute,
    "step": _step,
    "gelu": _gelu,
    "tanh": _tanh,
}
DENSE: Mapping[str, Callable[..., np.ndarray]] = {
    "add": np.add,
    "subtract": np.subtract,
    "divide": np.divide,
    "transpose": np.transpose,
    "exp": np.exp,
    "exp2": np.exp2,
    "sigmoid": scipy.special.expit,
    "sum": _sum,
    "softmax": _softmax,
    "layer_normalise": _layer_normalise,
    "rms_normalise": _rms_normalise,
    "top_k": _top_k,
    "points": _points,
    "select": _select,
}
