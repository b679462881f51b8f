"""What is on disk and on the hub: old configs, half precision, folded weights; and what is not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sae_lens
import torch
from sae_lens.loading import pretrained_sae_loaders
from safetensors.torch import load_file, save_file

from decompositions.sae import SAE
from decompositions.sae_codes import decoder_of, encode
from decompositions.sae_loading import load_folder
from mdl.errors import ExplanationError
from mdl.protocols import Settings
from tests.decompositions.sae_cases import D_IN, D_SAE, SITE, forward, make, outputs_of, task_of

OTHELLO = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "sae_othello"
MLP_RELEASE, MLP_ID = "gpt2-small-mlp-tm", "blocks.0.hook_mlp_out"  # stores the factor of its scale
# What sae-lens 3 wrote for an SAE like `make("standard")`.
OLD = {
    "d_in": D_IN,
    "d_sae": D_SAE,
    "dtype": "torch.float32",
    "device": "cpu",
    "model_name": "tiny",
    "hook_point": SITE,
    "hook_point_layer": 1,
    "hook_point_head_index": None,
    "activation_fn_str": "relu",
    "apply_b_dec_to_input": True,
    "finetuning_scaling_factor": False,
    "sae_lens_training_version": "3.4.0",
    "prepend_bos": True,
    "dataset_path": "none",
    "context_size": 120,
    "normalize_activations": False,
}


def rewrite(folder: Path, config: dict[str, Any], weights: dict[str, torch.Tensor] | None = None) -> Path:
    """Other contents for a saved SAE's files."""
    (folder / "cfg.json").write_text(json.dumps(config))
    if weights is not None:
        save_file(weights, folder / "sae_weights.safetensors")
    return folder


def ours(path: Path, outputs: np.ndarray) -> np.ndarray:
    sae = load_folder(path).eval()
    atoms, bias = decoder_of(sae)
    return encode(sae, outputs) @ atoms + bias


def test_a_config_older_than_6_0(tmp_path: Path):
    sae = make("standard")
    sae.save_model(tmp_path)
    task = task_of(outputs_of())
    explanation = SAE(path=str(rewrite(tmp_path, OLD))).fit(task)
    decoded = explanation.activations(task.fit.outputs) @ explanation.atoms + explanation.bias
    np.testing.assert_allclose(decoded, forward(sae, task.fit.outputs), atol=1e-4)
    assert len(explanation.notes) == 1  # its site and model were read; its start token is missing here
    assert "begin with a start token" in explanation.notes[0]
    with pytest.raises(ExplanationError, match=r"trained at blocks\.1\.hook_resid_pre"):
        SAE(path=str(tmp_path)).fit(task_of(outputs_of(), "blocks.3.hook_resid_pre"))
    rewrite(tmp_path, {**OLD, "hook_point_head_index": 2})
    with pytest.raises(ExplanationError, match="trained on head 2 alone"):
        SAE(path=str(tmp_path)).fit(task)


def test_old_configs_of_top_k_and_of_scaled_activations(tmp_path: Path):
    sae, outputs = make("topk", k=5), outputs_of()
    sae.save_model(tmp_path)
    rewrite(tmp_path, {**OLD, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}})
    np.testing.assert_allclose(ours(tmp_path, outputs), forward(sae, outputs), atol=1e-4)
    rewrite(tmp_path, {**OLD, "normalize_activations": True})
    assert load_folder(tmp_path).cfg.normalize_activations == "expected_average_only_in"


def test_an_old_activation_that_would_be_read_as_a_relu_is_refused(tmp_path: Path):
    make("standard").save_model(tmp_path)
    rewrite(tmp_path, {**OLD, "activation_fn_str": "tanh-relu"})
    with pytest.raises(ExplanationError, match=r"'tanh-relu', which sae-lens .* would take for a ReLU"):
        load_folder(tmp_path)


def test_an_old_fine_tuning_factor_is_folded_into_the_rows(tmp_path: Path):
    sae, outputs = make("standard"), outputs_of()
    sae.save_model(tmp_path)
    factor = torch.linspace(0.5, 2.0, D_SAE)
    weights = {**load_file(tmp_path / "sae_weights.safetensors"), "scaling_factor": factor}
    rewrite(tmp_path, {**OLD, "finetuning_scaling_factor": True}, weights)
    expected = (encode(sae.eval(), outputs).toarray() * factor.numpy()) @ decoder_of(sae)[0] + decoder_of(sae)[1]
    np.testing.assert_allclose(ours(tmp_path, outputs), expected, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["jumprelu", "gated"])
def test_pitfall_dtype_weights_in_half_precision(dtype: torch.dtype, architecture: str, tmp_path: Path):
    sae, outputs = make(architecture).to(dtype), outputs_of()
    sae.save_model(tmp_path)
    stored = {name: tensor.float() for name, tensor in load_file(tmp_path / "sae_weights.safetensors").items()}
    loaded = load_folder(tmp_path)
    assert loaded.cfg.dtype == "float32"
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, stored[name], rtol=0, atol=0)  # exactly what is on disk, not rounded again
    in_full = make(architecture)
    in_full.load_state_dict(stored)
    np.testing.assert_allclose(ours(tmp_path, outputs), forward(in_full, outputs), atol=1e-4)
    np.testing.assert_array_equal(SAE(object=sae)._load().W_dec.detach().numpy(), stored["W_dec"].numpy())


