"""Transcoders, written to disk by sae-lens itself: what they read, what is sent, what a receiver makes of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from decompositions.dictionary import DictionaryDecoder, DictionaryExplanation
from decompositions.sae import SAE
from decompositions.sae_origin import TRANSCODERS
from decompositions.sae_reading import candidates
from decompositions.transcoder import SkipDictionaryDecoder, TranscoderExplanation
from mdl.data import Dataset
from mdl.errors import ExplanationError, MessageError
from mdl.message import QuantisedArray, Section
from mdl.models.model import Model
from mdl.protocols import Explanation, Settings
from mdl.score import score
from mdl.task import Task, build_task
from tests.conftest import no_progress
from tests.decompositions.sae_cases import D_IN, D_SAE, forward, make, through_message

OUT = "blocks.1.hook_mlp_out"
NORMALIZED, BEHIND, STREAM = "blocks.1.ln2.hook_normalized", "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_in"


@pytest.fixture(scope="module")
def mlp_task(tiny_model: Model, tiny_data: Dataset) -> Task:
    return build_task(tiny_model, "blocks.1.mlp", tiny_data, no_progress).for_fitting()


def transcoder(architecture: str, read: str = NORMALIZED, **options: Any) -> Any:
    metadata = {"hook_name": read, "hook_name_out": OUT}
    return make(architecture, metadata=metadata, d_out=D_IN, apply_b_dec_to_input=False, **options)


def behind_the_norm(model: Model, values: np.ndarray) -> np.ndarray:
    norm = model.params["blocks"][1]["ln2"]
    return values * np.asarray(norm["w"]) + np.asarray(norm["b"])


@pytest.mark.parametrize("architecture", TRANSCODERS)
def test_every_transcoder_from_disk(architecture: str, mlp_task: Task, tmp_path: Path):
    sae = transcoder(architecture)
    sae.save_model(tmp_path / "mine")
    explanation = SAE(path=str(tmp_path / "mine")).fit(mlp_task)
    assert isinstance(explanation, TranscoderExplanation)
    assert isinstance(explanation, Explanation)
    assert explanation.name == "mine"
    assert explanation.kind == ("skip-dictionary" if "skip" in architecture else "dictionary")
    predicted, state = through_message(explanation, mlp_task, 1e-2)
    expected = forward(sae, explanation.reads(mlp_task.fit))
    np.testing.assert_allclose(predicted, expected, atol=0.05 * expected.std())
    assert len(state.values) > 0


@pytest.mark.parametrize("normalisation", ["layer_norm", "constant_norm_rescale"])
def test_what_is_normalised_before_the_encoder_needs_no_side_information(normalisation: str, mlp_task: Task):
    sae = transcoder("jumprelu_transcoder", normalize_activations=normalisation)
    explanation = SAE(object=sae).fit(mlp_task)
    x = explanation.reads(mlp_task.fit)
    dictionary = explanation.dictionary
    ours = dictionary.activations(x) @ dictionary.atoms + dictionary.bias
    np.testing.assert_allclose(ours, forward(sae, x), atol=1e-4)
    scaled = transcoder("transcoder", normalize_activations="expected_average_only_in")
    with pytest.raises(ExplanationError, match=r"scaled inputs and scaled outputs.*Fold both"):
        SAE(object=scaled).fit(mlp_task)


def fitted_skip(read: str, inputs: np.ndarray, outputs: np.ndarray) -> Any:
    """A skip transcoder that is the best affine map of `inputs`, and a few features that are never on."""
    sae = transcoder("skip_transcoder", read)
    with_one = np.concatenate([inputs, np.ones((len(inputs), 1))], 1)
    solved = np.linalg.lstsq(with_one, outputs, rcond=1e-4)[0]  # a LayerNorm leaves a direction empty
    with torch.no_grad():
        sae.W_skip.copy_(torch.from_numpy(solved[:-1].T.copy()))
        sae.b_dec.copy_(torch.from_numpy(solved[-1].copy()))
        sae.W_dec.mul_(1e-3)
    return sae


@pytest.mark.parametrize("read", [NORMALIZED, BEHIND])
@pytest.mark.parametrize("scaled", [False, True])
def test_what_a_name_means_is_what_predicts_best(read: str, scaled: bool, mlp_task: Task, tiny_model: Model):
    """hook_normalized lies before the norm's scale and bias or behind them, by version; a receiver has the former."""
    normalized = mlp_task.fit.inputs.scored_values()
    x = behind_the_norm(tiny_model, normalized) if scaled else normalized
    sae = fitted_skip(read, x, mlp_task.fit.outputs)
    explanation = SAE(object=sae).fit(mlp_task)
    np.testing.assert_allclose(explanation.reads(mlp_task.fit), x, rtol=1e-5, atol=1e-5)
    (note,) = [n for n in explanation.notes if "under which it predicts best" in n]
    assert ("behind its scale and bias" in note) == scaled
    predicted, _ = through_message(explanation, mlp_task, 1e-2)
    expected = forward(sae, np.asarray(x, np.float32))
    np.testing.assert_allclose(predicted, expected, atol=0.05 * expected.std())


