"""Every site, written and read, against TransformerLens itself; and its weight processing."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from mdl.errors import ModelError
from mdl.models import load_model

lens = pytest.importorskip("transformer_lens", reason="TransformerLens is not installed")

BASE = {
    "n_layers": 2,
    "d_model": 16,
    "n_ctx": 24,
    "d_head": 4,
    "n_heads": 4,
    "d_vocab": 61,
    "d_mlp": 24,
    "act_fn": "gelu_new",
    "seed": 0,
}
KINDS = {
    "gpt2": {},
    "attention-only": {"attn_only": True, "normalization_type": None},
    "no-norm": {"normalization_type": None, "act_fn": "relu", "d_vocab_out": 7},
    "attention-only-norm": {"attn_only": True},
    "neox": {"positional_embedding_type": "rotary", "rotary_dim": 2, "parallel_attn_mlp": True, "act_fn": "gelu"},
    "gptj-rotary": {"positional_embedding_type": "rotary", "rotary_adjacent_pairs": True},
    "llama": {
        "positional_embedding_type": "rotary",
        "normalization_type": "RMS",
        "gated_mlp": True,
        "n_key_value_heads": 2,
        "act_fn": "silu",
    },
    "gemma2": {
        "positional_embedding_type": "rotary",
        "normalization_type": "RMS",
        "gated_mlp": True,
        "n_key_value_heads": 2,
    }
    | {"use_normalization_before_and_after": True, "attn_scores_soft_cap": 2.0, "output_logits_soft_cap": 3.0}
    | {"use_local_attn": True, "window_size": 4, "attn_types": ["local", "global"], "attn_scale": 3.0},
    "bidirectional": {"attention_dir": "bidirectional", "scale_attn_by_inverse_layer_idx": True},
    "final-rms": {"final_rms": True},
}


def hooked(kind: str):
    """A tiny HookedTransformer whose biases and norms are not trivial."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = lens.HookedTransformer(lens.HookedTransformerConfig(**(BASE | KINDS[kind]), device="cpu"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def cached(model, tokens):
    with torch.no_grad():
        logits, cache = model.run_with_cache(torch.as_tensor(tokens).long())
    return {name: value.numpy() for name, value in cache.items()} | {"logits": logits.numpy()}


def assert_same_sites(ours, theirs, tokens):
    expected = cached(theirs, tokens)
    expected = {name: value for name, value in expected.items() if name != "unembed.hook_out"}
    assert sorted(ours.sites()) == sorted(expected)
    found = ours.run(tokens, ours.sites())
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], atol=1e-5, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_every_site_is_transformer_lenss(kind, tokens):
    theirs = hooked(kind)
    assert_same_sites(load_model(theirs), theirs, tokens)


@pytest.mark.parametrize("kind", ["gpt2", "neox", "gemma2"])
def test_writing_zeros_at_any_site_does_what_run_with_hooks_does(kind, tokens):
    theirs = hooked(kind)
    ours = load_model(theirs)
    for site in ours.sites()[:-1]:
        if site.startswith("blocks.0.") or site.endswith(("hook_scale", "hook_attn_scores")):
            continue  # layer 0 is like layer 1; zero is no scale, and no mask
        with torch.no_grad():
            hook = [(site, lambda value, hook: torch.zeros_like(value))]
            expected = theirs.run_with_hooks(torch.as_tensor(tokens).long(), fwd_hooks=hook).numpy()
        shape = ours.site_shape(site, *tokens.shape)
        logits = ours.run(tokens, ["logits"], {site: np.zeros(shape, np.float32)})["logits"]
        np.testing.assert_allclose(logits, expected, atol=5e-5, rtol=1e-5, err_msg=site)


def processed(theirs, **steps):
    """The same weights, processed by TransformerLens."""
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    every = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False, "fold_value_biases": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        copy = lens.HookedTransformer(theirs.cfg)
        copy.load_and_process_state_dict(state, **(every | steps))
    return copy.eval()


@pytest.mark.parametrize("kind", ["gpt2", "neox", "llama"])
@pytest.mark.parametrize(
    "steps",
    [
        {"center_writing_weights": True},
        {"fold_layer_norm": True},
        {"center_unembed": True},
        {"fold_layer_norm": True, "center_writing_weights": True, "center_unembed": True, "fold_value_biases": True},
    ],
    ids=lambda steps: "+".join(steps),
)
def test_processing_gives_transformer_lenss_activations(kind, steps, tokens):
    theirs = hooked(kind)
    raw = load_model(theirs)
    ours = load_model(theirs, **steps)
    names = {"fold_layer_norm": "fold_ln"}
    assert_same_sites(ours, processed(theirs, **{names.get(n, n): on for n, on in steps.items()}), tokens)
    assert ours.fingerprint != raw.fingerprint or (kind == "llama" and steps == {"center_writing_weights": True})


def test_processing_a_tied_checkpoint_leaves_its_predictions_alone(folders, tokens):
    _, folder = folders["gpt2"]
    plain = load_model(folder).run(tokens, ["logits"])["logits"]
    centred = load_model(folder, center_writing_weights=True)
    found = centred.run(tokens, ["logits", "blocks.1.hook_resid_pre"])
    np.testing.assert_allclose(found["logits"], plain, atol=2e-5)
    assert np.abs(found["blocks.1.hook_resid_pre"].mean(-1)).max() < 1e-5
    assert not centred.config.tied


def test_a_processed_object_is_read_as_it_stands(tokens):
    theirs = processed(hooked("gpt2"), fold_ln=True, center_writing_weights=True)
    assert_same_sites(load_model(theirs), theirs, tokens)


def test_centring_the_unembedding_under_a_soft_cap_is_refused(folders):
    with pytest.raises(ModelError, match=r"soft-capped at 3\.0"):
        load_model(folders["gemma2"][1], center_unembed=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"positional_embedding_type": "shortformer"}, "shortformer"),
        ({"act_fn": "solu_ln"}, "solu_ln"),
        ({"use_qk_norm": True}, "use_qk_norm"),
    ],
)
def test_what_our_transformer_does_not_compute_is_refused_by_name(arguments, said):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = lens.HookedTransformer(lens.HookedTransformerConfig(**(BASE | arguments), device="cpu"))
    with pytest.raises(ModelError, match=said):
        load_model(theirs)


def test_a_bridge_is_refused_with_what_to_pass_instead():
    bridge = type("TransformerBridge", (), {})()
    with pytest.raises(ModelError, match="Pass its original_model"):
        load_model(bridge)
