"""Circuits as explanations: what the receiver rebuilds, what it costs, which circuit is sent, and errors."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from decompositions.circuits.circuit import Circuit, CircuitExplanation
from decompositions.circuits.decoder import BYTE, CircuitDecoder
from decompositions.weights.yardsticks import Weights
from mdl.errors import ExplanationError, MessageError, ModelError
from mdl.message import QuantisedArray, Section, decode_message, encode_message
from mdl.models.circuits.ablations import Constants, mean, zero
from mdl.models.circuits.graph import Graph
from mdl.models.circuits.masked import masked_model, masked_run
from mdl.models.model import Model, fingerprint_of
from mdl.protocols import Settings
from mdl.state import NoState
from mdl.task import Task, build_task
from tests.conftest import dataset_of, no_progress
from tests.models.circuits.random_models import mask_of, random_model

FINE = 1e-5  # a step at which nothing is lost


def task_of(kind: str, region: str = "model", sequences: int = 12) -> Task:
    """A random model on random tokens; token 0 begins every sequence and is not scored."""
    config, params = random_model(kind)
    model = Model(config, params, kind, fingerprint_of(config, params))
    tokens = np.random.default_rng(5).integers(1, config.d_vocab, (3 * sequences, 7)).astype(np.int32)
    tokens[:, 0] = 0
    return build_task(model, region, dataset_of(tokens, (sequences, sequences, sequences), (0,)), no_progress)


def settings(task: Task, step: float = FINE, horizon: float = 1e4) -> Settings:
    return Settings(horizon, step, np.eye(task.width), {"static": 1.0}, corrected=False)


def sent(explanation: Any, chosen: Settings) -> tuple[float, Any]:
    """Bits, and the decoder of what arrives."""
    message = encode_message([explanation.section(chosen)])
    (section,) = decode_message(message.data)
    return message.whole_bits, CircuitDecoder.from_section(section)


@pytest.mark.parametrize(
    ("kind", "ablation", "level"),
    [
        ("gpt2", "zero", "edge"),
        ("neox", "mean", "subspace"),
        ("llama", "mean", "edge"),
        ("attention-only-norm", "mean", "subspace"),
        ("attention-only", "zero", "subspace"),
        ("final-rms", "mean", "edge"),
    ],
)
def test_the_receiver_runs_the_circuit(kind: str, ablation: Any, level: Any) -> None:
    """From the message alone: the model's own masked run, with what stands in for the dropped sources."""
    task = task_of(kind)
    model = task.model
    assert isinstance(model, Model)
    graph = Graph.of(model.config)
    edges = graph.pruned(mask_of(graph, kept=0.5), constant=True)
    assert 0 < edges.sum() < graph.n_edges
    explanation = Circuit(edges=edges, level=level, ablation=ablation).fit(task.for_fitting())
    _, decoder = sent(explanation, settings(task))
    assert task.held_out is not None
    sample = task.held_out.sample()
    found = decoder.predict(sample.inputs, NoState(sample.inputs.n_tokens))
    fixed = Constants(ablation, jnp.asarray(explanation.searched.means, jnp.float32))
    values = fixed.values(model.config, model.params, sample.inputs.tokens, graph)
    expected = masked_run(masked_model(model.config, model.params, sample.inputs.tokens, values, graph), edges)
    assert np.abs(found - np.asarray(expected)[sample.inputs.scored]).max() < 2e-3
    assert np.abs(found - sample.outputs).max() > 0.05  # something was dropped


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_all_edges_are_the_weights(kind: str) -> None:
    """And cost what the weights cost, but for naming them; they give the model's own outputs."""
    task = task_of(kind)
    chosen = settings(task)
    graph = Graph.of(task.model.config)  # type: ignore[union-attr]
    bits, decoder = sent(Circuit(edges=graph.possible).fit(task.for_fitting()), chosen)
    weights = encode_message([Weights().fit(task.for_fitting()).section(chosen)]).whole_bits
    assert abs(bits - weights) < 0.02 * weights + 600
    assert task.held_out is not None
    sample = task.held_out.sample()
    found = decoder.predict(sample.inputs, NoState(sample.inputs.n_tokens))
    np.testing.assert_allclose(found, sample.outputs, atol=1e-3)
    assert decoder.flops_per_token(sample.inputs, NoState(1)) > 0


def test_an_edge_earns_its_keep() -> None:
    """The induction circuit: a key that reads one head alone takes d_head rows in place of d."""
    task = task_of("attention-only-norm")
    graph = Graph.of(task.model.config)  # type: ignore[union-attr]
    names = ["input->a0.h1<q>", "input->a0.h1<k>", "input->a0.h1<v>", "input->a1.h0<q>", "a0.h1->a1.h0<k>"]
    edges = graph.mask([*names, "input->a1.h0<v>", "a1.h0->logits"])
    fitted = {level: Circuit(edges=edges, level=level).fit(task.for_fitting()) for level in ("edge", "subspace")}
    bits = {level: sent(explanation, settings(task))[0] for level, explanation in fitted.items()}
    assert bits["subspace"] < bits["edge"] - 100
    dense = sent(Circuit(edges=graph.possible).fit(task.for_fitting()), settings(task))[0]
    assert bits["edge"] < 0.8 * dense


