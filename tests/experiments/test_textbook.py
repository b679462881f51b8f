"""The textbook's circuit of induction: heads found, edges named, what is left, and edges added greedily."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from experiments.small_circuits.examples import Examples, repeats
from experiments.small_circuits.models import initial_weights, model_named
from experiments.small_circuits.textbook import Heads, Masks, head_scores, textbook_edges, textbooks
from experiments.small_circuits.training import as_model, figures, train
from mdl.models import Model
from mdl.models.circuits.graph import Graph

SMALL = replace(
    model_named("induction-2"),
    config=replace(model_named("induction-2").config, d_model=8, d_head=4, d_vocab=12, n_ctx=10),
)


@pytest.fixture(scope="module")
def model() -> Model:
    return as_model(SMALL, initial_weights(SMALL.config, 0, 2.0))


@pytest.fixture(scope="module")
def examples() -> Examples:
    return repeats(4, np.random.default_rng(0), 12, 10, range(3, 6))


def test_attention_is_counted_where_the_textbook_says(model, examples):
    """Against loops in plain Python."""
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in (0, 1)]
    found = model.run(examples.tokens, names)
    sums, count = np.zeros((2, 2)), 0
    for n, tokens in enumerate(examples.tokens.tolist()):
        for query in np.flatnonzero(examples.measured[n]):
            count += 1
            for head in range(2):
                before = [k for k in range(query + 1) if tokens[k] == tokens[query - 1]]
                sums[0, head] += sum(float(found[names[0]][n, head, query, k]) for k in before)
                behind = [k for k in range(1, query + 1) if tokens[k - 1] == tokens[query]]
                assert behind  # the period has passed once
                sums[1, head] += sum(float(found[names[1]][n, head, query, k]) for k in behind)
    heads = head_scores(model, examples)
    np.testing.assert_allclose([heads.previous, heads.induction], sums / count, rtol=1e-5)


def test_the_textbook_names_its_edges():
    assert textbook_edges([1], [0]) == [
        "input->a0.h1<q>",
        "input->a0.h1<k>",
        "input->a0.h1<v>",
        "input->a1.h0<q>",
        "input->a1.h0<v>",
        "a1.h0->logits",
        "a0.h1->a1.h0<k>",
    ]
    found = textbooks(Heads((0.1, 0.9), (0.5, 0.4)))
    assert found["textbook"] == textbook_edges([1], [0])
    assert found["textbook, all strong heads"] == textbook_edges([1], [0, 1])
    assert list(textbooks(Heads((0.1, 0.9), (0.5, 0.1)))) == ["textbook"]
    Graph.of(SMALL.config).mask(found["textbook, all strong heads"])  # each is an edge of the model


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_edges_are_added_where_they_help_most(model, examples, ablation):
    masks = Masks.of(model, examples, ablation)
    possible = masks.graph.possible
    nothing, everything = masks.bits(np.stack([np.zeros_like(possible), possible]))
    assert everything == pytest.approx(0.0, abs=1e-5)
    assert nothing > 0.1
    start = masks.graph.mask(textbook_edges([0], [1]))
    added = masks.grown(start)
    alone = []
    for source, destination in np.argwhere(possible & ~start):
        mask = start.copy()
        mask[source, destination] = True
        alone.append(float(masks.bits(mask[None])[0]))
    assert added[0][1] == pytest.approx(min(alone), rel=1e-4)
    assert added[-1][1] < 1e-4
    names = [name for name, _ in added]
    assert len(set(names)) == len(names)
    assert not start[tuple(np.transpose([masks.graph.edge(name) for name in names]))].any()


@pytest.mark.slow
def test_one_head_a_layer_learns_induction(tmp_path):
    small = model_named("induction-1")
    params = train(small, 0, tmp_path)
    loss, accuracy = figures(small, params, small.test(0))
    assert loss < 0.01
    assert accuracy > 0.995
    heads = head_scores(as_model(small, params), small.test(0))
    assert heads.previous[0] > 0.8
    assert heads.induction[0] > 0.8
