"""Parity with transformers on checkpoints of every family, written to and read from disk."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from mdl.models import load_model
from mdl.models.settings import rotary_frequencies

FAMILIES = (
    *("gpt2", "gpt2-variants", "neox", "neox-sequential", "llama", "llama-biases", "mistral", "qwen2", "gemma2"),
)
DATA = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"


def log_probabilities(model, tokens):
    return np.asarray(jax.nn.log_softmax(model.run(tokens, ["logits"])["logits"], -1))


def reference(model, tokens):
    with torch.no_grad():
        return model(torch.as_tensor(tokens).long()).logits.log_softmax(-1).numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_those_of_transformers(family, folders, tokens):
    theirs, folder = folders[family]
    expected = reference(theirs, tokens)
    assert expected.std() > 0.1  # a flat distribution would agree with anything
    assert np.abs(log_probabilities(load_model(folder), tokens) - expected).max() < 1e-4


@pytest.mark.parametrize("family", ["gpt2", "neox-sequential", "gemma2"])
def test_a_transformers_object_is_the_same_model_as_its_checkpoint(family, folders):
    theirs, folder = folders[family]
    assert load_model(theirs).fingerprint == load_model(folder).fingerprint


def test_the_order_of_sites_and_their_shapes_are_what_a_run_gives(folders, tokens):
    for _, folder in folders.values():
        model = load_model(folder)
        found = model.run(tokens, model.sites())
        assert tuple(found) == model.sites()
        assert all(value.shape == model.site_shape(name, *tokens.shape) for name, value in found.items())


def old_style(config: dict) -> dict:
    """A config.json as transformers 4 wrote it."""
    rope = config.pop("rope_parameters", None) or {}
    theta = rope.pop("rope_theta", 10000.0)
    partial = rope.pop("partial_rotary_factor", None)
    if config["model_type"] == "gpt_neox":
        config |= {"rotary_emb_base": theta, "rotary_pct": partial}
    else:
        config |= {"rope_theta": theta}
    scaled = rope.get("rope_type", "default") != "default"
    config["rope_scaling"] = {"type": rope.pop("rope_type"), **rope} if scaled else None
    config.pop("layer_types", None)
    return config


@pytest.mark.parametrize("family", ["neox", "llama", "llama-biases", "qwen2", "gemma2"])
def test_configurations_of_older_versions_mean_the_same(family, folders, tmp_path):
    _, folder = folders[family]
    new = load_model(folder)
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(old_style(config)))
    old = load_model(tmp_path)
    assert old.config == new.config
    assert old.fingerprint == new.fingerprint


def test_sharded_and_bin_checkpoints_hold_the_same_weights(folders, tmp_path):
    theirs, folder = folders["llama"]
    expected = load_model(folder).fingerprint
    sharded, binary, binary_sharded = (tmp_path / name for name in ("sharded", "bin", "bin-sharded"))
    theirs.save_pretrained(sharded, max_shard_size="15KB")
    assert (sharded / "model.safetensors.index.json").exists()
    assert load_model(sharded).fingerprint == expected
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    for target in (binary, binary_sharded):
        target.mkdir()
        (target / "config.json").symlink_to(folder / "config.json")
    torch.save(state, binary / "pytorch_model.bin")
    assert load_model(binary).fingerprint == expected
    halves = [dict(list(state.items())[i::2]) for i in range(2)]
    for i, half in enumerate(halves):
        torch.save(half, binary_sharded / f"part{i}.bin")
    index = {"weight_map": {name: f"part{i}.bin" for i, half in enumerate(halves) for name in half}}
    (binary_sharded / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert load_model(binary_sharded).fingerprint == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_read_as_float32(dtype, folders, tokens, tmp_path):
    theirs, _ = folders["neox"]
    rounded = type(theirs)(theirs.config).eval()
    rounded.load_state_dict(theirs.state_dict())
    rounded.to(dtype).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert model.params["embed"]["W_E"].dtype == np.float32
    assert np.abs(log_probabilities(model, tokens) - reference(rounded.float(), tokens)).max() < 1e-4


def test_names_without_the_prefix_and_old_buffers_are_read(folders, tmp_path):
    """The hub's own gpt2 has `wte.weight` for `transformer.wte.weight`, and stores causal masks."""
    theirs, folder = folders["gpt2"]
    state = {name.removeprefix("transformer."): tensor for name, tensor in theirs.state_dict().items()}
    state["h.0.attn.bias"] = torch.ones(1, 1, 32, 32)
    state["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").symlink_to(folder / "config.json")
    assert load_model(tmp_path).fingerprint == load_model(folder).fingerprint


def test_llama3_frequencies_keep_short_and_divide_long_wavelengths():
    """Meta's rule, wavelength by wavelength, in plain Python."""
    entries = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    entries |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    got = rotary_frequencies({"rope_parameters": entries}, 128)
    for i, frequency in enumerate(got):
        plain = 500000.0 ** (-2 * i / 128)
        wavelength = 2 * np.pi / plain
        if wavelength < 8192 / 4:
            expected = plain
        elif wavelength > 8192:
            expected = plain / 8
        else:
            smooth = (8192 / wavelength - 1) / 3
            expected = (1 - smooth) * plain / 8 + smooth * plain
        assert frequency == pytest.approx(expected, rel=1e-6)


# Nats a token over the first 64 sequences, by transformers: the data folder's README.
@pytest.mark.parametrize(("name", "nats"), [("stories260k", 1.3210), ("babyllama105", 0.7674)])
def test_real_checkpoints_have_their_published_loss(name, nats):
    if not (DATA / name).is_dir():
        pytest.skip("the shared data folder is not here")
    model = load_model(DATA / name)
    tokens = np.load(DATA / name / "tokens_tinystories.npy")[:64].astype(np.int32)

    @jax.jit
    def loss(batch):
        log_p = jax.nn.log_softmax(model.run(batch[:, :-1], ["logits"])["logits"], -1)
        return -jax.numpy.take_along_axis(log_p, batch[:, 1:, None], -1).mean()

    assert float(np.mean([loss(tokens[i : i + 16]) for i in range(0, 64, 16)])) == pytest.approx(nats, abs=6e-5)
