"""Sections of gated components that a receiver refuses, whatever was done to them: by a MessageError, nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from decompositions.weights.components import Components
from decompositions.weights.gated import GatedDecoder, Layout
from mdl.errors import MessageError
from mdl.message import QuantisedArray, Section
from mdl.models import Vectors
from mdl.protocols import Inputs
from mdl.state import NoState
from mdl.task import Task
from tests.decompositions.weights.cases import (
    TwoLayers,
    random_factors,
    random_inputs,
    random_weights,
    settings_of,
    task_of,
    through_bytes,
)

WIDE = TwoLayers(8, 10, 6, 1)
IDS = {"W_in": [0, 0, 1, 2, 3, 3, 3, 3, 3], "W_out": [0, 1, 1, 2]}
Damage = Callable[[Section], Section]


@pytest.fixture(scope="module")
def task() -> Task:
    inputs = random_inputs(WIDE, 100).scored_values()
    return task_of(Vectors.computed(WIDE, random_weights(WIDE), inputs, "wide"))


@pytest.fixture(scope="module")
def listed(task: Task) -> Section:
    """Header: layout, rest of W_in, rest of W_out, T, b_in, b_out. Parts: two terms and a matrix of W_in, two terms."""
    explanation = Components(object=random_factors(WIDE, IDS, gated=True), gates="indices", leftover="send").fit(task)
    return through_bytes(explanation.section(settings_of(explanation, task, 0.1)))


@pytest.fixture(scope="module")
def program(task: Task) -> Section:
    """Header: layout, V and four arrays of gates of W_in, the same of W_out, T, b_in, b_out. Parts: U of both."""
    factors = random_factors(WIDE, {"W_in": [0, 1, 2], "W_out": [1, 2, 3]}, gated=True)
    explanation = Components(object=factors, gates="program").fit(task)
    return through_bytes(explanation.section(settings_of(explanation, task, 0.1)))


def refused(section: Section, message: str = "") -> None:
    with pytest.raises(MessageError, match=message):
        GatedDecoder.from_section(section).weights(WIDE)


def without(place: int) -> Damage:
    return lambda s: replace(s, header=s.header[:place] + s.header[place + 1 :])


def without_part(place: int) -> Damage:
    return lambda s: replace(s, parts=s.parts[:place] + s.parts[place + 1 :])


def put(arrays: tuple[QuantisedArray, ...], place: int, array: QuantisedArray) -> tuple[QuantisedArray, ...]:
    changed = [*arrays]
    changed[place] = array
    return tuple(changed)


def other(place: int, *shape: int) -> Damage:
    array = QuantisedArray.from_values(np.ones(shape), 0.5)
    return lambda s: replace(s, header=put(s.header, place, array))


def other_part(place: int, *shape: int) -> Damage:
    array = QuantisedArray.from_values(np.ones(shape), 0.5)
    return lambda s: replace(s, parts=put(s.parts, place, array))


def layout(*integers: int) -> Damage:
    array = QuantisedArray.from_integers(np.array([integers], np.int64))
    return lambda s: replace(s, header=(array, *s.header[1:]))


def fewer_components(section: Section) -> Section:
    return replace(section, parts=tuple(a.rows(np.arange(3)) for a in section.parts))


def one_part_shorter(section: Section) -> Section:
    return replace(section, parts=(section.parts[0].rows(np.arange(3)), *section.parts[1:]))


ALIKE: dict[str, Damage] = {
    "no header": lambda s: replace(s, header=()),
    "no layout": without(0),
    "no parts": lambda s: replace(s, parts=()),
    "fewer components than are said": fewer_components,
    "parts of different numbers of rows": one_part_shorter,
    "an array too many": lambda s: replace(s, header=(*s.header, s.header[-1])),
    "a part array too many": lambda s: replace(s, parts=(*s.parts, s.parts[-1])),
    "the last bias is missing": lambda s: replace(s, header=s.header[:-1]),
    "a table of other rows": other(-3, 2, 8),
    "a bias in two rows": other(-1, 2, 6),
    "a bias of another size": other(-1, 1, 5),
    "a layout in two rows": other(0, 2, 8),
    "a layout of halves": other(0, 1, 8),
    "a layout cut short": layout(0, 4, 1, 2),
    "an empty layout": layout(),
    "no such mode": layout(3, 4, 1, 2, 1, 1, 2, 0),
    "a negative mode": layout(-1, 4, 1, 2, 1, 1, 2, 0),
    "negative terms": layout(0, 4, 1, -2, 1, 1, 2, 0),
    "more components than there could be": layout(0, 1 << 30, 1, 2, 1, 1, 2, 0),
    "terms beyond all arrays": layout(0, 4, 1, 1 << 20, 1, 1, 2, 0),
    "a matrix too few": layout(0, 4, 1, 2, 1),
    "a matrix too many": layout(0, 4, 1, 2, 1, 1, 2, 0, 1, 0, 0),
    "a matrix with nothing": layout(0, 4, 1, 2, 1, 0, 0, 0),
}
LISTED: dict[str, Damage] = {
    "a rest is missing": without(1),
    "a rest that is transposed": other(1, 10, 8),
    "terms of another width": other_part(0, 4, 17),
    "terms that do not fit each other": other_part(1, 4, 12),
    "a whole matrix of another size": other_part(2, 4, 79),
    "a term is missing": without_part(0),
    "a whole matrix is missing": without_part(2),
    "said to be a program": layout(1, 4, 1, 2, 1, 1, 2, 0),
}
PROGRAM: dict[str, Damage] = {
    "V is missing": without(1),
    "a gate's array is missing": without(3),
    "gates of another width": other(2, 4, 2),
    "gates of other components": other(3, 3, 3),
    "a gate's bias in several columns": other(5, 4, 2),
    "V of other components": other(1, 3, 8),
    "V of other inputs": other(1, 4, 7),
    "U of other outputs": other_part(0, 4, 9),
    "U is missing": without_part(1),
    "two terms": layout(1, 4, 0, 2, 0, 0, 1, 0),
    "said to be listed": layout(0, 4, 0, 1, 0, 0, 1, 0),
    "a part in V's place": lambda s: other_part(0, 4, 9)(other(1, 4, 9)(s)),
}


@pytest.mark.parametrize("what", ALIKE)
def test_what_is_refused_of_both(what: str, listed: Section, program: Section) -> None:
    for section in (listed, program):
        refused(ALIKE[what](section))


@pytest.mark.parametrize("what", LISTED)
def test_what_is_refused_of_lists(what: str, listed: Section) -> None:
    refused(LISTED[what](listed))


@pytest.mark.parametrize("what", PROGRAM)
def test_what_is_refused_of_programs(what: str, program: Section) -> None:
    refused(PROGRAM[what](program))


def test_what_they_are_undamaged(listed: Section, program: Section, task: Task) -> None:
    assert Layout.read(listed.header[0]).matrices.tolist() == [[1, 2, 1], [1, 2, 0]]
    assert (len(listed.header), len(listed.parts), listed.n_parts) == (6, 5, 4)
    assert Layout.read(program.header[0]).matrices.tolist() == [[0, 1, 0], [0, 1, 0]]
    assert (len(program.header), len(program.parts), program.n_parts) == (14, 2, 4)
    for section in (listed, program):
        assert set(GatedDecoder.from_section(section).weights(WIDE)[0]) == {"W_in", "W_out"}


def test_parts_that_nobody_would_pay_for(program: Section) -> None:
    """Under gates a whole matrix a component would be multiplied with, and touched by no token."""
    integers = QuantisedArray.from_integers(np.array([[1, 4, 0, 0, 1, 0, 1, 0]]))
    own = QuantisedArray.from_values(np.ones((4, 80)), 0.5)
    header = (integers, *program.header[6:])
    refused(Section("parts", header, (own, program.parts[1])), "under gates a component is one term")
    # V's last number among what is paid for when a gate has opened, though every token's gate reads it
    moved = other_part(0, 4, 11)(other(1, 4, 7)(program))
    refused(moved, "that read 7 numbers, for 4 components and 8 inputs")


def test_many_components_without_a_part() -> None:
    """A few bytes that would have the receiver make room for a million components a token."""
    rest = [QuantisedArray.from_values(np.ones(s), 0.5) for s in ((8, 10), (10, 6), (1, 8), (1, 10), (1, 6))]
    integers = QuantisedArray.from_integers(np.array([[0, 1 << 20, 1, 0, 0, 1, 0, 0]]))
    refused(Section("parts", (integers, *rest)), "0 parts for 1048576 components")


def test_a_region_without_an_architecture(listed: Section, task: Task) -> None:
    inputs = task.fit.inputs
    nowhere = Inputs(inputs.tokens, inputs.scored, inputs.values)
    with pytest.raises(MessageError, match="architecture is not known"):
        GatedDecoder.from_section(listed).predict(nowhere, NoState(inputs.n_tokens))