def test_a_transcoder_that_reads_before_the_norm(mlp_task: Task, tiny_model: Model):
    found = candidates(mlp_task, STREAM, "x")
    assert [reading.site for reading in found] == ["blocks.1.hook_resid_mid", NORMALIZED, NORMALIZED]
    tokens, scored = mlp_task.fit.inputs.tokens, mlp_task.fit.inputs.scored
    stream = np.asarray(tiny_model.run(tokens, ["blocks.1.hook_resid_mid"])["blocks.1.hook_resid_mid"])[scored]
    np.testing.assert_allclose(found[0](mlp_task.fit), stream, atol=1e-4)
    sae = fitted_skip("blocks.1.hook_resid_mid", stream, mlp_task.fit.outputs)
    with pytest.raises(ExplanationError, match=r"skip path multiplies blocks\.1\.hook_resid_mid, of which"):
        SAE(object=sae).fit(mlp_task)
    plain = transcoder("transcoder", "blocks.1.hook_resid_mid")
    explanation = SAE(object=plain).fit(mlp_task)
    x = explanation.reads(mlp_task.fit)
    np.testing.assert_allclose(x, stream, atol=1e-4)
    dictionary = explanation.dictionary
    ours = dictionary.activations(x) @ dictionary.atoms + dictionary.bias
    np.testing.assert_allclose(ours, forward(plain, x), atol=1e-3)


def test_a_transcoder_that_does_not_say_where_it_reads(mlp_task: Task):
    sae = make("transcoder", metadata={}, d_out=D_IN, apply_b_dec_to_input=False)
    notes = SAE(object=sae).fit(mlp_task).notes
    assert f"does not say at which site it writes; {OUT} is taken on trust" in notes
    assert f"does not say what it reads; the region's input, {NORMALIZED}, is taken on trust" in notes


def test_sites_and_widths_of_another_model_are_refused(mlp_task: Task):
    with pytest.raises(ExplanationError, match=r"reads blocks\.7\.hook_resid_mid, which .* does not have \(2 layers"):
        SAE(object=transcoder("transcoder", "blocks.7.hook_resid_mid")).fit(mlp_task)
    with pytest.raises(ExplanationError, match=r"reads blocks\.7\.ln2\.hook_normalized, which .* does not have"):
        SAE(object=transcoder("transcoder", "blocks.7.ln2.hook_normalized")).fit(mlp_task)
    with pytest.raises(ExplanationError, match=r"reads 8 numbers a token, blocks\.1\.ln2\.hook_normalized has 16"):
        SAE(object=transcoder("transcoder", d_in=8)).fit(mlp_task)
    metadata = {"hook_name": NORMALIZED, "hook_name_out": OUT}
    wide = make("transcoder", metadata=metadata, d_out=8, apply_b_dec_to_input=False)
    with pytest.raises(ExplanationError, match=r"writes 8 numbers a token.*has 16.*hook_mlp_out"):
        SAE(object=wide).fit(mlp_task)
    one = {**metadata, "hook_head_index": 1}
    with pytest.raises(ExplanationError, match="head 1 alone"):
        SAE(object=make("transcoder", metadata=one, d_out=D_IN, apply_b_dec_to_input=False)).fit(mlp_task)


def test_its_rows_with_pursuit_in_place_of_its_encoder(mlp_task: Task):
    plain = SAE(object=transcoder("transcoder"), encoder="pursuit", k=4).fit(mlp_task)
    assert isinstance(plain, DictionaryExplanation)
    skipping = SAE(object=transcoder("skip_transcoder"), encoder="pursuit", k=4).fit(mlp_task)
    assert isinstance(skipping, TranscoderExplanation)
    linear = mlp_task.fit.inputs.scored_values() @ skipping.skip.matrix
    np.testing.assert_allclose(skipping.reads(mlp_task.fit), mlp_task.fit.outputs - linear, atol=1e-3)
    predicted, _ = through_message(skipping, mlp_task, 1e-2)
    left = np.square(mlp_task.fit.outputs - predicted).sum() / np.square(skipping.reads(mlp_task.fit)).sum()
    assert left < 0.5


def test_a_copy_shares_the_model(mlp_task: Task):
    explanation = SAE(object=transcoder("transcoder")).fit(mlp_task)
    twin = copy.deepcopy(explanation)
    assert twin.reads.model is explanation.reads.model
    np.testing.assert_array_equal(twin.dictionary.atoms, explanation.dictionary.atoms)


def test_damaged_sections_are_refused(mlp_task: Task):
    explanation = SAE(object=transcoder("skip_transcoder")).fit(mlp_task)
    section = explanation.section(Settings(1e3, 0.1, np.eye(D_IN)))
    assert isinstance(SkipDictionaryDecoder.from_section(section).dictionary, DictionaryDecoder)
    assert section.n_parts <= D_SAE
    with pytest.raises(MessageError, match="has 3 header arrays; this one has 2"):
        SkipDictionaryDecoder.from_section(Section(section.kind, section.header[:2], section.parts))
    other = QuantisedArray.from_values(np.ones((D_IN, 5)), 0.1)
    with pytest.raises(MessageError, match=r"a matrix \(16, 5\) for outputs of 16"):
        SkipDictionaryDecoder.from_section(Section(section.kind, (*section.header[:2], other), section.parts))


@pytest.mark.usefixtures("in_little_time")
def test_a_skip_transcoder_is_scored(tiny_model: Model, tiny_data: Dataset):
    task = build_task(tiny_model, "blocks.1.mlp", tiny_data, no_progress)
    x = task.fit.inputs.scored_values()
    sae = fitted_skip(NORMALIZED, x, task.fit.outputs)
    card, messages = score(task, [SAE(object=sae, name="skip")], phenomena=["activations"], fidelities=[0.1])
    (found,) = [s for s in card.scores if s.explanation == "skip"]
    assert found.rate > 0
    assert found.beside["explained_variance"] > 0.1
    assert any("skip" in name for name in messages)