@pytest.mark.parametrize("architecture", ["jumprelu", "topk rescaled", "standard", "gated"])
def test_pitfall_g_thresholds_and_top_k_under_folded_norms(architecture: str, tmp_path: Path):
    options = {"k": 6, "rescale_acts_by_decoder_norm": True} if "topk" in architecture else {}
    sae, outputs = make(architecture, **options), outputs_of()
    expected = forward(sae, outputs)
    sae.fold_W_dec_norm()
    sae.save_model(tmp_path)
    np.testing.assert_allclose(ours(tmp_path, outputs), expected, atol=1e-4)
    norms = np.linalg.norm(decoder_of(load_folder(tmp_path))[0], axis=1)
    np.testing.assert_allclose(norms, 1.0, rtol=1e-5)


@pytest.mark.skipif(not OTHELLO.exists(), reason="shared/data/sae_othello is not here")
def test_a_real_config_older_than_6_0():
    outputs = outputs_of(128, 60)
    task = task_of(outputs, "blocks.2.hook_resid_post")  # the same stream as its blocks.3.hook_resid_pre
    explanation = SAE(path=str(OTHELLO)).fit(task)
    decoded = explanation.activations(outputs) @ explanation.atoms + explanation.bias
    np.testing.assert_allclose(decoded, forward(sae_lens.SAE.load_from_disk(OTHELLO), outputs), atol=1e-4)
    used = int((explanation.statistics.frequency > 0).sum())
    assert 0 < explanation.section(Settings(1e3, 0.1, np.eye(128))).n_parts <= used
    assert explanation.name == "sae_othello"
    assert "my-own-othello-model" in explanation.notes[0]
    assert "contexts of 59 tokens, these have 60" in explanation.notes[1]


def test_what_is_not_on_disk(tmp_path: Path):
    task = task_of(outputs_of())
    with pytest.raises(ExplanationError, match="no such folder"):
        SAE(path=str(tmp_path / "absent")).fit(task)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ExplanationError, match=r"cfg\.json and sae_weights\.safetensors missing.*notes\.txt"):
        SAE(path=str(tmp_path)).fit(task)
    make("standard").save_model(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    rewrite(tmp_path, {**config, "architecture": "newer"})
    with pytest.raises(ExplanationError, match="cannot read"):
        SAE(path=str(tmp_path)).fit(task)
    rewrite(tmp_path, {**config, "d_sae": 32})
    with pytest.raises(ExplanationError, match="cannot read"):
        SAE(path=str(tmp_path)).fit(task)


def from_the_hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """sae-lens's download hands out the files of a folder; others do not exist there."""

    def download(repo_id: str, filename: str, **_: Any) -> str:
        if not (folder / Path(filename).name).is_file():
            raise pretrained_sae_loaders.EntryNotFoundError(f"{repo_id} has no {filename}")
        return str(folder / Path(filename).name)

    monkeypatch.setattr(pretrained_sae_loaders, "hf_hub_download", download)


def test_a_release_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    sae, outputs = make("jumprelu"), outputs_of()
    sae.save_model(tmp_path)
    from_the_hub(monkeypatch, tmp_path)
    decomposition = SAE(release="somebody/an-sae", id="layer_1/width_64")
    explanation = decomposition.fit(task_of(outputs))
    assert explanation.name == "width_64"
    decoded = explanation.activations(outputs) @ explanation.atoms + explanation.bias
    np.testing.assert_allclose(decoded, forward(sae, outputs), atol=1e-4)


def test_pitfall_e_expected_average_with_a_stored_factor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A listed release knows the factor: sae-lens folds it, and nothing is measured."""
    sae, outputs = make("standard"), outputs_of()
    sae.save_model(tmp_path)
    rewrite(tmp_path, {**OLD, "hook_point": MLP_ID, "normalize_activations": "expected_average_only_in"})
    from_the_hub(monkeypatch, tmp_path)
    factor = sae_lens.loading.pretrained_saes_directory.get_norm_scaling_factor(MLP_RELEASE, MLP_ID)
    assert factor == pytest.approx(1.0493, abs=1e-4)
    decomposition = SAE(release=MLP_RELEASE, id=MLP_ID, any_site=True)
    explanation = decomposition.fit(task_of(outputs, MLP_ID))
    decoded = explanation.activations(outputs) @ explanation.atoms + explanation.bias
    np.testing.assert_allclose(decoded, forward(sae, outputs * np.float32(factor)) / factor, atol=1e-4)
    assert not any("measured on fit data" in note for note in explanation.notes)


def test_what_is_not_on_the_hub(monkeypatch: pytest.MonkeyPatch):
    task = task_of(outputs_of())
    with pytest.raises(ExplanationError, match=r"no release 'gpt2-small-res-jbb'.*gpt2-small-res-jb"):
        SAE(release="gpt2-small-res-jbb", id="x").fit(task)
    with pytest.raises(ExplanationError, match=r"has no SAE 'blocks\.8\.hook_resid'.*blocks\.8\.hook_resid_pre"):
        SAE(release="gpt2-small-res-jb", id="blocks.8.hook_resid").fit(task)


def test_when_the_hub_is_out_of_reach_the_error_says_what_to_put_where(monkeypatch: pytest.MonkeyPatch):
    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(pretrained_sae_loaders, "hf_hub_download", offline)
    expected = (
        r"no route.*on a machine that has one, SAE\.from_pretrained\('gpt2-small-res-jb', 'blocks\.8\.hook_resid_pre'\)"
        r".*save_model.*copy FOLDER, with cfg\.json and sae_weights\.safetensors,.*sae:path=FOLDER"
    )
    with pytest.raises(ExplanationError, match=expected):
        SAE(release="gpt2-small-res-jb", id="blocks.8.hook_resid_pre").fit(task_of(outputs_of()))
