"""Reading, writing, suffixes, FLOPs, fingerprints, and what is refused."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdl.errors import ModelError
from mdl.models import Model, TransformerConfig, load_model, run
from mdl.models.model import fingerprint_of
from mdl.models.transformer import unembed


@pytest.fixture(scope="module")
def models(folders):
    return {name: load_model(folders[name][1]) for name in ("gpt2", "neox", "gemma2")}


@pytest.fixture(scope="module")
def values(models, tokens):
    return {name: model.run(tokens, model.sites()) for name, model in models.items()}


@pytest.mark.parametrize("name", ["gpt2", "neox", "gemma2"])
def test_replacing_any_site_by_its_own_value_from_its_boundary_changes_nothing(name, models, values, tokens):
    model, found = models[name], {**values[name], "tokens": jnp.asarray(tokens)}
    for site in model.sites():
        layer, _, boundary = model.start_of(site)
        assert -1 <= layer <= model.config.n_layers
        start = None if boundary == site else found[boundary]
        logits = model.run_suffix(model.params, site, found[site], start, ["logits"])["logits"]
        np.testing.assert_allclose(logits, found["logits"], atol=1e-5, err_msg=site)


@pytest.mark.parametrize("name", ["gpt2", "neox", "gemma2"])
def test_a_changed_site_gives_the_same_from_its_boundary_as_from_the_tokens(name, models, values, tokens):
    model, found = models[name], {**values[name], "tokens": jnp.asarray(tokens)}
    for site in model.sites():
        if site.endswith("hook_attn_scores"):
            continue  # rolled, a row could have nothing left to look at
        changed = jnp.roll(found[site], 1, axis=1)
        start = None if model.start_of(site)[2] == site else found[model.start_of(site)[2]]
        whole = model.run(tokens, ["logits", site], {site: changed})
        suffix = model.run_suffix(model.params, site, changed, start, ["logits", site])
        np.testing.assert_allclose(suffix["logits"], whole["logits"], atol=1e-5, err_msg=site)
        np.testing.assert_array_equal(suffix[site], whole[site])
        assert np.abs(whole["logits"] - found["logits"]).max() > 1e-4, site


@pytest.mark.parametrize(
    ("name", "site", "start"),
    [
        ("gpt2", "hook_embed", (-1, False, "tokens")),
        ("gpt2", "blocks.1.hook_resid_pre", (1, False, "blocks.1.hook_resid_pre")),
        ("gpt2", "blocks.1.attn.hook_z", (1, False, "blocks.1.hook_resid_pre")),
        ("gpt2", "blocks.1.ln1.hook_normalized", (1, False, "blocks.1.hook_resid_pre")),
        ("gpt2", "blocks.1.hook_attn_out", (1, False, "blocks.1.hook_resid_pre")),
        ("gpt2", "blocks.1.hook_resid_mid", (1, True, "blocks.1.hook_resid_mid")),
        ("gpt2", "blocks.1.hook_mlp_out", (1, True, "blocks.1.hook_resid_mid")),
        ("gpt2", "blocks.0.mlp.hook_post", (0, True, "blocks.0.hook_resid_mid")),
        ("gpt2", "blocks.0.hook_resid_post", (1, False, "blocks.0.hook_resid_post")),
        ("gpt2", "blocks.1.hook_resid_post", (2, False, "blocks.1.hook_resid_post")),
        ("gpt2", "ln_final.hook_normalized", (2, False, "blocks.1.hook_resid_post")),
        ("neox", "blocks.1.hook_mlp_out", (1, False, "blocks.1.hook_resid_pre")),
        ("gemma2", "blocks.1.ln1_post.hook_scale", (1, False, "blocks.1.hook_resid_pre")),
        ("gemma2", "blocks.1.ln2_post.hook_normalized", (1, True, "blocks.1.hook_resid_mid")),
    ],
)
def test_where_a_suffix_may_start(name, site, start, models):
    assert models[name].start_of(site) == start


def test_a_suffix_needs_no_more_than_its_own_layers(models, values):
    """A suffix must not touch the weights before it."""
    model, found = models["gpt2"], values["gpt2"]
    blocks = [None, model.params["blocks"][1]]
    suffix_only = {**model.params, "pos_embed": None, "blocks": blocks}
    boundary = found["blocks.1.hook_resid_mid"]
    got = model.run_suffix(suffix_only, "blocks.1.hook_mlp_out", found["blocks.1.hook_mlp_out"], boundary, ["logits"])
    np.testing.assert_allclose(got["logits"], found["logits"], atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "neox", "gemma2"])
def test_the_head_alone_makes_logits_of_what_it_reads(name, models, values):
    """`hook_normalized` lacks the final norm's scale and bias; `unembed.hook_in` has them."""
    model, found = models[name], values[name]
    np.testing.assert_allclose(
        unembed(model.config, model.params, found["unembed.hook_in"]), found["logits"], atol=1e-5
    )
    wrong = unembed(model.config, model.params, found["ln_final.hook_normalized"])
    assert np.abs(wrong - found["logits"]).max() > 0.01


