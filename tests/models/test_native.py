"""Our own format of a transformer: written, read again to the same model, and what is refused."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments.small_circuits.models import initial_weights, models
from mdl.errors import ModelError
from mdl.models import Model, TransformerConfig, load_model
from mdl.models.model import fingerprint_of
from mdl.models.native import convert, save_model, shapes

NO_NORM = TransformerConfig(
    n_layers=2, d_model=8, n_heads=3, d_head=4, d_vocab=11, n_ctx=6, norm="none", activation="relu"
)
RICH = TransformerConfig(
    n_layers=2,
    d_model=8,
    n_heads=4,
    d_head=2,
    d_vocab=11,
    n_ctx=6,
    d_mlp=12,
    n_key_value_heads=2,
    norm="rms",
    final_norm="layer",
    positions="rotary",
    rotary_frequencies=(0.3,),
    gated_mlp=True,
    activation="silu",
    attention_softcap=20.0,
    logit_softcap=30.0,
    windows=(None, 3),
    causal=False,
    d_vocab_out=5,
)


def _filled(config: TransformerConfig, seed: int = 0) -> Model:
    """Every weight that the configuration can have, random."""
    rng = np.random.default_rng(seed)
    needed, allowed = shapes(config)
    tensors = {n: rng.normal(size=s).astype(np.float32) for n, s in {**needed, **allowed}.items()}
    settings = json.loads(json.dumps({"model_type": "mdl-transformer", **asdict(config)}))
    read, params = convert(settings, tensors)
    params = jax.tree.map(jnp.asarray, params)
    assert read == config
    return Model(read, params, "made", fingerprint_of(read, params))


TIED = replace(NO_NORM, tied=True, positions="none", d_mlp=16, post_norms=True, norm="layer", parallel=False)


@pytest.mark.parametrize("config", [NO_NORM, RICH, TIED], ids=["attention-only", "rich", "tied"])
def test_a_model_is_read_as_it_was_saved(config, tmp_path):
    model = _filled(config)
    save_model(model, tmp_path / "kept")
    again = load_model(tmp_path / "kept")
    assert again.config == config
    assert again.fingerprint == model.fingerprint
    assert again.name == "kept"
    tokens = np.arange(12).reshape(2, 6) % config.d_vocab
    logits = [np.asarray(m.run(tokens, ["logits"])["logits"]) for m in (model, again)]
    assert logits[0].shape == (2, 6, config.n_logits)
    assert np.isfinite(logits[0]).all()
    np.testing.assert_array_equal(*logits)
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == ["config.json", "model.safetensors"]


def test_optional_weights_are_not_asked_for(tmp_path):
    small = models()["modular-addition"]
    params = initial_weights(small.config, 0)
    model = Model(small.config, params, "small", fingerprint_of(small.config, params))
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert again.fingerprint == model.fingerprint
    assert again.site_width("logits") == 113
    assert "b_Q" not in again.params["blocks"][0]["attn"]


@pytest.fixture
def damaged(tmp_path):
    """A saved model, and functions that change its configuration and tensors."""
    save_model(_filled(NO_NORM), tmp_path)

    def configure(**entries):
        settings = json.loads((tmp_path / "config.json").read_text()) | entries
        kept = {name: value for name, value in settings.items() if value != "leave out"}
        (tmp_path / "config.json").write_text(json.dumps(kept))

    def change(function):
        tensors = load_file(tmp_path / "model.safetensors")
        function(tensors)
        save_file(tensors, tmp_path / "model.safetensors")

    return tmp_path, configure, change


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"n_layer": 2}, "'n_layer', which is no field of an mdl-transformer model.*Did you mean 'n_layers'"),
        ({"n_heads": "leave out"}, "lacks n_heads"),
        ({"n_heads": "3"}, "n_heads is '3', where a field of type int"),
        ({"causal": 1}, "causal is 1, where a field of type bool"),
        ({"d_model": True}, "d_model is True, where a field of type int"),
        ({"norm_eps": float("nan")}, "norm_eps is nan"),
        ({"windows": 3}, "windows is 3"),
        ({"windows": [1, "x"]}, "windows is 'x'"),
        ({"n_ctx": 0}, "n_ctx is 0; sizes are at least 1"),
        ({"d_vocab_out": 0}, "d_vocab_out is 0"),
        ({"norm": "batch"}, "norm 'batch'"),
        ({"activation": "mish"}, "'mish'"),
        ({"d_head": 5}, r"'blocks\.0\.attn\.W_Q' has shape \(3, 8, 4\), the configuration asks for \(3, 8, 5\)"),
        ({"n_layers": 1}, r"unexpected 'blocks\.1\.attn\.W_K'"),
        ({"d_mlp": 4}, r"missing 'blocks\.0\.mlp\.W_in'"),
        ({"norm": "layer", "tied": True}, r"unexpected 'unembed\.W_U'"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(damaged, entries, said):
    folder, configure, _ = damaged
    configure(**entries)
    with pytest.raises(ModelError, match=said):
        load_model(folder)


def test_broken_tensors_are_refused(damaged):
    folder, _, change = damaged
    change(lambda tensors: tensors["embed.W_E"].__setitem__((0, 0), np.nan))
    with pytest.raises(ModelError, match="1 NaN"):
        load_model(folder)
    change(lambda tensors: tensors.pop("embed.W_E"))
    with pytest.raises(ModelError, match=r"missing 'embed\.W_E'"):
        load_model(folder)


def test_what_could_not_be_read_again_is_not_written(tmp_path):
    model = _filled(NO_NORM)
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), model.params)
    with pytest.raises(ModelError, match="is bfloat16; weights are saved as float32"):
        save_model(replace(model, params=half), tmp_path / "half")
    lacking = {name: part for name, part in model.params.items() if name != "unembed"}
    with pytest.raises(ModelError, match=r"missing 'unembed\.W_U'"):
        save_model(replace(model, params=lacking), tmp_path / "lacking")
    infinite = jax.tree.map(lambda w: w.at[(0,) * w.ndim].set(jnp.inf), model.params)
    with pytest.raises(ModelError, match="infinite"):
        save_model(replace(model, params=infinite), tmp_path / "infinite")
    assert not list(tmp_path.iterdir())
