"""Built-in decoders written as programs, from the same arrays, and random material for them."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse

from mdl.message import QuantisedArray, Section
from mdl.program import Program
from mdl.protocols import Inputs
from mdl.state import DenseState, SparseState, State

WIDTH, FEATURES, ROWS = 16, 40, 12
SEQUENCES, POSITIONS, VOCABULARY = 5, 24, 30


def table_program(section: Section) -> Section:
    """mean + the row of the token's id."""
    p = Program()
    increments, rows = (p.part(array) for array in section.parts)
    return p.section(p.table(increments, rows) + p.header(section.header[0]))


def affine_program(section: Section) -> Section:
    """inputs @ matrix + bias."""
    p = Program()
    matrix, bias = (p.header(array) for array in section.header)
    return p.section(p.inputs(len(section.header[0].symbols)) @ matrix + bias)


def dictionary_program(section: Section) -> Section:
    """(symbols * steps) @ atoms + bias; the flags become the instruction's attribute."""
    p = Program()
    atoms, exponents, classes = (p.part(array) for array in section.parts)
    symbols = p.state_sparse(classes, signed=bool(section.header[1].symbols[0, 0]))
    steps = p.transpose(p.exp2(p.scale(exponents, -8)))
    return p.section((symbols * steps) @ atoms + p.header(section.header[0]))


def normalised_program(section: Section) -> Section:
    """((symbols * steps) @ atoms + bias) * 2^(scale) + mean, scale and mean being a token's side information."""
    p = Program()
    atoms, exponents, classes = (p.part(array) for array in section.parts)
    _, _, scale, mean = (int(i) for i in section.header[1].symbols[0])
    symbols, side = p.state_sparse(classes, signed=False), p.state_dense(2)
    steps = p.transpose(p.exp2(p.scale(exponents, -8)))
    output = (symbols * steps) @ atoms + p.header(section.header[0])
    factor = p.exp2(p.scale(p.select(side, 0, 1), scale))
    return p.section(output * factor + p.scale(p.select(side, 1, 1), mean))


def components_program(section: Section) -> Section:
    """r(q) @ rows + mean, with shifts in 1/32."""
    p = Program()
    rows, shifts = (p.part(array) for array in section.parts)
    points = p.points(p.state_dense(), p.scale(shifts, -20))
    return p.section(points @ rows + p.header(section.header[0]))


def clusters_program(section: Section) -> Section:
    """The centroid of the index."""
    p = Program()
    centroids = p.part(section.parts[0])
    return p.section(p.gather(p.state_index(), centroids))


def random_values(rows: int, columns: int, seed: int, step: float = 2**-6) -> QuantisedArray:
    return QuantisedArray.from_values(np.random.default_rng(seed).normal(size=(rows, columns)), step)


def table_section() -> Section:
    increments = np.random.default_rng(1).integers(1, 4, ROWS)
    parts = (QuantisedArray.from_integers(increments), random_values(ROWS, WIDTH, 2))
    return Section("table", (random_values(1, WIDTH, 3),), parts)


def affine_section() -> Section:
    return Section("affine", (random_values(WIDTH, WIDTH, 4), random_values(1, WIDTH, 5)))


def normalised_section() -> Section:
    section = dictionary_section()
    flags = QuantisedArray.from_integers(np.array([[0, 2, -9, -11]]))
    return Section("dictionary", (section.header[0], flags), section.parts)


def dictionary_section(features: int = FEATURES, signed: int = 0) -> Section:
    rng = np.random.default_rng(6)
    exponents = QuantisedArray.from_integers(rng.integers(-12, 3, features))
    classes = QuantisedArray.from_integers(rng.integers(0, 4, features))
    flags = QuantisedArray.from_integers(np.array([[signed, 0, 0, 0]]))
    parts = (random_values(features, WIDTH, 7), exponents, classes)
    return Section("dictionary", (random_values(1, WIDTH, 8), flags), parts)


def components_section() -> Section:
    shifts = QuantisedArray.from_integers(np.random.default_rng(9).integers(-8, 9, (6, 3)))
    return Section("components", (random_values(1, WIDTH, 10),), (random_values(6, WIDTH, 11), shifts))


def clusters_section() -> Section:
    return Section("clusters", (), (random_values(9, WIDTH, 12),))


def sparse_state(section: Section, n: int, active: int = 4, seed: int = 13) -> SparseState:
    """Random symbols for a dictionary, `active` of its features a token."""
    rng = np.random.default_rng(seed)
    symbols = np.zeros((n, section.n_parts), np.int64)
    for token in range(n if section.n_parts else 0):
        symbols[token, rng.choice(section.n_parts, active, replace=False)] = rng.integers(1, 9, active)
    return SparseState.from_matrix(scipy.sparse.csr_array(symbols), section.parts[-1].symbols[:, 0], False)


def dense_state(n: int, width: int = 6, parts: bool = True) -> State:
    return DenseState(np.random.default_rng(14).integers(-3, 4, (n, width)), parts)


@pytest.fixture
def inputs() -> Inputs:
    """Sequences that begin with a special token; the last has another in its middle."""
    rng = np.random.default_rng(15)
    tokens = rng.integers(0, VOCABULARY, (SEQUENCES, POSITIONS)).astype(np.int32)
    scored = np.ones((SEQUENCES, POSITIONS), bool)
    scored[:, 0] = False
    scored[-1, 7] = False
    return Inputs(tokens, scored, rng.normal(size=(SEQUENCES, POSITIONS, WIDTH)).astype(np.float32))