def test_suffixes_compile_and_differentiate(models, values):
    model, found = models["gpt2"], values["gpt2"]
    site = "blocks.1.hook_mlp_out"

    @jax.jit
    def objective(params, value, boundary):
        return model.run_suffix(params, site, value, boundary, ["logits"])["logits"].std()

    arguments = (model.params, found[site], found["blocks.1.hook_resid_mid"])
    by_params, by_value = jax.grad(objective, (0, 1))(*arguments)
    direction = jax.random.normal(jax.random.key(0), found[site].shape)
    step = 1e-2 * direction
    ahead, behind = (objective(arguments[0], found[site] + s * step, arguments[2]) for s in (1, -1))
    assert float((by_value * step).sum()) == pytest.approx(float(ahead - behind) / 2, rel=2e-2)
    assert np.abs(by_params["ln_final"]["w"]).max() > 0
    assert np.abs(by_params["blocks"][0]["mlp"]["W_in"]).max() == 0


def test_heads_may_come_flattened_and_values_may_broadcast(models, values, tokens):
    model, found = models["gpt2"], values["gpt2"]
    site = "blocks.1.attn.hook_z"
    flat = np.asarray(found[site]).reshape(*tokens.shape, -1)
    assert flat.shape[-1] == model.site_width(site)
    got = model.run_suffix(model.params, site, flat, found["blocks.1.hook_resid_pre"], ["logits"])
    np.testing.assert_allclose(got["logits"], found["logits"], atol=1e-5)
    mean = found["blocks.0.hook_mlp_out"].mean((0, 1))
    read = model.run(tokens, ["blocks.0.hook_mlp_out"], {"blocks.0.hook_mlp_out": mean})["blocks.0.hook_mlp_out"]
    np.testing.assert_array_equal(read, np.broadcast_to(mean, read.shape))


def test_a_function_may_be_written(models, values, tokens):
    site = "blocks.1.hook_resid_pre"
    got = models["gpt2"].run(tokens, [site], {site: lambda value: value + 1.0})[site]
    np.testing.assert_allclose(got, values["gpt2"][site] + 1.0, atol=1e-6)


def test_reading_an_early_site_runs_no_later_layer(models, tokens):
    model = models["gpt2"]
    first_only = {**model.params, "blocks": [model.params["blocks"][0]]}
    found = run(model.config, first_only, jnp.asarray(tokens), ["blocks.0.hook_resid_post"])
    assert list(found) == ["blocks.0.hook_resid_post"]


@pytest.mark.parametrize("name", ["gpt2", "neox", "gemma2"])
def test_flops_are_those_that_xla_counts(name, models, tokens):
    """XLA also counts norms, softmax and activations, so it may only be a little above."""
    model = models[name]
    compiled = jax.jit(lambda p, t: run(model.config, p, t, ["logits"])["logits"]).lower(model.params, tokens).compile()
    per_token = compiled.cost_analysis()["flops"] / tokens.size
    assert 0.6 * per_token < model.flops_per_token(tokens.shape[1]) < per_token


def test_flops_by_hand(models):
    config = TransformerConfig(n_layers=2, d_model=8, n_heads=2, d_head=4, d_vocab=10, n_ctx=16, d_mlp=32)
    model = Model(config, {}, "toy", "")
    attention = 2 * (4 * 8 * 8) + 2 * 2 * 8 * 16
    layer = attention + 2 * 2 * 8 * 32
    assert model.flops_per_token(16) == 2 * layer + 2 * 8 * 10
    assert model.flops_upstream("blocks.1.hook_resid_pre", 16) == layer
    assert model.flops_upstream("blocks.1.hook_resid_mid", 16) == layer + attention
    assert model.flops_upstream("blocks.0.attn.hook_v", 16) == 2 * 8 * 8
    assert model.flops_upstream("hook_embed", 16) == 0
    for any_model in models.values():
        upstream = [any_model.flops_upstream(site, 16) for site in any_model.sites()]
        assert max(upstream) == upstream[-1] == any_model.flops_per_token(16)


