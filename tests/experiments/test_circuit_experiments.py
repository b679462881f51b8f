"""Where the embedded model's behaviours show, by hand; and the study of searches on a model of twelve edges."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from experiments.circuit_searches.run import gaps
from experiments.embedded_circuits.behaviours import brackets, induction, write
from mdl.data import Sizes, from_tokens
from mdl.score import embedded_model, load_data
from tests.decompositions.circuits.test_circuit import task_of

TEXTS = ["<s>", "foo", "bar", "(", ")", "\n", "baz", "))", "f("]


def test_induction_is_inside_of_repeated_identifiers() -> None:
    tokens = np.array([[0, 1, 2, 5, 1, 2, 6, 3, 4, 3, 4, 2, 6]])
    found = np.flatnonzero(induction(tokens, TEXTS)[0])
    assert found.tolist() == [5, 12]  # "bar" behind "foo" again, "baz" behind "bar"; brackets again are no identifiers


def test_brackets_are_open_and_closed_next() -> None:
    tokens = np.array([[0, 4, 3, 1, 4, 8, 3, 1, 7, 4, 2]])
    found = np.flatnonzero(brackets(tokens, TEXTS)[0])
    assert found.tolist() == [
        3,
        7,
    ]  # not before the first ")", which closes nothing, nor the last, which is one too many


def test_data_of_a_behaviour(tmp_path: Path) -> None:
    model = embedded_model()
    data = load_data(model, context=64, fit_sequences=12, sequences=6)
    path = write(model, data, "induction", tmp_path / "induction.npz")
    found = from_tokens(path, Sizes(8, 4, 4), 0)
    assert found.measured is not None
    assert all(mask.any(1).all() for mask in found.measured)
    known = {row.tobytes() for split in (data.fit, data.tune, data.held_out) for row in split}
    assert all(row.tobytes() in known for row in found.held_out)


def test_no_search_beats_the_optimum() -> None:
    found = gaps(task_of("one-head"), "subspace", "zero")
    assert set(found["searches"]) > {"enumeration", "annealing", "greedy"}
    for name, search in found["searches"].items():
        assert min(search["over"]) >= 1 - 1e-6, name
        assert len(search["over"]) == len(found["rates"])
    assert max(found["searches"]["annealing"]["over"]) <= 1 + 1e-6
