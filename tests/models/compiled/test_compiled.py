"""Compiled programs against their interpreter on every input, the edges that their weights join, and errors."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from mdl.errors import ModelError
from mdl.models.circuits.ablations import zero
from mdl.models.circuits.graph import Graph
from mdl.models.circuits.masked import masked_model, masked_run
from mdl.models.compiled import (
    PAD,
    Aggregate,
    Compiled,
    Indices,
    Linear,
    Map,
    Program,
    Select,
    SelectorWidth,
    SequenceMap,
    Tokens,
    compile_program,
    interpret,
    library,
)
from mdl.models.compiled.tracr import tracr_model
from mdl.models.compiled.truth import varying_edges, weight_true_edges

SMALL: dict[str, Callable[[], Program]] = {
    "reverse": lambda: library.reverse(3, ("a", "b")),
    "frac_prevs": lambda: library.frac_prevs(3, ("x", "y")),
    "hist": lambda: library.hist(3, ("a", "b")),
    "sort": lambda: library.sort(3, (1, 2, 3, 4)),
    "pair_balance": lambda: library.pair_balance(3),
    "dyck-1": lambda: library.dyck(4),
}


def logits_of(compiled: Compiled) -> np.ndarray:
    tokens = compiled.encode(compiled.program.inputs)
    return np.asarray(compiled.model.run(tokens, ["logits"])["logits"])


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("seed", [None, 3])
def test_the_model_computes_the_program_on_every_input(name: str, seed: int | None) -> None:
    compiled = compile_program(SMALL[name](), seed)
    for sequence, logits in zip(compiled.program.inputs, logits_of(compiled), strict=True):
        own = logits[1 : 1 + len(sequence)]
        assert compiled.decode(own) == compiled.expected(sequence)
        ordered = np.sort(own, -1)
        assert (ordered[:, -1] - ordered[:, -2] > 9.9).all()  # BETA ahead of the next


def test_the_interpreter_knows_what_programs_mean() -> None:
    """Against the definitions, in Python."""
    for tokens in (("a",), ("a", "b"), ("b", "a", "a")):
        assert interpret(SMALL["reverse"](), tokens)["reverse"][: len(tokens)] == list(tokens[::-1])
        assert interpret(SMALL["hist"](), tokens)["count"][: len(tokens)] == [tokens.count(t) for t in tokens]
    assert interpret(SMALL["sort"](), (4, 1, 3))["sorted"] == [1, 3, 4]
    assert interpret(SMALL["frac_prevs"](), ("x", "y", "x"))["share of x"] == [1, Fraction(1, 2), Fraction(2, 3)]
    balanced = {s: interpret(SMALL["dyck-1"](), s)["balanced"][0] for s in SMALL["dyck-1"]().inputs}
    assert [s for s, found in balanced.items() if found] == [tuple("()"), tuple("(())"), tuple("()()")]


def test_weight_true_edges_are_those_of_tracr() -> None:
    """13 of 77 for reverse, 5 of 23 for frac_prevs: as the models have that Tracr compiles of these programs."""
    for name, edges, all_ in (("reverse", 13, 77), ("frac_prevs", 5, 23)):
        compiled = compile_program(SMALL[name](), 1)
        graph = Graph.of(compiled.model.config)
        assert (weight_true_edges(compiled.model).sum(), graph.n_edges) == (edges, all_)
    found = weight_true_edges(compile_program(SMALL["frac_prevs"]()).model)
    expected = ["input->m0", "input->a1.h0<q>", "input->a1.h0<k>", "m0->a1.h0<v>", "a1.h0->logits"]
    assert (found == graph.mask(expected)).all()
    assert compiled.components == {"m0": ("is x",), "a1.h0": ("share of x",)}


@pytest.mark.parametrize("name", ["reverse", "dyck-1"])
def test_the_true_circuit_computes_what_the_model_does(name: str) -> None:
    compiled = compile_program(SMALL[name](), 2)
    model, tokens = compiled.model, compiled.encode(compiled.program.inputs)
    graph, edges = Graph.of(model.config), weight_true_edges(model)
    ready = masked_model(model.config, model.params, tokens, zero(model.config, graph).fixed, graph)
    plain = logits_of(compiled)
    np.testing.assert_allclose(np.asarray(masked_run(ready, edges)), plain, atol=1e-3)
    assert (varying_edges(model, tokens) <= edges).all()
    assert varying_edges(model, tokens).sum() < edges.sum()  # some read `one` alone
    for source, destination in np.argwhere(edges)[:4]:
        fewer = edges.copy()
        fewer[source, destination] = False
        assert np.abs(np.asarray(masked_run(ready, fewer)) - plain).max() > 1.0


def test_what_does_not_go_together_is_refused() -> None:
    tokens, indices = Tokens(), Indices()
    number = Map("is a", lambda t: int(t == "a"), tokens, "numerical")
    both: list[tuple[Callable[[], Any], str]] = [
        (lambda: Select(tokens, number, lambda k, q: k == q), "it compares categories with categories"),
        (lambda: SequenceMap("m", lambda a, b: a, tokens, number), "both have to be categorical"),
        (lambda: Linear("l", 1, number, 1, indices), "of which one is categorical"),
    ]
    for make, message in both:
        with pytest.raises(ModelError, match=message):
            make()
    compiled = compile_program(SMALL["reverse"]())
    with pytest.raises(ModelError, match=r"knows no token 'z': its vocabulary is \['a', 'b'\]"):
        compiled.encode([("a", "z")])
    with pytest.raises(ModelError, match="takes sequences of up to 3 tokens, not 4"):
        compiled.encode([("a", "a", "a", "b")])
    everywhere = Aggregate("any", Select(tokens, tokens, lambda k, q: k != PAD), tokens)
    with pytest.raises(ModelError, match="positions with one value in common"):
        interpret(Program("p", everywhere, ("a", "b"), 2, (("a", "b"),)), ("a", "b"))
    twice = SequenceMap("tokens", lambda a, b: a, tokens, tokens)
    with pytest.raises(ModelError, match="several operations are called tokens"):
        compile_program(Program("p", twice, ("a", "b"), 1, (("a",), ("b",))))
    width = SelectorWidth("none", Select(tokens, tokens, lambda k, q: False))
    with pytest.raises(ModelError, match="there is nothing to explain"):
        compile_program(Program("p", width, ("a", "b"), 1, (("a",), ("b",))))
    with pytest.raises(ModelError, match="at most 20000"):
        compile_program(library.frac_prevs(8))


def hand_written(layers: int = 1) -> dict[str, dict[str, np.ndarray]]:
    """In Tracr's layout: two heads of two channels, of which the second copies coordinate 0 to 1, from everywhere."""
    width = 3
    embeddings = np.array([[1.0, 0, 0], [0, 0, 1.0]])
    params = {"token_embed": {"embeddings": embeddings}, "pos_embed": {"embeddings": np.zeros((4, width))}}
    for layer in range(layers):
        name, zeros = f"transformer/layer_{layer}", np.zeros((width, 4))
        value, out = zeros.copy(), np.zeros((4, width))
        value[0, 2], out[2, 1] = 1.0, 1.0
        for part, matrix in (("query", zeros), ("key", zeros), ("value", value), ("linear", out)):
            params[f"{name}/attn/{part}"] = {"w": matrix, "b": np.zeros(matrix.shape[1])}
        params[f"{name}/mlp/linear_1"] = {"w": np.zeros((width, 5)), "b": np.zeros(5)}
        params[f"{name}/mlp/linear_2"] = {"w": np.zeros((5, width)), "b": np.zeros(width)}
    return params


def test_a_model_of_tracr_is_read() -> None:
    labels = ["tokens:a", "out_1", "tokens:b"]
    model = tracr_model(hand_written(), labels, 2, "out_1")
    found = np.asarray(model.run(np.array([[0, 1, 0, 0]]), ["logits"])["logits"])
    np.testing.assert_allclose(found, np.full((1, 4, 1), 7.5), atol=1e-5)  # BETA times the share of a
    graph = Graph.of(model.config)
    assert (weight_true_edges(model) == graph.mask(["input->a0.h1<v>", "a0.h1->logits"])).all()
    assert model.config.n_logits == 1
    assert tracr_model(hand_written(), labels, 2, "tokens").config.n_logits == 2
    with pytest.raises(ModelError, match="no coordinate is labelled 'oút'"):
        tracr_model(hand_written(), labels, 2, "oút")
    with pytest.raises(ModelError, match="no parameter 'token_embed'"):
        tracr_model({k: v for k, v in hand_written().items() if k != "token_embed"}, labels, 2, "out_1")
    biased = hand_written()
    biased["transformer/layer_0/mlp/linear_1"]["b"] += 1
    with pytest.raises(ModelError, match="linear_1 have biases"):
        tracr_model(biased, labels, 2, "out_1")
