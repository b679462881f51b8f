"""ACDC against a plain loop over whole forward passes."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from mdl.errors import ModelError
from mdl.models.circuits.ablations import Resample, zero
from mdl.models.circuits.acdc import acdc
from mdl.models.circuits.graph import Graph
from mdl.models.circuits.masked import masked_model, masked_run
from mdl.models.circuits.metrics import mean_kl
from tests.models.circuits.random_models import random_model, tokens_of


@pytest.mark.parametrize(("kind", "resampled"), [("one-head", False), ("neox", True)])
def test_a_plain_loop_agrees(kind: str, resampled: bool) -> None:
    config, params = random_model(kind)
    graph, tokens = Graph.of(config), tokens_of(config, batch=3)
    ablation = Resample() if resampled else zero(config, graph)
    model = masked_model(config, params, tokens, ablation.values(config, params, tokens, graph), graph)
    plain, edges, now, threshold = masked_run(model, graph.possible), np.array(graph.possible), 0.0, 0.02
    for destination in reversed(range(edges.shape[1])):
        for source in reversed(range(edges.shape[0])):
            if graph.possible[source, destination]:
                trial = edges.copy()
                trial[source, destination] = False
                loss = float(mean_kl(masked_run(model, jnp.asarray(trial, jnp.float32)), plain))
                if loss - now < threshold:
                    edges, now = trial, loss
    told: list[tuple[int, int]] = []
    found = acdc(model, mean_kl, threshold, lambda done, total: told.append((done, total)))
    assert np.array_equal(found, edges)
    assert 0 < found.sum() < graph.n_edges
    assert told[-1] == (graph.n_edges, graph.n_edges)


def test_a_threshold_of_nothing_and_of_everything() -> None:
    config, params = random_model("one-head")
    graph, tokens = Graph.of(config), tokens_of(config)
    model = masked_model(config, params, tokens, zero(config, graph).fixed, graph)
    assert not acdc(model, mean_kl, 1e9).any()
    assert acdc(model, mean_kl, 0.0).sum() > 0.7 * graph.n_edges
    for wrong in (-1.0, float("nan")):
        with pytest.raises(ModelError, match="ACDC takes 0 or more"):
            acdc(model, mean_kl, wrong)
