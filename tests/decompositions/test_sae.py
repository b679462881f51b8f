"""sae-lens SAEs of every architecture, written to disk by sae-lens itself and scored from their messages."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sae_lens
import torch
from sae_lens.registry import get_sae_class, get_sae_training_class
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import load_file, save_file

from decompositions.dictionary import DictionaryDecoder, support_of
from decompositions.sae import SAE, canonical_site, encode
from mdl.errors import ExplanationError
from mdl.message import decode_message, encode_message
from mdl.protocols import Decomposition, Explanation, Inputs, Sample, Settings
from mdl.state import JoinedState

D_IN, D_SAE, TOKENS = 16, 64, 120
SITE = "blocks.1.hook_resid_pre"
METADATA = {"hook_name": SITE, "model_name": "tiny"}
OTHELLO = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "sae_othello"

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


def randomise(sae: Any, seed: int = 0) -> Any:
    """Weights, biases and thresholds that are all non-zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name == "threshold":
                parameter.copy_(0.2 + 0.3 * torch.rand(parameter.shape, generator=generator))
            elif name.startswith("W"):
                # rows of different norms, so that rescaling by them matters
                scale = 0.25 + 0.5 * torch.rand((len(parameter), 1), generator=generator)
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    if hasattr(sae, "topk_threshold"):
        sae.topk_threshold.fill_(1.0)
    if sae.cfg.architecture() == "matching_pursuit":
        sae.W_dec.data /= sae.W_dec.data.norm(dim=1, keepdim=True)
    return sae


def make(architecture: str = "standard", *, metadata: dict[str, Any] | None = None, **options: Any) -> Any:
    sae_class, config_class = get_sae_class(architecture.split()[0])
    kept = SAEMetadata(**(METADATA if metadata is None else metadata))
    return randomise(sae_class(config_class(d_in=D_IN, d_sae=D_SAE, metadata=kept, **options)))


def outputs_of(width: int = D_IN, tokens: int = TOKENS) -> np.ndarray:
    rng = np.random.default_rng(5)
    return (rng.normal(size=(tokens, width)) * rng.uniform(0.5, 2, (tokens, 1)) + 0.2).astype(np.float32)


def task_of(outputs: np.ndarray, site: str = SITE) -> Any:
    tokens = np.zeros((1, len(outputs)), np.int32)
    sample = Sample(Inputs(tokens, np.ones_like(tokens, bool)), outputs)
    model = SimpleNamespace(name="tiny")
    return SimpleNamespace(fit=sample, width=outputs.shape[1], region=SimpleNamespace(output=site), model=model)


def through_message(explanation: Any, task: Any) -> tuple[np.ndarray, Any]:
    """What the receiver predicts from the bytes and the state symbols, at fine steps."""
    settings = Settings(25.0, 3e-3, np.eye(task.width))
    (section,) = decode_message(encode_message([explanation.section(settings)]).data)
    decoder = DictionaryDecoder.from_section(section)
    state = explanation.encode(decoder, task.fit, settings)
    return decoder.predict(task.fit.inputs, state), state


@torch.no_grad()
def forward(sae: Any, outputs: np.ndarray) -> np.ndarray:
    return sae(torch.from_numpy(outputs)).numpy()


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


@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
@pytest.mark.parametrize(("normalisation", "columns"), [("constant_norm_rescale", 1), ("layer_norm", 2)])
def test_normalisations_of_each_token_are_charged(architecture: str, normalisation: Any, columns: int):
    sae = make(architecture, normalize_activations=normalisation)
    task = task_of(outputs_of())
    predicted, state = through_message(SAE(object=sae).fit(task), task)
    np.testing.assert_allclose(predicted, forward(sae, task.fit.outputs), atol=0.05)
    assert isinstance(state, JoinedState)
    sparse, side = state.streams
    assert side.values.shape == (TOKENS, columns)
    assert state.length().total > sparse.length().total + TOKENS


def test_expected_average_is_folded_and_noted():
    sae = make("standard", normalize_activations="expected_average_only_in")
    outputs = 7.0 * outputs_of()
    task = task_of(outputs)
    explanation = SAE(object=sae).fit(task)
    factor = np.sqrt(D_IN) / np.linalg.norm(outputs, axis=1).mean()
    predicted, _ = through_message(explanation, task)
    np.testing.assert_allclose(predicted, forward(sae, outputs * np.float32(factor)) / factor, atol=0.2)
    assert f"{factor:.6g}" in explanation.notes[0]
    assert sae.cfg.normalize_activations == "expected_average_only_in"  # the caller's object is left alone


def test_hook_z_is_read_with_its_heads_flattened():
    sae = make("standard", reshape_activations="hook_z", metadata={"hook_name": "blocks.0.attn.hook_z"})
    outputs = outputs_of()
    task = task_of(outputs, "blocks.0.attn.hook_z")
    predicted, _ = through_message(SAE(object=sae).fit(task), task)
    heads = sae(torch.from_numpy(outputs.reshape(-1, 4, 4))).detach().numpy()
    np.testing.assert_allclose(predicted, heads.reshape(-1, D_IN), atol=0.03)
    with pytest.raises(ExplanationError, match="heads have to be flattened"):
        SAE(object=sae).fit(task_of(outputs_of(4), "blocks.0.attn.hook_z"))


