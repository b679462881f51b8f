"""Every ablation against a slow forward in numpy; donors; fitted constants."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from mdl.errors import ModelError
from mdl.models.circuits.ablations import (
    Ablation,
    Constants,
    Counterfactual,
    Fitting,
    Resample,
    donors,
    mean,
    optimal,
    zero,
)
from mdl.models.circuits.graph import Graph
from mdl.models.circuits.masked import masked_model, masked_run
from mdl.models.circuits.metrics import kl_divergence, mean_kl
from mdl.models.circuits.outputs import Outputs, source_outputs
from mdl.models.transformer import run
from tests.models.circuits.numpy_gpt2 import arrays, masked_forward
from tests.models.circuits.random_models import mask_of, random_model, tokens_of

BATCH, POSITIONS = 3, 6
KINDS = ("zero", "mean", "positional-mean", "resample", "counterfactual", "optimal")
DONORS = {0: 1, 1: 2, 2: 0}  # of three sequences under seed 0, by hand from the three hashes


def numpy_outputs(params, graph: Graph, tokens: np.ndarray) -> np.ndarray:
    """[B, S, T, d] of the plain forward."""
    ones, shape = graph.possible.astype(float), (len(graph.sources), tokens.shape[1], 12)
    return np.stack([masked_forward(params, graph, row, ones, np.zeros(shape))[1] for row in tokens])


def make(kind: str, config, params, graph: Graph, tokens: np.ndarray, mask: np.ndarray) -> Ablation:
    other = tokens_of(config, seed=9, batch=BATCH, positions=POSITIONS)
    few = Fitting(steps=3, batch=2)
    return {
        "zero": lambda: zero(config, graph),
        "mean": lambda: mean(config, params, other, graph),
        "positional-mean": lambda: mean(config, params, other, graph, positional=True),
        "resample": lambda: Resample(0),
        "counterfactual": lambda: Counterfactual(other),
        "optimal": lambda: optimal(config, params, tokens, graph, mask, fitting=few),
    }[kind]()


def expected_values(kind: str, config, weights, graph: Graph, tokens: np.ndarray, made: Ablation) -> np.ndarray:
    other = tokens_of(config, seed=9, batch=BATCH, positions=POSITIONS)
    if kind == "resample":
        return numpy_outputs(weights, graph, tokens[[DONORS[i] for i in range(BATCH)]])
    outputs = numpy_outputs(weights, graph, other)
    if kind == "optimal":  # whatever was fitted
        assert isinstance(made, Constants)
        assert isinstance(made.fixed, jax.Array)
        return np.broadcast_to(np.asarray(made.fixed)[None, :, None], outputs.shape)
    values = {
        "zero": 0 * outputs,
        "mean": outputs.mean((0, 2), keepdims=True),
        "positional-mean": outputs.mean(0, keepdims=True),
        "counterfactual": outputs,
    }
    return np.broadcast_to(values[kind], outputs.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_a_random_mask_is_what_numpy_says(kind: str) -> None:
    config, params = random_model("gpt2")
    graph, tokens = Graph.of(config), tokens_of(config, batch=BATCH, positions=POSITIONS)
    mask = mask_of(graph, seed=len(kind)) * np.random.default_rng(1).choice([0.3, 1.0], graph.possible.shape)
    made = make(kind, config, params, graph, tokens, mask)
    assert made.kind == kind
    values = made.values(config, params, tokens, graph)
    got = np.asarray(masked_run(masked_model(config, params, tokens, values, graph), mask))
    weights = arrays(params)
    ablated = expected_values(kind, config, weights, graph, tokens, made)
    expected = np.stack([masked_forward(weights, graph, tokens[i], mask, ablated[i])[0] for i in range(BATCH)])
    assert expected.std() > 0.5
    assert np.abs(got - expected).max() < 1e-4
    assert np.abs(np.asarray(run(config, params, tokens, ["logits"])["logits"]) - expected).max() > 0.1


def test_outputs_of_sources_are_what_numpy_says() -> None:
    config, params = random_model("gpt2")
    tokens = tokens_of(config)
    expected = numpy_outputs(arrays(params), Graph.of(config), tokens)
    assert np.abs(np.asarray(source_outputs(config, params, tokens)) - expected).max() < 1e-5


def test_donors_are_one_cycle_the_same_everywhere() -> None:
    assert dict(enumerate(donors(3, 0).tolist())) == DONORS
    for seed in range(5):
        found = donors(17, seed)
        at, seen = 0, []
        for _ in range(17):
            seen.append(at)
            at = int(found[at])
        assert sorted(seen) == list(range(17))
        assert at == 0
    assert donors(17, 0).tolist() != donors(17, 1).tolist()
    with pytest.raises(ModelError, match="two or more"):
        donors(1, 0)


def test_means_over_several_batches_and_of_neurons() -> None:
    config, params = random_model("llama")
    graph, tokens = Graph.of(config, neurons=True), tokens_of(config, batch=6, positions=4)
    values = source_outputs(config, params, tokens, graph)
    assert isinstance(values, Outputs)
    found, positional = mean(config, params, tokens, graph), mean(config, params, tokens, graph, positional=True)
    assert isinstance(found.fixed, Outputs)
    assert isinstance(positional.fixed, Outputs)
    assert found.fixed.neurons.shape == (20,)
    assert positional.fixed.nodes.shape == (9, 4, 12)
    for name in ("nodes", "neurons"):
        each = np.asarray(getattr(values, name))
        assert np.abs(getattr(found.fixed, name) - each.mean((0, 2))).max() < 1e-5
        assert np.abs(getattr(positional.fixed, name) - each.mean(0)).max() < 1e-5
    nothing = zero(config, graph).fixed
    assert jax.tree.map(np.shape, nothing) == jax.tree.map(np.shape, found.fixed)


def test_fitted_constants_lower_the_kl_of_the_means() -> None:
    config, params = random_model("gpt2")
    graph, tokens = Graph.of(config), tokens_of(config, batch=8)
    mask, scored = mask_of(graph, kept=0.8), np.tile([[3, 5]], (8, 1))
    reference = run(config, params, tokens, ["logits"])["logits"][:, [3, 5]]
    told: list[tuple[int, float]] = []
    fitting = Fitting(steps=40, rate=0.03, batch=8)
    fitted = optimal(
        config, params, tokens, graph, mask, scored=scored, fitting=fitting, progress=lambda *a: told.append(a)
    )
    before, after = (
        float(mean_kl(masked_run(masked_model(config, params, tokens, c.fixed, graph, scored), mask), reference))
        for c in (mean(config, params, tokens, graph), fitted)
    )
    fixed = fitted.fixed
    assert isinstance(fixed, jax.Array)
    assert after < 0.7 * before
    assert [number for number, _ in told] == list(range(40))
    assert told[0][1] == pytest.approx(before, rel=1e-3)
    with pytest.raises(ModelError, match="not finite"):
        optimal(
            config, params, tokens, graph, mask, scored=scored, fitting=fitting, start=Constants("", np.nan * fixed)
        )


def test_the_kl_is_that_of_its_formula() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.25, 0.5])
    got = kl_divergence(jax.numpy.log(q)[None] + 3, jax.numpy.log(p)[None] - 1)
    assert float(got[0]) == pytest.approx(0.25 * np.log(2), abs=1e-6)


def test_counterfactual_tokens_come_in_pairs() -> None:
    config, params = random_model("gpt2")
    with pytest.raises(ModelError, match="come in pairs"):
        Counterfactual(tokens_of(config)).values(config, params, tokens_of(config, batch=3), Graph.of(config))
