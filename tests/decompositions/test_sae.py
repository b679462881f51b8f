"""sae-lens SAEs of every architecture, written to disk by sae-lens itself and scored from their messages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import sae_lens
from sae_lens.registry import SAE_CLASS_REGISTRY, get_sae_training_class
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import load_file, save_file

from decompositions.dictionary import support_of
from decompositions.sae import SAE
from decompositions.sae_codes import encode
from decompositions.sae_origin import LINEAR, TEMPORAL, TRANSCODERS, canonical_site
from mdl.errors import ExplanationError
from mdl.protocols import Decomposition, Explanation
from tests.decompositions.sae_cases import (
    D_IN,
    D_SAE,
    METADATA,
    forward,
    make,
    outputs_of,
    randomise,
    task_of,
    through_message,
)

INFERENCE = {
    "standard": {},
    "gated": {},
    "topk": {"k": 6},
    "topk rescaled": {"k": 6, "rescale_acts_by_decoder_norm": True},
    "abstopk": {"k": 6},
    "jumprelu": {},
    "matching_pursuit": {"max_iterations": 5},
}
TRAINING = {
    "standard": {},
    "gated": {},
    "topk": {"k": 6},
    "jumprelu": {},
    "batchtopk": {"k": 6.0},
    "matryoshka_batchtopk": {"k": 6.0, "matryoshka_widths": [16, D_SAE]},
}


def test_every_registered_architecture_is_known():
    # Transcoders: test_transcoder.py. Temporal: refused below, its dictionary scored in test_sae_pursuit.py.
    assert set(SAE_CLASS_REGISTRY) == {*LINEAR, *TRANSCODERS, TEMPORAL}
    assert {name.split()[0] for name in INFERENCE} == set(LINEAR)


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("architecture", list(INFERENCE))
def test_every_architecture_from_disk(architecture: str, apply_b_dec_to_input: bool, tmp_path: Path):
    sae = make(architecture, apply_b_dec_to_input=apply_b_dec_to_input, **INFERENCE[architecture])
    sae.save_model(tmp_path / "mine")
    task = task_of(outputs_of())
    decomposition = SAE(path=str(tmp_path / "mine"))
    assert isinstance(decomposition, Decomposition)
    explanation = decomposition.fit(task)
    assert isinstance(explanation, Explanation)
    assert explanation.name == "mine"
    assert explanation.notes == ()
    predicted, state = through_message(explanation, task)
    np.testing.assert_allclose(predicted, forward(sae, task.fit.outputs), atol=0.03)
    assert explanation.signed == (architecture == "abstopk")
    assert (support_of(state).values < 0).any() == explanation.signed


@pytest.mark.parametrize("architecture", list(TRAINING))
def test_training_classes_in_their_inference_form(architecture: str, tmp_path: Path):
    sae_class, config_class = get_sae_training_class(architecture)
    config = config_class(d_in=D_IN, d_sae=D_SAE, metadata=SAEMetadata(**METADATA), **TRAINING[architecture])
    training = randomise(sae_class(config))
    training.save_inference_model(tmp_path)
    task = task_of(outputs_of())
    explanation = SAE(path=str(tmp_path)).fit(task)
    predicted, _ = through_message(explanation, task)
    np.testing.assert_allclose(predicted, forward(sae_lens.SAE.load_from_disk(tmp_path), task.fit.outputs), atol=0.03)
    by_object, _ = through_message(SAE(object=training, name="as object").fit(task), task)
    np.testing.assert_array_equal(by_object, predicted)


def test_encoding_does_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch):
    sae, outputs = make("topk", k=6), outputs_of()
    whole = encode(sae, outputs)
    monkeypatch.setattr("decompositions.sae_codes.CHUNK_ELEMENTS", 7 * D_SAE)
    # float32 products of other shapes: equal to a few units in the last place
    np.testing.assert_allclose(encode(sae, outputs).toarray(), whole.toarray(), rtol=2e-6, atol=1e-6)
    np.testing.assert_array_equal(np.diff(whole.indptr) <= 6, True)
    assert encode(sae, outputs[:0]).shape == (0, D_SAE)


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("blocks.2.hook_resid_post", "blocks.3.hook_resid_pre"),
        ("blocks.3.hook_resid_pre", "blocks.3.hook_resid_pre"),
        ("model.layers.11", "blocks.12.hook_resid_pre"),
        ("transformer.h.0", "blocks.1.hook_resid_pre"),
        ("gpt_neox.layers.3.attention", "blocks.3.hook_attn_out"),
        ("model.layers.0.mlp", "blocks.0.hook_mlp_out"),
        ("blocks.2.hook_mlp_out", "blocks.2.hook_mlp_out"),
    ],
)
def test_canonical_sites(name: str, canonical: str):
    assert canonical_site(name) == canonical


def test_another_site_is_an_error_unless_asked_for():
    sae, task = make("standard"), task_of(outputs_of(), "blocks.3.hook_resid_pre")
    with pytest.raises(ExplanationError, match=r"trained at blocks\.1\.hook_resid_pre.*output is blocks\.3.*any_site"):
        SAE(object=sae).fit(task)
    assert "trained at blocks.1" in SAE(object=sae, any_site=True).fit(task).notes[0]
    nameless = SAE(object=make("standard", metadata={})).fit(task)
    assert "does not say" in nameless.notes[0]


def test_another_width_names_both_numbers_and_the_origin():
    with pytest.raises(ExplanationError, match=r"reads 16 numbers.*has 20.*\(tiny, blocks\.1"):
        SAE(object=make("standard")).fit(task_of(outputs_of(20)))


def test_nan_weights_name_the_tensor(tmp_path: Path):
    make("standard").save_model(tmp_path)
    weights = load_file(tmp_path / "sae_weights.safetensors")
    weights["W_dec"][3, :2] = float("nan")
    save_file(weights, tmp_path / "sae_weights.safetensors")
    with pytest.raises(ExplanationError, match="2 of 1024 entries of W_dec are NaN"):
        SAE(path=str(tmp_path)).fit(task_of(outputs_of()))


def test_unfolded_whitening_is_refused():
    sae = make("standard", normalize_activations="covariance_whitening")
    with pytest.raises(ExplanationError, match=r"covariance_whitening.*fold it into"):
        SAE(object=sae).fit(task_of(outputs_of()))


@pytest.mark.parametrize("options", [{}, {"release": "a"}, {"id": "b"}, {"path": "p", "release": "a", "id": "b"}])
def test_exactly_one_source(options: dict[str, str]):
    with pytest.raises(ExplanationError, match="by path, or by release and id"):
        SAE(**options).fit(task_of(outputs_of()))


def test_an_object_of_another_kind():
    with pytest.raises(ExplanationError, match="object is a dict"):
        SAE(object={}).fit(task_of(outputs_of()))