def test_encoding_does_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch):
    sae, outputs = make("topk", k=6), outputs_of()
    whole = encode(sae, outputs)
    monkeypatch.setattr("decompositions.sae.CHUNK_ELEMENTS", 7 * D_SAE)
    # float32 products of other shapes: equal to a few units in the last place
    np.testing.assert_allclose(encode(sae, outputs).toarray(), whole.toarray(), rtol=2e-6, atol=1e-6)
    np.testing.assert_array_equal(np.diff(whole.indptr) <= 6, True)
    assert encode(sae, outputs[:0]).shape == (0, D_SAE)


@pytest.mark.skipif(not OTHELLO.exists(), reason="shared/data/sae_othello is not here")
def test_a_config_older_than_6_0():
    outputs = outputs_of(128, 60)
    task = task_of(outputs, "blocks.2.hook_resid_post")  # the same stream as its blocks.3.hook_resid_pre
    explanation = SAE(path=str(OTHELLO)).fit(task)
    decoded = explanation.activations(outputs) @ explanation.atoms + explanation.bias
    np.testing.assert_allclose(decoded, forward(sae_lens.SAE.load_from_disk(OTHELLO), outputs), atol=1e-4)
    used = int((explanation.statistics.frequency > 0).sum())
    assert 0 < explanation.section(Settings(1e3, 0.1, np.eye(128))).n_parts <= used
    assert explanation.name == "sae_othello"
    assert "my-own-othello-model" in explanation.notes[0]


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("blocks.2.hook_resid_post", "blocks.3.hook_resid_pre"),
        ("blocks.3.hook_resid_pre", "blocks.3.hook_resid_pre"),
        ("model.layers.11", "blocks.12.hook_resid_pre"),
        ("transformer.h.0", "blocks.1.hook_resid_pre"),
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


def test_one_head_alone_is_refused():
    sae = make("standard", metadata={**METADATA, "hook_head_index": 3})
    with pytest.raises(ExplanationError, match="head 3"):
        SAE(object=sae).fit(task_of(outputs_of()))


def test_nan_weights_name_the_tensor(tmp_path: Path):
    make("standard").save_model(tmp_path)
    weights = load_file(tmp_path / "sae_weights.safetensors")
    weights["W_dec"][3, :2] = float("nan")
    save_file(weights, tmp_path / "sae_weights.safetensors")
    with pytest.raises(ExplanationError, match="2 of 1024 entries of W_dec are NaN"):
        SAE(path=str(tmp_path)).fit(task_of(outputs_of()))


@pytest.mark.parametrize("architecture", ["transcoder", "skip_transcoder", "temporal"])
def test_what_is_no_linear_dictionary_is_refused(architecture: str, tmp_path: Path):
    sae_class, config_class = get_sae_class(architecture)
    width = 64 if architecture == "temporal" else D_IN
    options = {"d_out": D_IN, "apply_b_dec_to_input": False} if "transcoder" in architecture else {"n_heads": 1}
    sae = sae_class(config_class(d_in=width, d_sae=D_SAE, **options))
    sae.save_model(tmp_path)
    with pytest.raises(ExplanationError, match=rf"'{architecture}' is no linear dictionary.*standard, gated"):
        SAE(path=str(tmp_path)).fit(task_of(outputs_of()))


def test_unfolded_whitening_is_refused():
    sae = make("standard", normalize_activations="covariance_whitening")
    with pytest.raises(ExplanationError, match=r"covariance_whitening.*fold it into"):
        SAE(object=sae).fit(task_of(outputs_of()))


def test_what_is_not_on_disk(tmp_path: Path):
    task = task_of(outputs_of())
    with pytest.raises(ExplanationError, match="no such folder"):
        SAE(path=str(tmp_path / "absent")).fit(task)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ExplanationError, match=r"cfg\.json and sae_weights\.safetensors missing.*notes\.txt"):
        SAE(path=str(tmp_path)).fit(task)
    make("standard").save_model(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps({**config, "architecture": "newer"}))
    with pytest.raises(ExplanationError, match="cannot read"):
        SAE(path=str(tmp_path)).fit(task)
    (tmp_path / "cfg.json").write_text(json.dumps({**config, "d_sae": 32}))
    with pytest.raises(ExplanationError, match="cannot read"):
        SAE(path=str(tmp_path)).fit(task)


def test_what_is_not_on_the_hub(monkeypatch: pytest.MonkeyPatch):
    task = task_of(outputs_of())
    with pytest.raises(ExplanationError, match=r"no release 'gpt2-small-res-jbb'.*gpt2-small-res-jb"):
        SAE(release="gpt2-small-res-jbb", id="x").fit(task)
    with pytest.raises(ExplanationError, match=r"has no SAE 'blocks\.8\.hook_resid'.*blocks\.8\.hook_resid_pre"):
        SAE(release="gpt2-small-res-jb", id="blocks.8.hook_resid").fit(task)

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", offline)
    with pytest.raises(ExplanationError, match=r"no route.*download it elsewhere.*cfg\.json"):
        SAE(release="gpt2-small-res-jb", id="blocks.8.hook_resid_pre").fit(task)


@pytest.mark.parametrize("options", [{}, {"release": "a"}, {"id": "b"}, {"path": "p", "release": "a", "id": "b"}])
def test_exactly_one_source(options: dict[str, str]):
    with pytest.raises(ExplanationError, match="by path, or by release and id"):
        SAE(**options).fit(task_of(outputs_of()))


def test_an_object_of_another_kind():
    with pytest.raises(ExplanationError, match="object is a dict"):
        SAE(object={}).fit(task_of(outputs_of()))
