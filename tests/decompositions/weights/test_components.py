"""Components as an explanation: what is refused, what is noted, and what a receiver makes of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import erf

from decompositions.weights.components import Components, ComponentsExplanation
from decompositions.weights.factors import Factors, ScalarGates, TensorFactors
from decompositions.weights.parts import KINDS
from mdl.alphabets import NoAlphabet, SparseAlphabet
from mdl.data import Dataset
from mdl.errors import ExplanationError, MDLError, TaskError
from mdl.models import Vectors
from mdl.models.model import Model
from mdl.plugins import make_decomposition
from mdl.protocols import Decoder, Explanation
from mdl.state import NoState, SparseState
from mdl.task import Task, build_task
from tests.decompositions.weights.cases import (
    TwoLayers,
    closest,
    gated,
    no_progress,
    random_factors,
    random_gates,
    random_inputs,
    random_weights,
    received,
    settings_of,
    task_of,
)

NETWORK = TwoLayers(4, 6, 3, 1)


@pytest.fixture(scope="module")
def task() -> Task:
    inputs = random_inputs(NETWORK, 120).scored_values()
    return task_of(Vectors.computed(NETWORK, random_weights(NETWORK), inputs, "two layers"))


@pytest.fixture(scope="module")
def mlp(tiny_model: Model, tiny_data: Dataset) -> Task:
    return build_task(tiny_model, "blocks.0.mlp", tiny_data, no_progress).for_fitting()


def neurons(**changes: Any) -> Factors:
    """Exact, with one thing of W_in changed."""
    factors = KINDS["neurons"](NETWORK, random_weights(NETWORK))
    return replace(factors, tensors={**factors.tensors, "W_in": replace(factors.tensors["W_in"], **changes)})


def one_bad(value: float) -> np.ndarray:
    rows = neurons().tensors["W_in"].inputs.copy()
    rows[1, 2] = value
    return rows


W_IN = neurons().tensors["W_in"]
BAD: dict[str, tuple[Factors, str]] = {
    "transposed": (neurons(inputs=W_IN.outputs, outputs=W_IN.inputs), r"do not fit the matrix \(4, 6\).*transposed\?"),
    "vectors in columns": (neurons(inputs=W_IN.inputs.T.copy()), r"factors \(4, 6\) and \(6, 6\) for 6 component ids"),
    "one id too few": (neurons(component=np.arange(5)), "for 5 component ids do not fit"),
    "ids in a column": (neurons(component=np.arange(6)[:, None]), "do not fit the matrix"),
    "ids with gaps": (neurons(component=np.array([0, 1, 2, 3, 4, 9])), "run to 9, but 3 of them have no part"),
    "a negative id": (
        neurons(component=np.array([0, 1, 2, 3, 4, -1])),
        "a component id of -1; they are numbered",
    ),
    "NaN": (neurons(inputs=one_bad(np.nan)), "W_in: 1 of 24 numbers are NaN or infinite"),
    "infinite": (neurons(inputs=one_bad(np.inf)), "W_in: 1 of 24 numbers are NaN or infinite"),
    "gates of other sizes": (neurons(gates=random_gates(5)), "gates that read one scalar of one token"),
    "gates of several scalars": (
        neurons(gates=ScalarGates(*[np.ones((6, 4, 2))] * 3, np.ones(6))),
        "gates that read one scalar",
    ),
    "an unknown matrix": (
        Factors({"W_middle": W_IN}, "mine"),
        r"mine: no matrix 'W_middle' in this region, whose matrices are W_in, W_out",
    ),
    "no matrix": (Factors({}, "mine"), "mine decomposes no matrix"),
    "no component": (
        random_factors(NETWORK, {"W_in": [], "W_out": []}),
        "random has no component in any matrix",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_factors_that_do_not_fit(what: str, task: Task) -> None:
    factors, message = BAD[what]
    with pytest.raises(ExplanationError, match=message):
        Components(object=factors).fit(task)


def test_components_that_claim_to_sum_to_the_weights(task: Task) -> None:
    half = neurons(outputs=0.5 * W_IN.outputs)
    with pytest.raises(ExplanationError, match=r"to sum to the weights, but W_in lacks 50 % of its norm .*at most"):
        Components(object=half, exact=True).fit(task)
    assert Components(object=neurons(), exact=True).fit(task).notes == ()
    note = "components lack 50 % of the norm of a matrix; {}"
    for leftover in ("drop", "send"):
        assert Components(object=half, leftover=leftover).fit(task).notes == (note.format(leftover),)
    nearly = neurons(outputs=(1 - 5e-4) * W_IN.outputs)
    assert Components(object=nearly, exact=True).fit(task).notes == ()


def test_gates_that_are_not_there(task: Task, mlp: Task) -> None:
    with pytest.raises(ExplanationError, match="neurons comes without gates: gates=program has nothing to run"):
        Components(parts="neurons", gates="program").fit(task)
    half_gated = neurons(gates=random_gates(6))  # and none of W_out
    with pytest.raises(ExplanationError, match="comes without gates"):
        Components(object=half_gated, gates="program").fit(task)
    with pytest.raises(ExplanationError, match=r"inputs without sequences and at most 512 components, here 64: give"):
        Components(parts="neurons").fit(mlp)
    many = random_factors(NETWORK, {"W_in": np.arange(513)})
    with pytest.raises(ExplanationError, match="at most 512 components, here 513"):
        Components(object=many).fit(task)
    several = random_factors(NETWORK, {"W_in": [0, 0, 1], "W_out": [0, 1, 1]}, gated=True)
    with pytest.raises(ExplanationError, match=r"components \[0, 1\] have several terms in one matrix"):
        Components(object=several, gates="program").fit(task)
    assert Components(object=several, gates="indices").fit(task).factors is several


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "given by path, as parts, or as an object; got path=''"),
        ({"parts": "neurons", "path": "x.safetensors"}, "parts='neurons', object=NoneType"),
        ({"parts": "neurones"}, "no parts 'neurones': there are whole, singular, columns, neurons, random"),
        ({"object": {"W_in": 3}}, "given as Factors, not as dict"),
        ({"path": "nowhere.safetensors"}, "nowhere.safetensors is not a readable safetensors file"),
    ],
)
def test_how_components_are_given(options: dict[str, Any], message: str, task: Task) -> None:
    with pytest.raises(ExplanationError, match=message):
        Components(**options).fit(task)


def test_rows_of_numbers_have_no_weights() -> None:
    with pytest.raises(TaskError, match="no weights to describe"):
        Components(parts="whole").fit(task_of(Vectors.of(np.random.default_rng(0).normal(size=(60, 3)))))


def test_as_text() -> None:
    found = make_decomposition("components:parts=singular,gates=static,leftover=send,exact=true,name=mine")
    assert found == Components(parts="singular", gates="static", leftover="send", exact=True, name="mine")
    for text in ("components:gates=oracle", "components:leftover=maybe", "components:part=whole"):
        with pytest.raises(MDLError):
            make_decomposition(text)


@pytest.mark.parametrize("kind", ["whole", "singular", "neurons", "columns", "random"])
def test_all_on_they_are_the_network(kind: str, task: Task) -> None:
    explanation = Components(parts=kind, gates="static", exact=True).fit(task)
    assert isinstance(explanation, Explanation)
    decoder, state, found = received(explanation, task, settings_of(explanation, task, 1e-4))
    assert isinstance(decoder, Decoder)
    assert isinstance(decoder.alphabet, NoAlphabet)
    assert state == NoState(task.fit.inputs.n_tokens)
    assert explanation.name.endswith(" (static)")
    assert closest(found, task.fit.outputs) < 5e-3


def test_what_components_lack_is_sent_or_dropped(task: Task) -> None:
    half = neurons(outputs=0.5 * W_IN.outputs)
    found = {}
    for leftover in ("drop", "send"):
        explanation = Components(object=half, gates="static", leftover=leftover).fit(task)
        found[leftover] = received(explanation, task, settings_of(explanation, task, 1e-4))[2]
    assert closest(found["send"], task.fit.outputs) < 5e-3
    assert closest(found["drop"], task.fit.outputs) > 0.1


@pytest.mark.parametrize("gates", ["indices", "program", "static"])
@pytest.mark.parametrize("leftover", ["drop", "send"])
def test_a_matrix_in_which_no_component_has_a_part(gates: str, leftover: str, task: Task) -> None:
    """As training leaves it where nothing is alive: zeros, or all of it as what is left over."""
    factors = random_factors(NETWORK, {"W_in": [], "W_out": [0, 1, 2]}, gated=True)
    explanation = Components(object=factors, gates=gates, leftover=leftover).fit(task)
    decoder, _, found = received(explanation, task, settings_of(explanation, task, 1e-3))
    (rest, _) = (m.rest for m in decoder.matrices)
    wanted = random_weights(NETWORK)["W_in"] * (leftover == "send")
    np.testing.assert_allclose(rest, wanted, atol=0.01)
    assert np.isfinite(found).all()


def test_indices_by_gates_are_those_above_the_threshold(mlp: Task) -> None:
    network = mlp.fit.inputs.network
    assert network is not None
    factors = random_factors(network, {name: np.arange(9) for name in network.matrices}, gated=True)
    explanation = Components(object=factors, leftover="send").fit(mlp)
    assert set(explanation.knobs) == {"static", "gate"}
    counts = []
    for gate in (0.01, 0.5):
        settings = settings_of(explanation, mlp, 0.2, gate=gate)
        decoder, state, _ = received(explanation, mlp, settings)
        assert isinstance(decoder.alphabet, SparseAlphabet)
        assert isinstance(state, SparseState)
        assert (state.values == 1).all()
        counts.append(state.touched().toarray())
        np.testing.assert_array_equal(counts[-1], by_hand(explanation, mlp) > gate)
    assert (counts[0] | ~counts[1]).all()
    assert 0 < counts[1].sum() < counts[0].sum()
    again = replace(mlp.fit, inputs=replace(mlp.fit.inputs))
    settings = settings_of(explanation, mlp, 0.2, gate=0.5)
    fresh = explanation.encode(received(explanation, mlp, settings)[0], again, settings)
    np.testing.assert_array_equal(fresh.touched().toarray(), counts[1])


def by_hand(explanation: ComponentsExplanation, mlp: Task) -> np.ndarray:
    """The larger of both matrices' gates, on the model's own activations, with GPT-2's GELU between them."""
    weights, x = explanation.curvature.weights, mlp.fit.inputs.scored_values()
    short = {name.rpartition(".")[2]: name for name in weights}
    norm = {key: weights[name] for key, name in short.items() if name.startswith("blocks.0.ln2")}
    first = (x * norm["w"] + norm["b"]).astype(np.float64)
    before = first @ weights[short["W_in"]] + weights[short["b_in"]]
    hidden = 0.5 * before * (1 + np.tanh(np.sqrt(2 / np.pi) * (before + 0.044715 * before**3)))
    found = np.zeros((len(x), explanation.factors.n_components))
    for key, seen in (("W_in", first), ("W_out", hidden)):
        tensor = explanation.factors.tensors[short[key]]
        assert tensor.gates is not None
        into = (seen @ tensor.inputs.T)[..., None] * tensor.gates.weight_in + tensor.gates.bias_in
        gelu = 0.5 * into * (1 + erf(into / np.sqrt(2)))
        found = np.maximum(found, np.clip((gelu * tensor.gates.weight_out).sum(-1) + tensor.gates.bias_out, 0, 1))
    return found


