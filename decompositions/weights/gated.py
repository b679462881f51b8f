r"""Components of weights, each on or off for a token: the receiver's side.

    W_T(token) = rest_T + sum over components c that are on of  P_c,T

A component's part of a matrix is a sum of rank-one terms V U^T, or a matrix of its own where that is fewer numbers. Who
decides which are on: the sender, by a list of indices for each token (state); the receiver, by SPD's gates on what the
explained region itself computes (a program, charged once, causal because it sees one token); or nobody, all are on.

Part i is component i, paid for when the first token has it on. What every token needs (the rest, tables, biases; under
gates the V that they read, and their own weights) is the header's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse

from decompositions.weights.curvature import BATCH_TOKENS, batches_of, device
from decompositions.weights.dense import architecture
from decompositions.weights.gating import GateParameters, gate_values, hard
from mdl.alphabets import Alphabet, NoAlphabet, SparseAlphabet
from mdl.errors import MessageError
from mdl.message import QuantisedArray, Section
from mdl.models.networks import Network
from mdl.protocols import Inputs
from mdl.state import SparseState, State

KIND = "parts"  # its letters are paid for in every message
INDICES, PROGRAM, STATIC = range(3)
MODES = ("indices", "program", "static")
MOST = 1 << 20
FIELDS = (
    3  # of a matrix, in the layout: whether a rest is sent, rank-one terms a component, whether it has its own matrix
)


@dataclass(frozen=True)
class Layout:
    """What a section holds: the gates' mode, how many components, and of each matrix FIELDS integers."""

    mode: int
    components: int
    matrices: np.ndarray

    def integers(self) -> QuantisedArray:
        row = np.concatenate([[self.mode, self.components], self.matrices.ravel()]).astype(np.int64)
        return QuantisedArray.from_integers(row[None])

    @classmethod
    def read(cls, array: QuantisedArray) -> Layout:
        """**Raises:** `MessageError` for what is no layout."""
        columns = array.symbols.shape[1]
        if len(array.symbols) != 1 or columns < 2 or (columns - 2) % FIELDS:
            raise MessageError(f"'{KIND}': a layout of {array.symbols.shape} integers")
        row = array.integers(f"the layout of a '{KIND}' section", 0, MOST, columns)[0]
        if row[0] >= len(MODES):
            raise MessageError(f"'{KIND}': gates of mode {row[0]}; there are {len(MODES)}")
        return cls(int(row[0]), int(row[1]), row[2:].reshape(-1, FIELDS))


@dataclass(frozen=True)
class Matrix:
    """One matrix as the receiver has it; what it lacks is None.

    **Arguments:** `rest` [d_in, d_out]; `terms` [C, terms, d_in + d_out]: V and U of each term of rank one; `own`
    [C, d_in * d_out]; `gates`: four arrays as `ScalarGates` has them, [C, hidden] and the last [C, 1]; `read`: how many
    numbers of V every token needs, which under gates is all of it.
    """

    rest: np.ndarray | None
    terms: np.ndarray | None
    own: np.ndarray | None
    gates: tuple[np.ndarray, ...] | None
    read: int = 0

    def arrays(self, name: str, shape: tuple[int, int], components: int) -> dict[str, Any]:
        """What an operator is made of. **Raises:** `MessageError` where it is no [d_in, d_out] matrix."""
        (rows, columns), count = shape, components
        terms = 0 if self.terms is None else self.terms.shape[1]
        shapes: dict[str, tuple[int, ...]] = {
            "rest": (rows, columns),
            "terms": (count, terms, rows + columns),
            "own": (count, rows * columns),
        }
        found: dict[str, Any] = {}
        for key, wanted in shapes.items():
            array = getattr(self, key)
            if array is not None and array.shape != wanted:
                raise MessageError(f"'{KIND}': {name} is {shape}; the message has {key} of {array.shape}, not {wanted}")
        if self.rest is not None:
            found["rest"] = jnp.asarray(self.rest)
        if self.terms is not None:
            found["inputs"], found["outputs"] = jnp.asarray(self.terms[..., :rows]), jnp.asarray(self.terms[..., rows:])
        if self.own is not None:
            found["own"] = jnp.asarray(self.own.reshape(count, rows, columns))
        if self.gates is not None:
            hidden = self.gates[0].shape[1]
            if [g.shape for g in self.gates] != [(count, hidden)] * 3 + [(count, 1)] or self.read != rows:
                raise MessageError(
                    f"'{KIND}': {name} has gates of {[g.shape for g in self.gates]} that read {self.read} numbers, for "
                    f"{count} components and {rows} inputs"
                )
            found["gates"] = GateParameters(*(jnp.asarray(g) for g in (*self.gates[:3], self.gates[3][:, 0])))
        return found

    def sizes(self) -> tuple[int, int, int]:
        """Numbers of all components, of the rest, and of the gates."""
        given = [a for a in (self.terms, self.own) if a is not None]
        gates = 0 if self.gates is None else sum(g.size for g in self.gates)
        return sum(a.size for a in given), 0 if self.rest is None else self.rest.size, gates


