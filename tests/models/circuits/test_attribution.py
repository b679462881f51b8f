"""Edge scores: exact where everything is linear, complete where they should be, refused where the metric is flat."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdl.errors import ModelError
from mdl.models.circuits.attribution import clean_corrupted, eap, eap_ig_activations, eap_ig_inputs, exact
from mdl.models.circuits.graph import Graph
from mdl.models.circuits.masked import MaskedModel, masked_model, masked_run, write
from mdl.models.circuits.metrics import mean_kl
from mdl.models.circuits.outputs import source_outputs
from tests.models.circuits.random_models import random_model, tokens_of


def difference(logits: jax.Array, reference: jax.Array) -> jax.Array:
    """A linear metric: the mean difference of two logits at the last scored position."""
    return (logits[:, -1, 3] - logits[:, -1, 2]).mean()


def ready(kind: str, frozen: bool = False, layers: int = 2, neurons: bool = False) -> MaskedModel:
    """A random model whose ablated sources are those of other tokens; `frozen`: with uniform attention."""
    config, params = random_model(kind)
    config = replace(config, n_layers=layers)
    params["blocks"] = params["blocks"][:layers]
    if frozen:
        for block in params["blocks"]:
            block["attn"] |= {n: jnp.zeros_like(block["attn"][n]) for n in ("W_Q", "b_Q")}
    graph = Graph.of(config, neurons)
    ablated = source_outputs(config, params, tokens_of(config, seed=2), graph)
    return masked_model(config, params, tokens_of(config), ablated, graph, np.array([[2, 6], [1, 5]]))


def one_by_one(model: MaskedModel, metric) -> np.ndarray:
    ones = model.graph.possible
    plain = masked_run(model, ones)
    scores = np.zeros(ones.shape)
    for s, d in np.argwhere(ones):
        mask = ones.copy()
        mask[s, d] = False
        scores[s, d] = metric(masked_run(model, mask), plain) - metric(plain, plain)
    return scores


def test_exact_patching_is_one_masked_run_an_edge() -> None:
    model = ready("gpt2")
    told: list[tuple[int, int]] = []
    found = exact(model, mean_kl, chunk=4, progress=lambda *a: told.append(a))
    expected = one_by_one(model, mean_kl)
    assert np.abs(found - expected).max() < 1e-5
    assert found[model.graph.possible].min() > -1e-6
    assert found.max() > 0.01
    assert told[-1] == (model.graph.n_edges, model.graph.n_edges)
    assert len(told) == 3


def test_where_everything_is_linear_all_are_exact() -> None:
    """One layer of uniform attention without norms or MLPs, and a metric linear in the logits."""
    model = ready("attention-only", frozen=True, layers=1)
    expected = exact(model, difference)
    assert np.abs(expected).max() > 0.1
    scores = [eap(model, difference), clean_corrupted(model, difference), eap_ig_inputs(model, difference, 1)]
    for found in scores:
        assert np.abs(found - expected).max() < 1e-5


def test_eap_is_the_derivative_of_the_mask_in_the_plain_run() -> None:
    model = ready("gemma2", neurons=True)
    ones = jnp.asarray(model.graph.possible, jnp.float32)
    gradient = jax.jit(jax.grad(lambda mask: difference(masked_run(model, mask), mask)))(ones)
    assert np.abs(eap(model, difference) + np.asarray(gradient)).max() < 1e-4 * np.abs(gradient).max()


@pytest.mark.parametrize("metric", [mean_kl, difference])
def test_integrated_gradients_over_the_mask_add_up(metric) -> None:
    model = ready("gpt2")
    plain, nothing = (masked_run(model, f * model.graph.possible.astype(np.float32)) for f in (1, 0))
    change = float(metric(nothing, plain) - metric(plain, plain))
    assert abs(change) > 0.05
    assert eap_ig_activations(model, metric, steps=48).sum() == pytest.approx(change, rel=0.02)


def test_integrated_gradients_over_inputs_are_means_along_the_line() -> None:
    """Against differences, for some edges: what a source changes, added to what a destination reads."""
    model = ready("gpt2")
    graph, corrupted = model.graph, model.ablated[0][0]
    ones = graph.possible.astype(np.float32)
    plain, written = masked_run(model, ones), write(model, ones)
    found = eap_ig_inputs(model, mean_kl, 2)
    for name in ("input->a0.h1<v>", "a0.h2->m1", "m0->logits"):
        source, destination = graph.edge(name)
        change = jnp.concatenate(written.deltas)[source]
        slopes = []
        for embedded in (corrupted, (corrupted + model.embedded) / 2):
            between = replace(model, embedded=embedded)
            nudges = jnp.zeros((ones.shape[1], *change.shape)).at[destination].set(0.01 * change)
            up, down = (mean_kl(masked_run(between, ones, nudges=n), plain) for n in (nudges, -nudges))
            slopes.append(float(up - down) / 0.02)
        assert found[source, destination] == pytest.approx(-np.mean(slopes), rel=0.02, abs=2e-4)
    assert np.abs(found[~graph.possible]).max() == 0
    halves = (eap(model, difference) + eap_ig_inputs(model, difference, 1)) / 2
    assert np.abs(clean_corrupted(model, difference) - halves).max() < 1e-6


def test_a_flat_metric_is_refused() -> None:
    with pytest.raises(ModelError, match="flat in the plain run"):
        eap(ready("gpt2"), mean_kl)
    with pytest.raises(ModelError, match="0 steps"):
        eap_ig_inputs(ready("gpt2"), mean_kl, 0)