def test_knobs_are_those_of_the_gates(task: Task) -> None:
    gates = random_factors(NETWORK, {"W_in": [0, 1]}, gated=True)
    knobs = {
        ("indices", False): {"static"},
        ("indices", True): {"static", "gate"},
        ("program", True): {"static", "gates"},
        ("static", False): {"static"},
    }
    for (mode, gated_too), names in knobs.items():
        given = gates if gated_too else neurons()
        assert set(Components(object=given, gates=mode).fit(task).knobs) == names
    assert Components(object=gates, name="mine", gates="program").fit(task).name == "mine"
    assert Components(object=gates, gates="program").fit(task).name == "random (program)"


def test_a_file_is_what_was_saved(task: Task, tmp_path: Path) -> None:
    factors = random_factors(NETWORK, {"W_in": [0, 0, 1], "W_out": [1, 2]}, gated=True)
    factors.save(tmp_path / "mine.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.safetensors"]
    found = Components(path=str(tmp_path / "mine.safetensors")).fit(task).factors
    assert (found.name, found.n_components, found.gated) == ("mine", 3, True)
    for name, tensor in factors.tensors.items():
        other = found.tensors[name]
        for ours, theirs in ((tensor.inputs, other.inputs), (tensor.component, other.component)):
            np.testing.assert_array_equal(ours, theirs)
        assert tensor.gates is not None
        assert other.gates is not None
        for ours, theirs in zip(vars(tensor.gates).values(), vars(other.gates).values(), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_allclose(other.total(), other.matrices(3).sum(0))
    plain = random_factors(gated().network, {"W_in": [0, 1]})
    plain.save(tmp_path / "plain.safetensors")
    assert not Factors.load(tmp_path / "plain.safetensors").gated
    assert Factors.load(tmp_path / "plain.safetensors", "called so").name == "called so"


def test_gates_of_some_rows() -> None:
    gates = random_gates(4)
    some = gates.rows(np.array([2, 0]))
    np.testing.assert_array_equal(some.weight_in, gates.weight_in[[2, 0]])
    np.testing.assert_array_equal(some.bias_out, gates.bias_out[[2, 0]])
    tensor = TensorFactors(np.ones((2, 3)), np.ones((2, 4)), np.array([0, 1]), some)
    assert Factors({"W": tensor}).gated
