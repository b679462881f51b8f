"""A dictionary and its encoder told apart: matching pursuit in place of an SAE's own encoder."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from decompositions.dictionary import support_of
from decompositions.sae import SAE
from decompositions.sae_codes import encode
from mdl.errors import ExplanationError
from mdl.plugins import make_decomposition
from tests.decompositions.sae_cases import D_IN, METADATA, make, outputs_of, task_of, through_message


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu", "abstopk"])
def test_pursuit_with_the_rows_of_an_sae(architecture: str):
    sae = make(architecture, **({"k": 6} if architecture == "abstopk" else {}))
    task = task_of(outputs_of())
    own, explanation = SAE(object=sae).fit(task), SAE(object=sae, encoder="pursuit", k=5).fit(task)
    np.testing.assert_array_equal(explanation.atoms, own.atoms)
    np.testing.assert_array_equal(explanation.bias, own.bias)
    predicted, state = through_message(explanation, task)
    symbols = support_of(state)
    assert np.bincount(symbols.tokens).max() <= 5
    assert (symbols.values < 0).any() == (architecture == "abstopk")
    ideal = explanation.activations(task.fit.outputs) @ explanation.atoms + explanation.bias
    np.testing.assert_allclose(predicted, ideal, atol=0.05)
    unexplained = np.square(task.fit.outputs - ideal).sum() / np.square(task.fit.outputs - own.bias).sum()
    assert unexplained < 0.25  # a random encoder explains nothing


def test_as_many_steps_as_the_own_encoder_has_features():
    sae, task = make("topk", k=7), task_of(outputs_of())
    assert encode(sae.eval(), task.fit.outputs).nnz == 7 * len(task.fit.outputs)
    explanation = SAE(object=sae, encoder="pursuit", name="").fit(task)
    assert explanation.name == "sae+pursuit"
    assert np.diff(explanation.activations(task.fit.outputs).indptr).max() == 7
    assert SAE(object=sae, encoder="pursuit", k=4).fit(task).name == "sae+pursuit (k=4)"
    assert SAE(object=sae, encoder="pursuit", k=4, name="mine").fit(task).name == "mine"


@pytest.mark.parametrize("normalisation", ["constant_norm_rescale", "layer_norm"])
def test_pursuit_sees_what_the_rows_have_to_make_up(normalisation: Any):
    sae, task = make("standard", normalize_activations=normalisation), task_of(outputs_of())
    predicted, _ = through_message(SAE(object=sae, encoder="pursuit", k=12).fit(task), task)
    outputs = task.fit.outputs
    assert np.square(outputs - predicted).sum() < 0.1 * np.square(outputs - outputs.mean(0)).sum()


def test_a_temporal_sae_is_refused_and_its_dictionary_scored():
    options: dict[str, Any] = {"d_in": D_IN, "n_heads": 1, "tied_weights": False}
    for more in ({}, {"normalize_activations": "constant_scalar_rescale", "activation_normalization_factor": 0.5}):
        sae, task = make("temporal", metadata=METADATA, **options, **more), task_of(outputs_of())
        with pytest.raises(ExplanationError, match=r"no function of its sparse codes.*attention.*encoder=pursuit,k=K"):
            SAE(object=sae).fit(task)
        with pytest.raises(ExplanationError, match="say how many features"):
            SAE(object=sae, encoder="pursuit").fit(task)
        explanation = SAE(object=sae, encoder="pursuit", k=4).fit(task)
        codes = np.abs(np.random.default_rng(0).normal(size=(3, 64))).astype(np.float32)
        with torch.no_grad():
            decoded = sae.decode(torch.from_numpy(codes)).numpy()
        np.testing.assert_allclose(codes @ explanation.atoms + explanation.bias, decoded, rtol=1e-4, atol=1e-4)


def test_options_are_read_and_refused():
    found = make_decomposition("sae:path=x,encoder=pursuit,k=16")
    assert (found.encoder, found.k) == ("pursuit", 16)
    for options in ({"k": 3}, {"k": -1, "encoder": "pursuit"}):
        with pytest.raises(ExplanationError, match=re.escape("belongs to encoder=pursuit")):
            SAE(object=make("standard"), **options).fit(task_of(outputs_of()))