@jax.tree_util.register_dataclass
@dataclass
class Gated:
    """An operator: the components that are on. Under gates it finds out itself, at its first use, and notes it."""

    arrays: dict[str, Any]
    mask: Any = None

    def __call__(self, x: jax.Array) -> jax.Array:
        return self._applied(x, "inputs", "outputs")

    def transposed(self, x: jax.Array) -> jax.Array:
        return self._applied(x, "outputs", "inputs")

    def _applied(self, x: jax.Array, reads: str, writes: str) -> jax.Array:
        """The sum of what there is; a matrix has at least one of the three."""
        terms, back = [], writes == "inputs"
        if reads in self.arrays:
            inner = jnp.einsum("...i,cri->...cr", x, self.arrays[reads])
            if "gates" in self.arrays and self.mask is None:
                self.mask = hard(gate_values(self.arrays["gates"], inner[..., 0]))
            terms.append(jnp.einsum("...cr,cro->...o", self._masked(inner), self.arrays[writes]))
        if "own" in self.arrays:
            own = self.arrays["own"]
            each = jnp.einsum("...i,cio->...co", x, own.swapaxes(1, 2) if back else own)
            terms.append(self._masked(each).sum(-2))
        if "rest" in self.arrays:
            rest = self.arrays["rest"]
            terms.append(x @ (rest.T if back else rest))
        return sum(terms[1:], terms[0])

    def _masked(self, each: jax.Array) -> jax.Array:
        """[*batch, C, d] of each component, zero where it is off."""
        return each if self.mask is None else each * self.mask[..., None]


@partial(jax.jit, static_argnums=0)
def run_masked(
    network: Network, matrices: dict[str, Any], others: dict[str, Any], mask: Any, values: Any, tokens: Any
) -> tuple[Any, Any]:
    """Outputs [sequences, positions, d] and, by matrix, which gates opened.

    **Arguments:** `matrices`: `Matrix.arrays`, by name; `mask` [sequences, positions, C], or None: gates or all on.
    """
    operators = {name: Gated(arrays, mask) for name, arrays in matrices.items()}
    out = network.run({**others, **operators}, values, tokens)
    return out, {name: operator.mask for name, operator in operators.items() if "gates" in operator.arrays}


@dataclass(frozen=True)
class GatedDecoder:
    """`matrices` in the order of the network's; `others`: tables, then vectors, as arrays."""

    layout: Layout
    matrices: tuple[Matrix, ...]
    others: tuple[np.ndarray, ...]

    @classmethod
    def from_section(cls, section: Section) -> GatedDecoder:
        """Header: layout; of each matrix the rest and what gates need; tables and vectors. Parts: the components.

        **Raises:** `MessageError` if the arrays do not fit together.
        """
        if not section.header:
            raise MessageError(f"'{KIND}': no layout")
        layout = Layout.read(section.header[0])
        if section.n_parts != layout.components:
            raise MessageError(f"'{KIND}': {section.n_parts} parts for {layout.components} components")
        header, parts = list(section.header[1:]), list(section.parts)
        matrices = tuple(_read_matrix(layout, fields, header, parts) for fields in layout.matrices.tolist())
        if parts:
            raise MessageError(f"'{KIND}': {len(parts)} arrays of components that no matrix reads")
        return cls(layout, matrices, tuple(a.values() for a in header))

    @property
    def alphabet(self) -> Alphabet:
        """Which components are on, each with the value 1; nothing where the receiver decides."""
        if self.layout.mode != INDICES:
            return NoAlphabet()
        return SparseAlphabet(np.zeros(self.layout.components, np.int64), signed=False)

    def weights(self, network: Network) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        """Matrices and others by the network's names. **Raises:** `MessageError` where they do not fit it."""
        looked_up = [*network.tables, *network.vectors]
        if len(self.matrices) != len(network.matrices) or len(self.others) != len(looked_up):
            raise MessageError(
                f"'{KIND}': {len(self.matrices)} matrices and {len(self.others)} other weights; this region has "
                f"{len(network.matrices)} and {len(looked_up)}"
            )
        others: dict[str, Any] = {}
        for name, array in zip(looked_up, self.others, strict=True):
            wanted = network.tables.get(name) or (1, network.vectors[name])
            if array.shape != wanted:
                raise MessageError(f"'{KIND}': {name} is {wanted}; the message has {array.shape}")
            others[name] = jnp.asarray(array if name in network.tables else array[0])
        pairs = zip(network.matrices.items(), self.matrices, strict=True)
        return {name: m.arrays(name, shape, self.layout.components) for (name, shape), m in pairs}, others

    def predict(self, inputs: Inputs, state: State) -> np.ndarray:
        """The region's outputs at the scored positions, float32 [n, d]."""
        return self._run(inputs, state)[0]

    def touched(self, inputs: Inputs, state: State) -> scipy.sparse.csr_array | None:
        """The components that are on, [n, C]."""
        if self.layout.mode == STATIC:
            return None
        if isinstance(state, SparseState):
            return state.touched()
        return scipy.sparse.csr_array(self._run(inputs, state)[1])

    def flops_per_token(self, inputs: Inputs, state: State) -> float:
        """Of the components that are on, the rest, and the gates."""
        touched = self.touched(inputs, state)
        share = 1.0 if touched is None else touched.nnz / max(inputs.n_tokens * self.layout.components, 1)
        counts = np.array([m.sizes() for m in self.matrices])
        return float(2.0 * (counts @ np.array([share, 1.0, 2.0])).sum())

    def _run(self, inputs: Inputs, state: State) -> tuple[np.ndarray, np.ndarray]:
        """Outputs, and whether each component is on, [n, C]."""
        network = architecture(inputs)
        matrices, others = self.weights(network)
        mask = dense_mask(state, inputs) if isinstance(state, SparseState) else None
        rows, opened = [], []
        for number, batch in enumerate(batches_of(inputs, BATCH_TOKENS)):
            values, tokens, _ = device(batch)
            size = len(batch.tokens)
            some = (
                None if mask is None else jnp.asarray(mask[number * _stride(inputs) : number * _stride(inputs) + size])
            )
            out, gates = run_masked(network, matrices, others, some, values, tokens)
            rows.append(np.asarray(out, np.float32)[batch.scored])
            opened.append(_any_open(gates, batch, self.layout.components))
        return np.concatenate(rows), np.concatenate(opened)