@pytest.mark.parametrize("search", ["eap-ig", "exact", "greedy"])
@pytest.mark.parametrize("level", ["node", "edge"])
def test_searches_nest_and_a_longer_horizon_keeps_more(search: str, level: Any) -> None:
    task = task_of("gpt2", "upstream of blocks.1.hook_resid_pre" if search == "eap-ig" else "model")
    explanation = Circuit(search=search, level=level).fit(task.for_fitting())
    assert isinstance(explanation, CircuitExplanation)
    path = explanation.path.circuits
    assert len(path) > 3
    assert all((a & ~b).sum() <= 0.5 * a.sum() for a, b in pairwise(path))
    assert (path[-1] == explanation.graph.pruned(explanation.graph.possible)).all()
    damage = explanation.path.damage(explanation.searched, settings(task))
    assert damage[0] > 10 * damage[-1]
    assert damage[-1] < 1e-4
    kept = [explanation.chosen(settings(task, 0.1, n)).sum() for n in (1e2, 1e7)]
    assert kept[0] < kept[1]


@pytest.mark.parametrize(("kind", "ablation"), [("gpt2", "mean"), ("llama", "zero")])
def test_neurons_are_kept_one_by_one(kind: str, ablation: Any) -> None:
    """What the receiver makes of the message is the masked run of the graph with neurons as sources."""
    task = task_of(kind)
    model = task.model
    assert isinstance(model, Model)
    explanation = Circuit(level="neuron", ablation=ablation, search="eap-ig").fit(task.for_fitting())
    graph, searched = explanation.graph, explanation.searched
    assert len(graph.sources) == 1 + 2 * (model.config.n_heads + model.config.d_mlp)
    edges = explanation.path.circuits[len(explanation.path.circuits) // 2]
    kept = [name for name, on in zip(graph.sources, edges.any(1), strict=True) if on and ".n" in name]
    assert 0 < len(kept) < 2 * model.config.d_mlp
    section = explanation._packing(edges, settings(task)).section(settings(task))
    (arrived,) = decode_message(encode_message([section]).data)
    sample = task.fit
    found = CircuitDecoder.from_section(arrived).predict(sample.inputs, NoState(sample.inputs.n_tokens))
    ablated = zero(model.config, graph)
    if ablation == "mean":  # over the sequences that were searched
        ablated = mean(model.config, model.params, np.asarray(searched.tokens), graph)
    expected = masked_run(masked_model(model.config, model.params, sample.inputs.tokens, ablated.fixed, graph), edges)
    assert np.abs(found - np.asarray(expected)[sample.inputs.scored]).max() < 2e-3


def test_greedy_search_removes_least_first() -> None:
    """At every step the node whose removal, for its size, changes least: found by trying all by hand."""
    task = task_of("attention-only")
    explanation = Circuit(search="greedy", level="node", ablation="zero").fit(task.for_fitting())
    graph, searched = explanation.graph, explanation.searched
    units = np.eye(len(graph.sources), dtype=bool)
    changes = {i: float(searched.changes(graph.induced(~units[i])[None])[0]) for i in range(1, len(units))}
    least = min(changes, key=lambda i: changes[i])
    without = graph.pruned(graph.induced(~units[least]), constant=True)
    assert any((without == circuit).all() for circuit in explanation.path.circuits)


def test_errors() -> None:
    task = task_of("gpt2")
    graph = Graph.of(task.model.config)  # type: ignore[union-attr]
    for wrong, message in (
        ({"search": "astrology"}, "no search 'astrology'"),
        ({"edges": ~graph.possible}, "edges that are not in it"),
        ({"edges": graph.mask(["input->a0.h0<q>"])}, "the circuit is empty"),
    ):
        with pytest.raises(ExplanationError, match=message):
            Circuit(**wrong).fit(task.for_fitting())  # type: ignore[arg-type]
    mlp = task_of("gpt2", "blocks.0.mlp")
    with pytest.raises(ModelError, match="circuits explain the whole model"):
        Circuit().fit(mlp.for_fitting())


def test_what_does_not_fit_is_refused() -> None:
    task = task_of("attention-only")
    section = Circuit(edges=Graph.of(task.model.config).possible).fit(task.for_fitting()).section(settings(task))  # type: ignore[union-attr]
    sample = task.fit
    state = NoState(sample.inputs.n_tokens)
    with pytest.raises(MessageError, match="has no parts"):
        CircuitDecoder.from_section(Section("circuit", section.header[:1]))
    few = CircuitDecoder.from_section(Section("circuit", section.header[:-1]))
    with pytest.raises(MessageError, match="blocks that its edges ask for"):
        few.predict(sample.inputs, state)
    damaged = QuantisedArray.from_integers(section.header[1].symbols ^ 255)
    with pytest.raises(MessageError, match="edges"):
        CircuitDecoder.from_section(Section("circuit", (section.header[0], damaged, *section.header[2:]))).predict(
            sample.inputs, state
        )
    assert section.header[1].symbols.min() >= BYTE
