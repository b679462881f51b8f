"""A region as a function of its weights gives what the model computes there."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdl.errors import ModelError
from mdl.models.load import load_model
from mdl.models.networks import TransformerRegion
from mdl.models.operators import Chain, Masked, multiply, products
from mdl.score import embedded_model
from mdl.task import collect, parse_region

REGIONS = [
    "blocks.1.mlp",
    "blocks.2.attn",
    "upstream of blocks.1.hook_resid_mid",
    "upstream of blocks.2.hook_resid_pre",
]


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 2048, (2, 24)).astype(np.int32)


@pytest.fixture(scope="module")
def model():
    return embedded_model()


def own_run(model, region, tokens, change=None):
    place = parse_region(region, model)
    found = collect(model, place, tokens, np.ones(tokens.shape, bool), np.arange(len(tokens)))
    weights = {name: jnp.asarray(w) for name, w in found.network.weights(model).items()}
    values = None if found.inputs is None else jnp.asarray(found.inputs)
    return found, found.network.run({**weights, **(change or {})}, values, jnp.asarray(tokens)), weights


@pytest.mark.parametrize("region", REGIONS)
def test_the_models_own_weights_give_its_own_outputs(model, tokens, region):
    found, out, _ = own_run(model, region, tokens)
    np.testing.assert_allclose(out, found.outputs, atol=2e-4)


def test_the_whole_model_gives_its_logits(model, tokens):
    found, out, weights = own_run(model, "model", tokens)
    np.testing.assert_allclose(out, found.outputs, atol=2e-3)
    assert set(found.network.tables) == {"embed.W_E", "pos_embed.W_pos"}
    assert sum(w.size for w in weights.values()) == model.n_parameters


@pytest.mark.parametrize("region", REGIONS)
def test_a_matrix_may_be_an_operator(model, tokens, region):
    found, out, weights = own_run(model, region, tokens)
    network = found.network
    chained = {name: Chain(weights[name], jnp.eye(shape[1])) for name, shape in network.matrices.items()}
    np.testing.assert_allclose(own_run(model, region, tokens, chained)[1], out, atol=2e-4)
    masked = {
        name: Masked(weights[name].T @ jnp.eye(i), jnp.eye(o), jnp.ones((*tokens.shape, o)))
        for name, (i, o) in network.matrices.items()
    }
    np.testing.assert_allclose(own_run(model, region, tokens, masked)[1], out, atol=2e-4)


def test_sizes_cover_every_weight(model):
    place = parse_region("blocks.0.attn", model)
    network = TransformerRegion.of(model, place.input, place.output)
    assert network.matrices == {f"blocks.0.attn.W_{n}": (192, 192) for n in "KOQV"}
    assert network.vectors["blocks.0.attn.b_Q"] == 192
    assert not network.tables


def test_a_missing_weight_is_named(model, tokens):
    place = parse_region("blocks.0.mlp", model)
    network = TransformerRegion.of(model, place.input, place.output)
    with pytest.raises(ModelError, match=r"no weight 'blocks\.0\.ln2\.b'"):
        network.run({}, jnp.zeros((1, 2, 192)), jnp.zeros((1, 2), jnp.int32))


def test_products_are_what_a_matrix_sees_and_what_the_output_feels():
    rng = np.random.default_rng(1)
    w = {"a": jnp.asarray(rng.normal(size=(3, 4))), "b": jnp.asarray(rng.normal(size=(4, 2)))}
    x, cotangent = jnp.asarray(rng.normal(size=(5, 3))), jnp.asarray(rng.normal(size=(5, 4)))

    def run(weights):  # b is used both ways
        hidden = multiply(jnp.tanh(multiply(x, weights["a"])), weights["b"])
        return multiply(hidden, weights["b"], transposed=True)

    found = products(run, w, ("a", "b"), cotangent)
    gradients = jax.grad(lambda v: jnp.sum(run(v) * cotangent))(w)
    for name in w:
        total = sum(
            (use.gradients.T @ use.inputs if use.transposed else use.inputs.T @ use.gradients) for use in found[name]
        )
        np.testing.assert_allclose(total, gradients[name], rtol=1e-4, atol=1e-5)
    assert [use.transposed for use in found["b"]] == [False, True]


@pytest.mark.parametrize("family", ["neox-sequential", "qwen2", "gemma2"])
@pytest.mark.parametrize("region", ["blocks.1.mlp", "blocks.0.attn", "upstream of blocks.1.hook_resid_pre"])
def test_other_architectures(folders, tokens, family, region):
    model = load_model(folders[family][1])
    some = tokens[:, :8] % model.config.d_vocab
    found, out, _ = own_run(model, region, some)
    np.testing.assert_allclose(out, found.outputs, atol=2e-4)