def dense_mask(state: SparseState, inputs: Inputs) -> np.ndarray:
    """Which components are on, float32 [sequences, positions, C]; at positions that are not scored, those of the next
    that is."""
    mask = np.zeros((*inputs.tokens.shape, state.n_parts), np.float32)
    mask[inputs.scored] = state.touched().toarray()
    return np.asarray(np.take_along_axis(mask, next_scored(inputs.scored)[..., None], 1))


def next_scored(scored: np.ndarray) -> np.ndarray:
    """The first scored position from each on, in its sequence, [sequences, positions]; the last where there is none.

    What is on at a position that is not scored is that token's: the first to see it, and the one that pays.
    """
    last = scored.shape[1] - 1
    place = np.where(scored, np.arange(last + 1), last)
    return np.asarray(np.minimum.accumulate(place[:, ::-1], 1)[:, ::-1])


def _stride(inputs: Inputs) -> int:
    """Sequences in a batch of `batches_of`."""
    return max(1, min(len(inputs.tokens), BATCH_TOKENS // inputs.tokens.shape[1]))


def _any_open(gates: Mapping[str, Any], batch: Inputs, components: int) -> np.ndarray:
    """Which components a token needs, [n, C]: of any matrix, and at the positions before it that are not scored."""
    opened = np.zeros((*batch.tokens.shape, components), bool)
    for values in gates.values():
        opened |= np.asarray(values) > 0
    found = opened[batch.scored]
    owner = np.take_along_axis(batch.numbers(), next_scored(batch.scored), 1)
    seen = ~batch.scored & (owner >= 0)
    np.logical_or.at(found, owner[seen], opened[seen])
    return found


def _read_matrix(
    layout: Layout, fields: list[int], header: list[QuantisedArray], parts: list[QuantisedArray]
) -> Matrix:
    """One matrix from the arrays that come next. **Raises:** `MessageError` if there are too few."""
    has_rest, terms, has_own = fields
    gated = layout.mode == PROGRAM and terms > 0
    if layout.mode == PROGRAM and (terms > 1 or has_own):
        raise MessageError(f"'{KIND}': under gates a component is one term V U^T, of which V is read; not {fields}")
    if not (has_rest or terms or has_own):
        raise MessageError(f"'{KIND}': a matrix without a rest and without components")
    try:
        rest = header.pop(0).values() if has_rest else None
        read = header.pop(0).values() if gated else None
        gates = tuple(header.pop(0).values() for _ in range(4)) if gated else None
        found = [parts.pop(0).values() for _ in range(terms)]
        own = parts.pop(0).values() if has_own else None
    except IndexError:
        raise MessageError(f"'{KIND}': fewer arrays than the layout {layout.matrices.tolist()} asks for") from None
    if len({a.shape for a in found}) > 1 or (read is not None and len(read) != len(found[0])):
        raise MessageError(f"'{KIND}': terms of the shapes {[a.shape for a in found]} do not fit together")
    if read is None:
        return Matrix(rest, np.stack(found, 1) if found else None, own, None)
    return Matrix(rest, np.concatenate([read, found[0]], 1)[:, None], own, gates, read.shape[1])