def test_parameters_are_counted_as_torch_counts_them(folders):
    for theirs, folder in folders.values():
        assert load_model(folder).n_parameters == sum(p.numel() for p in theirs.parameters())


def test_the_fingerprint_knows_weights_and_configuration(models):
    model = models["gpt2"]
    assert fingerprint_of(model.config, model.params) == model.fingerprint
    other = jax.tree.map(lambda w: w, model.params)
    other["ln_final"]["b"] = other["ln_final"]["b"].at[0].add(1e-6)
    assert fingerprint_of(model.config, other) != model.fingerprint
    assert fingerprint_of(TransformerConfig(1, 8, 2, 4, 5, 6), {}) != fingerprint_of(
        TransformerConfig(1, 8, 2, 4, 5, 6, norm_eps=1e-6), {}
    )


def test_an_unknown_site_is_refused_with_the_nearest_names(models, tokens):
    model = models["gpt2"]
    with pytest.raises(ModelError, match=r"no site 'blocks\.1\.hook_resid_pr'.*'blocks\.1\.hook_resid_pre'"):
        model.check_site("blocks.1.hook_resid_pr")
    with pytest.raises(ModelError, match="Layers run from 0 to 1"):
        model.start_of("blocks.7.hook_resid_pre")
    for arguments in ((["blocks.0.hook_mlp"], None), (["logits"], {"blocks.0.hook_mlp": 0.0})):
        with pytest.raises(ModelError, match=r"blocks\.0\.hook_mlp_out"):
            model.run(tokens, *arguments)
    with pytest.raises(ModelError, match="use site_shape"):
        model.site_width("blocks.0.attn.hook_pattern")


def test_a_parallel_model_has_no_middle(models, values):
    model = models["neox"]
    assert "blocks.0.hook_resid_mid" not in model.sites()
    with pytest.raises(ModelError, match="between attention and MLP"):
        model.run(values["neox"]["blocks.0.hook_resid_pre"], ["logits"], layer=0, from_mid=True)


def test_what_lies_before_the_start_is_refused(models, values):
    model = models["gpt2"]
    start = values["gpt2"]["blocks.1.hook_resid_pre"]
    for reads, writes in ((["blocks.0.hook_resid_pre"], None), (["logits"], {"blocks.0.hook_resid_pre": start})):
        with pytest.raises(ModelError, match="upstream of where this run starts"):
            model.run(start, reads, writes, layer=1)
    with pytest.raises(ModelError, match=r"Read 'blocks\.1\.hook_resid_mid' first"):
        model.run_suffix(model.params, "blocks.1.hook_mlp_out", start, None, ["logits"])
    with pytest.raises(ModelError, match="cannot start at layer 3"):
        model.run(start, ["logits"], layer=3)


def test_values_and_tokens_that_do_not_fit_are_refused(models, tokens):
    model = models["gpt2"]
    with pytest.raises(ModelError, match=r"\(2, 3\); the site has \(2, 20, 24\)"):
        model.run(tokens, ["logits"], {"blocks.0.hook_mlp_out": np.zeros((2, 3))})
    with pytest.raises(ModelError, match=r"from 0 to 61, but .* vocabulary of 61"):
        model.run(np.array([[0, 61]]), ["logits"])
    with pytest.raises(ModelError, match="33 tokens a sequence, but the model has 32"):
        model.run(np.zeros((1, 33), np.int32), ["logits"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"norm": "batch"}, "norm 'batch'"),
        ({"positions": "alibi"}, "'alibi'"),
        ({"n_key_value_heads": 3}, "3 key-value heads do not divide 4"),
        ({"windows": (None,)}, "1 attention windows for 2"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(change, said):
    with pytest.raises(ModelError, match=said):
        TransformerConfig(
            **({"n_layers": 2, "d_model": 8, "n_heads": 4, "d_head": 2, "d_vocab": 5, "n_ctx": 6} | change)
        )


def test_the_configuration_goes_through_json(models):
    from dataclasses import asdict

    stored = json.loads(json.dumps(asdict(models["gemma2"].config)))
    back = {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
    assert TransformerConfig(**back) == models["gemma2"].config
