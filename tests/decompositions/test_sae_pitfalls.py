"""Where scores of SAEs go wrong without an error: each pitfall by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from decompositions.sae import SAE
from decompositions.transcoder import TranscoderExplanation
from mdl.data import Dataset
from mdl.errors import ExplanationError
from mdl.models import load_model
from mdl.models.model import Model
from mdl.protocols import Inputs, Sample
from mdl.state import JoinedState
from mdl.task import Task, build_task
from tests.conftest import START, gpt2, no_progress
from tests.decompositions.sae_cases import D_IN, SITE, TOKENS, forward, make, outputs_of, task_of, through_message


def with_kwargs(**kwargs: Any) -> dict[str, Any]:
    return {"hook_name": SITE, "model_from_pretrained_kwargs": kwargs}


def centred(outputs: np.ndarray) -> np.ndarray:
    return outputs - outputs.mean(1, keepdims=True)


def test_pitfall_a_special_tokens_are_never_encoded(tiny_task: Task):
    """Their outputs are constants of the message: what the SAE does to them plays no part."""
    sae = make("standard")
    activations = tiny_task.fit_activations
    special = activations.tokens == START
    assert special.any()
    assert not activations.scored[special].any()
    huge = np.where(special[..., None], 1e6, activations.outputs).astype(np.float32)
    changed = replace(tiny_task, fit_activations=replace(activations, outputs=huge))
    first, second = (SAE(object=sae).fit(t.for_fitting()) for t in (tiny_task, changed))
    np.testing.assert_array_equal(first.statistics.frequency, second.statistics.frequency)
    np.testing.assert_array_equal(first.statistics.energy, second.statistics.energy)
    filled = activations.filled(np.zeros((activations.n_tokens, D_IN), np.float32), {START: np.full(D_IN, 3.0)})
    np.testing.assert_array_equal(filled[special], 3.0)


def test_pitfall_b_a_token_is_scored_by_its_own_id(tiny_task: Task):
    """Not by that of the token that it predicts, nor of the one before it."""
    activations = tiny_task.fit_activations
    np.testing.assert_array_equal(activations.scored, activations.tokens != START)
    assert (
        SAE(object=make("standard")).fit(tiny_task.for_fitting()).activations(tiny_task.fit.outputs).shape[0]
        == (activations.tokens != START).sum()
    )


def test_pitfall_c_an_sae_of_centred_weights_is_refused_on_others(tiny_data: Dataset):
    """center_writing_weights changes the residual stream, and no published metric says so."""
    sae = make("standard", metadata=with_kwargs(center_writing_weights=True))
    as_it_is, processed = load_model(gpt2()), load_model(gpt2(), center_writing_weights=True)
    tasks = [build_task(m, f"upstream of {SITE}", tiny_data, no_progress).for_fitting() for m in (as_it_is, processed)]
    with pytest.raises(ExplanationError, match=r"loaded without it\. Load it so: --process center_writing_weights"):
        SAE(object=sae).fit(tasks[0])
    assert not SAE(object=sae).fit(tasks[1]).notes
    assert "center_writing_weights=True" in SAE(object=sae, any_site=True).fit(tasks[0]).notes[0]
    opposite = make("standard", metadata=with_kwargs(center_writing_weights=False))
    with pytest.raises(ExplanationError, match=r"center_writing_weights=False; .* was loaded with it"):
        SAE(object=opposite).fit(tasks[1])
    assert not SAE(object=opposite).fit(tasks[0]).notes


def test_pitfall_c_processing_that_changes_no_residual_stream_is_not_asked_for():
    kwargs = with_kwargs(fold_ln=True, center_unembed=True, fold_value_biases=True, dtype="bfloat16")
    assert SAE(object=make("standard", metadata=kwargs)).fit(task_of(outputs_of())).notes == ()


@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
@pytest.mark.parametrize(("normalisation", "columns"), [("constant_norm_rescale", 1), ("layer_norm", 2)])
def test_pitfall_d_normalisations_of_each_token_are_charged(architecture: str, normalisation: Any, columns: int):
    sae = make(architecture, normalize_activations=normalisation)
    task = task_of(outputs_of())
    predicted, state = through_message(SAE(object=sae).fit(task), task)
    np.testing.assert_allclose(predicted, forward(sae, task.fit.outputs), atol=0.05)
    assert isinstance(state, JoinedState)
    sparse, side = state.streams
    assert side.values.shape == (TOKENS, columns)
    assert state.length().total > sparse.length().total + TOKENS


def test_pitfall_e_expected_average_without_a_factor_is_measured_and_noted():
    sae = make("standard", normalize_activations="expected_average_only_in")
    outputs = 7.0 * outputs_of()
    task = task_of(outputs)
    explanation = SAE(object=sae).fit(task)
    factor = np.sqrt(D_IN) / np.linalg.norm(outputs, axis=1).mean()
    predicted, _ = through_message(explanation, task)
    np.testing.assert_allclose(predicted, forward(sae, outputs * np.float32(factor)) / factor, atol=0.2)
    assert f"{factor:.6g}" in explanation.notes[0]
    assert sae.cfg.normalize_activations == "expected_average_only_in"  # the caller's object is left alone


@pytest.mark.parametrize("architecture", ["standard", "gated", "topk", "jumprelu", "matching_pursuit"])
def test_pitfall_f_both_conventions_of_the_decoder_bias(architecture: str):
    """It is taken off the input or not, as the config says; a tied SAE without it there has none at the output."""
    outputs = outputs_of()
    for applied in (True, False):
        sae = make(architecture, apply_b_dec_to_input=applied, **({"k": 6} if architecture == "topk" else {}))
        explanation = SAE(object=sae).fit(task_of(outputs))
        decoded = explanation.activations(outputs) @ explanation.atoms + explanation.bias
        np.testing.assert_allclose(decoded, forward(sae, outputs), atol=1e-4)
        assert explanation.bias.any() == (applied or architecture != "matching_pursuit")


def test_pitfall_h_a_hook_z_sae_is_carried_on_to_the_attention_output(tiny_model: Model, tiny_data: Dataset):
    """Heads are flattened; W_O, a part of the region, takes rows and bias to where the region ends."""
    task = build_task(tiny_model, "blocks.1.attn", tiny_data, no_progress).for_fitting()
    sae = make("standard", reshape_activations="hook_z", metadata={"hook_name": "blocks.1.attn.hook_z"})
    explanation = SAE(object=sae).fit(task)
    assert isinstance(explanation, TranscoderExplanation)
    predicted, _ = through_message(explanation, task, 1e-2)
    z = np.asarray(tiny_model.run(task.fit.inputs.tokens, ["blocks.1.attn.hook_z"])["blocks.1.attn.hook_z"])
    with torch.no_grad():
        rebuilt = sae(torch.from_numpy(z[task.fit.inputs.scored])).numpy()
    attention = tiny_model.params["blocks"][1]["attn"]
    expected = np.einsum("nhe,hed->nd", rebuilt, attention["W_O"]) + np.asarray(attention["b_O"])
    np.testing.assert_allclose(predicted, expected, atol=0.05 * expected.std())
    with pytest.raises(ExplanationError, match=r"trained at blocks\.1\.hook_attn_out.*region 'blocks\.1\.attn'"):
        SAE(object=sae).fit(build_task(tiny_model, "blocks.1.mlp", tiny_data, no_progress).for_fitting())


def test_pitfall_h_what_cannot_be_carried_on_is_refused(tiny_model: Model, tiny_data: Dataset):
    task = build_task(tiny_model, "blocks.1.attn", tiny_data, no_progress).for_fitting()
    metadata = {"hook_name": "blocks.1.attn.hook_z"}
    with pytest.raises(ExplanationError, match="norm or mean of each token"):
        SAE(object=make("standard", metadata=metadata, normalize_activations="layer_norm")).fit(task)
    with pytest.raises(ExplanationError, match=r"reads 8 numbers a token, blocks\.1\.attn\.hook_z has 16"):
        SAE(object=make("standard", metadata=metadata, d_in=8)).fit(task)
    folded = {**metadata, "model_from_pretrained_kwargs": {"fold_value_biases": True}}
    with pytest.raises(ExplanationError, match=r"process=\['fold_value_biases'\]"):
        SAE(object=make("standard", metadata=folded)).fit(task)


def test_pitfall_h_neurons_are_carried_on_too(tiny_model: Model, tiny_data: Dataset):
    task = build_task(tiny_model, "blocks.0.mlp", tiny_data, no_progress).for_fitting()
    sae = make("jumprelu", d_in=64, metadata={"hook_name": "blocks.0.mlp.hook_post"})
    explanation = SAE(object=sae).fit(task)
    values = np.asarray(tiny_model.run(task.fit.inputs.tokens, ["blocks.0.mlp.hook_post"])["blocks.0.mlp.hook_post"])
    mlp = tiny_model.params["blocks"][0]["mlp"]
    expected = forward(sae, values[task.fit.inputs.scored]) @ np.asarray(mlp["W_out"]) + np.asarray(mlp["b_out"])
    dictionary = explanation.dictionary
    ours = dictionary.activations(explanation.reads(task.fit)) @ dictionary.atoms + dictionary.bias
    np.testing.assert_allclose(ours, expected, atol=1e-3 * expected.std())


def test_pitfall_h_one_head_alone_is_refused():
    sae = make("standard", metadata={"hook_name": "blocks.0.attn.hook_z", "hook_head_index": 3})
    with pytest.raises(ExplanationError, match="head 3 alone"):
        SAE(object=sae).fit(task_of(outputs_of(), "blocks.0.hook_attn_out"))


def test_pitfall_i_a_transcoder_belongs_to_the_region_that_it_writes_to():
    metadata = {"hook_name": "blocks.1.ln2.hook_normalized", "hook_name_out": "blocks.1.hook_mlp_out"}
    sae = make("transcoder", metadata=metadata, d_out=D_IN, apply_b_dec_to_input=False)
    with pytest.raises(ExplanationError, match=r"writes to blocks\.1\.hook_mlp_out.*Take the region 'blocks\.1\.mlp'"):
        SAE(object=sae).fit(task_of(outputs_of(), SITE))


def test_context_and_start_tokens_are_noted():
    """Pitfall j is the data's: a task's sequences are fixed, and their hash is part of every score."""
    outputs = outputs_of()
    longer = make("standard", metadata={"hook_name": SITE, "context_size": 100, "prepend_bos": True})
    notes = SAE(object=longer).fit(task_of(outputs)).notes
    assert notes[0] == "trained on contexts of 100 tokens, these have 120"
    assert "100 % of these begin without" in notes[1]
    tokens = np.zeros((1, TOKENS), np.int32)
    scored = np.arange(TOKENS)[None] > 0
    task = task_of(outputs)
    task.fit = Sample(Inputs(tokens, scored), outputs[1:])
    assert not any("start token" in note for note in SAE(object=longer).fit(task).notes)
    enough = make("standard", metadata={"hook_name": SITE, "context_size": 120, "seqpos_slice": [None]})
    assert SAE(object=enough).fit(task_of(outputs)).notes == ()
    sliced = make("standard", metadata={"hook_name": SITE, "seqpos_slice": [5, None]})
    assert "positions [5, None] alone" in SAE(object=sliced).fit(task_of(outputs)).notes[0]
