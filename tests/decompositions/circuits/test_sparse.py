"""Circuits as sparse tables: what the receiver rebuilds, what edges save, what is sent, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from decompositions.circuits.kept import Kept
from decompositions.circuits.sparse import SparseCircuitDecoder, write_sparse
from decompositions.circuits.sparse_sender import SparseCircuit, live
from mdl.errors import MessageError
from mdl.message import QuantisedArray, Section, decode_message, encode_message
from mdl.models.circuits.graph import Graph
from mdl.models.compiled import Program, compile_program, library
from mdl.models.compiled.truth import varying_edges, weight_true_edges
from mdl.models.model import Model, fingerprint_of
from mdl.protocols import Settings
from mdl.state import NoState
from mdl.task import Task, build_task
from tests.conftest import dataset_of, no_progress
from tests.models.circuits.random_models import random_model

SPECIAL = (0, 1)


def compiled_task(program: Program, seed: int = 1) -> Task:
    compiled = compile_program(program, seed)
    tokens = compiled.encode(compiled.program.inputs)
    tokens = tokens[np.random.default_rng(0).permutation(len(tokens))]
    sizes = (len(tokens) - 6, 3, 3)
    return build_task(compiled.model, "model", dataset_of(tokens, sizes, SPECIAL), no_progress)


@pytest.fixture(scope="module")
def reverse() -> Task:
    return compiled_task(library.reverse(4, ("a", "b")))


def settings(task: Task, horizon: float = 1e6) -> Settings:
    return Settings(horizon, 1.0, np.eye(task.width), {"static": 1.0}, corrected=False)


def received(explanation: Any, chosen: Settings) -> tuple[float, SparseCircuitDecoder]:
    message = encode_message([explanation.section(chosen)])
    (section,) = decode_message(message.data)
    return message.whole_bits, SparseCircuitDecoder.from_section(section)


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_the_receiver_computes_the_program(reverse: Task, ablation: Any) -> None:
    model = reverse.model
    assert isinstance(model, Model)
    assert reverse.held_out is not None
    true = weight_true_edges(model) if ablation == "zero" else varying_edges(model, reverse.fit.inputs.tokens)
    sample = reverse.held_out.sample()
    everything = received(SparseCircuit().fit(reverse.for_fitting()), settings(reverse))
    circuit = received(SparseCircuit(edges=true, ablation=ablation).fit(reverse.for_fitting()), settings(reverse))
    for _, decoder in (everything, circuit):
        found = decoder.predict(sample.inputs, NoState(1))
        assert (found.argmax(-1) == sample.outputs.argmax(-1)).all()
        assert np.abs(found - sample.outputs).max() < 0.3
        assert decoder.flops_per_token(sample.inputs, NoState(1)) < 2000
    kept, _, constants = circuit[1].received(sample.inputs)
    assert (kept.edges == true).all()
    assert constants.any() == (ablation == "mean")  # what `one` brings
    assert circuit[0] < 1800
    if ablation == "zero":
        assert circuit[0] <= everything[0]


def test_lengths_are_exact_and_edges_save_places(reverse: Task) -> None:
    model = reverse.model
    assert isinstance(model, Model)
    explanation = SparseCircuit().fit(reverse.for_fitting())
    circuit, bits = explanation.circuit, {}
    for name, edges in (("true", weight_true_edges(model)), ("all", circuit.graph.possible)):
        kept, weights, constants = explanation.rounded(edges, 6)
        writer, bits[name] = write_sparse(kept, weights, constants)
        assert writer.information_bits == pytest.approx(bits[name], abs=1e-6)
    assert bits["true"] < bits["all"]


def test_dead_numbers_are_left_out(reverse: Task) -> None:
    """Without the edge to its value a head is nothing, and what leads to it alone neither; nothing else goes."""
    model = reverse.model
    assert isinstance(model, Model)
    explanation = SparseCircuit().fit(reverse.for_fitting())
    graph, network, own = explanation.circuit.graph, explanation.circuit.network, explanation.circuit.curvature.weights
    nothing = np.zeros((len(graph.destinations), model.config.d_model))
    whole, _ = live(Kept(network, graph, graph.possible, False, False), own, nothing)
    numbers = sum(np.count_nonzero(w) for w in whole.values())
    assert 0.7 * sum(np.count_nonzero(w) for w in own.values()) < numbers
    edges = weight_true_edges(model)
    edges[graph.edge("m2->a3.h0<q>")] = False
    left, _ = live(Kept(network, graph, graph.pruned(edges, constant=True), False, False), own, nothing)
    assert not left["blocks.0.mlp.W_in"].any()
    assert left["blocks.3.attn.W_V"].any()


def test_acdc_under_zero_ablation_finds_reverse_but_for_what_no_token_needs(reverse: Task) -> None:
    """12 of 13 weight-true edges: that a query looks at the start where nothing is selected matters to PAD alone."""
    model = reverse.model
    assert isinstance(model, Model)
    explanation = SparseCircuit(search="acdc").fit(reverse.for_fitting())
    section, edges = explanation.sent(settings(reverse))
    expected = weight_true_edges(model)
    expected[explanation.circuit.graph.edge("input->a3.h0<q>")] = False
    assert (edges == expected).all()
    assert explanation.kl(edges, 12) < 1e-3
    assert not explanation.sent(settings(reverse, 10.0))[1].any()  # ten tokens are not worth it
    assert section.kind == "sparse"


@pytest.mark.parametrize("kind", ["gpt2", "llama", "attention-only"])
def test_dense_models_come_back_as_they_are(kind: str) -> None:
    """With norms, biases and grouped queries no number is taken for dead, and none is in an impossible place."""
    config, params = random_model(kind)
    tokens = np.random.default_rng(5).integers(1, config.d_vocab, (12, 6)).astype(np.int32)
    tokens[:, 0] = 0
    model = Model(config, params, kind, fingerprint_of(config, params))
    task = build_task(model, "model", dataset_of(tokens, (8, 2, 2), (0,)), no_progress)
    explanation = SparseCircuit().fit(task.for_fitting())
    writer, bits = write_sparse(*explanation.rounded(Graph.of(config).possible, 12))
    assert writer.information_bits == pytest.approx(bits, abs=1e-5)
    found = explanation.kl(Graph.of(config).possible, 12)
    assert found < 1e-4


def test_what_is_no_stream_is_refused(reverse: Task) -> None:
    explanation = SparseCircuit().fit(reverse.for_fitting())
    section = explanation.section(settings(reverse))
    bits = section.header[0].symbols
    for wrong, message in (
        (Section("sparse"), "one row of bits"),
        (Section("sparse", (QuantisedArray.from_integers(bits[:, :-3]),)), "no whole bytes"),
        (Section("sparse", (QuantisedArray.from_integers(bits + 1),)), r"they lie in \[0, 1\]"),
    ):
        with pytest.raises(MessageError, match=message):
            SparseCircuitDecoder.from_section(wrong)
    cut = SparseCircuitDecoder.from_section(Section("sparse", (QuantisedArray.from_integers(bits[:, :400]),)))
    with pytest.raises(MessageError, match="a damaged circuit"):
        cut.predict(reverse.fit.inputs, NoState(1))
