"""The masked forward: equal to the plain one under a mask of ones, in every architecture; its shortcuts; its errors."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdl.errors import ModelError
from mdl.models.circuits.graph import Graph
from mdl.models.circuits.masked import MaskedModel, masked_model, masked_run, masked_runs, write
from mdl.models.circuits.outputs import Outputs, source_outputs
from mdl.models.operators import Chain
from mdl.models.transformer import run
from mdl.score import embedded_model
from tests.models.circuits.random_models import KINDS, mask_of, random_model, tokens_of


def ready(kind: str, neurons: bool = False, scored: np.ndarray | None = None) -> tuple[MaskedModel, np.ndarray]:
    """A random model whose ablated sources are those of other tokens."""
    config, params = random_model(kind)
    graph, tokens = Graph.of(config, neurons), tokens_of(config)
    ablated = source_outputs(config, params, tokens_of(config, seed=2), graph)
    return masked_model(config, params, tokens, ablated, graph, scored), tokens


def plain(model: MaskedModel, tokens: np.ndarray) -> jax.Array:
    return run(model.config, model.params, tokens, ["logits"])["logits"]


@pytest.mark.parametrize(
    ("kind", "neurons"),
    [(kind, False) for kind in KINDS] + [(kind, True) for kind in ("gpt2", "neox", "gemma2", "post-norms-with-biases")],
)
def test_all_edges_are_the_plain_forward_and_none_that_of_what_stands_in(kind: str, neurons: bool) -> None:
    model, tokens = ready(kind, neurons)
    expected, other = plain(model, tokens), plain(model, tokens_of(model.config, seed=2))
    assert np.asarray(expected).std() > 0.1
    assert np.abs(masked_run(model, model.graph.possible) - expected).max() < 1e-5
    assert np.abs(masked_run(model, np.zeros_like(model.graph.possible)) - other).max() < 1e-5


@pytest.mark.parametrize("kind", ["gpt2", "neox", "gemma2", "post-norms-with-biases", "attention-only"])
def test_outputs_of_sources_add_up_to_the_stream(kind: str) -> None:
    config, params = random_model(kind)
    tokens = tokens_of(config)
    nothing = jnp.zeros((len(Graph.of(config).sources), config.d_model))
    written = write(masked_model(config, params, tokens, nothing), Graph.of(config).possible)
    values = source_outputs(config, params, tokens)
    assert isinstance(values, jax.Array)
    last = f"blocks.{config.n_layers - 1}.hook_resid_post"
    stream = run(config, params, tokens, [last])[last]
    assert np.abs(values.sum(1) + written.constants[-1] - stream).max() < 1e-5


@pytest.mark.parametrize(("kind", "neurons"), [("gpt2", False), ("llama", False), ("gemma2", True)])
def test_one_mask_at_every_position_is_that_mask(kind: str, neurons: bool) -> None:
    model, tokens = ready(kind, neurons)
    mask = mask_of(model.graph)
    repeated = np.broadcast_to(mask, (tokens.shape[1], *mask.shape))
    assert np.abs(masked_run(model, repeated) - masked_run(model, mask)).max() < 1e-5


def test_a_position_of_its_own_mask_changes_nothing_before_it() -> None:
    model, tokens = ready("gpt2")
    ones = np.broadcast_to(model.graph.possible, (tokens.shape[1], *model.graph.possible.shape)).copy()
    ones[4] = False
    change = np.abs(masked_run(model, ones) - plain(model, tokens)).max((0, 2))
    assert change[:4].max() < 1e-5
    assert change[4:].min() > 1e-3


@pytest.mark.parametrize("kind", ["gpt2", "neox", "post-norms-with-biases", "attention-only"])
def test_chunks_skipping_and_scored_positions_change_nothing(kind: str) -> None:
    scored = np.array([[1, 6], [0, 3]])
    model, tokens = ready(kind)
    masks = np.stack([mask_of(model.graph, seed) for seed in range(5)])
    masks[1], masks[2, :, 3:], masks[4, 5:] = False, False, False
    each = jnp.stack([masked_run(model, mask) for mask in masks])
    wanted = jnp.take_along_axis(each, scored[None, ..., None], 2)
    few = replace(model, scored=jnp.asarray(scored))
    for chunk, skip in ((1, True), (2, False), (3, True)):
        assert np.abs(masked_runs(few, jnp.asarray(masks), chunk=chunk, skip=skip) - wanted).max() < 1e-5
    positional = np.broadcast_to(masks[3], (tokens.shape[1], *masks[3].shape))
    assert np.abs(masked_run(few, positional) - wanted[3]).max() < 1e-5


@pytest.mark.parametrize("kind", ["gpt2", "neox", "attention-only", "post-norms-with-biases"])
def test_a_run_from_a_layer_is_the_whole_run(kind: str) -> None:
    model, _ = ready(kind)
    first, second = mask_of(model.graph, 3), mask_of(model.graph, 4)
    first_later = model.graph.inputs(1).start
    second[:, :first_later] = first[:, :first_later]
    before = write(model, first)
    assert np.abs(masked_run(model, second, layer=1, written=before) - masked_run(model, second)).max() < 1e-6
    last = first.copy()
    last[:, -1] = second[:, -1]
    resumed = masked_run(model, last, layer=model.graph.n_layers, written=before)
    assert np.abs(resumed - masked_run(model, last)).max() < 1e-6
    with pytest.raises(ModelError, match="needs what was written"):
        masked_run(model, first, layer=1)


def test_skipping_computes_no_layer_that_nothing_leaves() -> None:
    """A layer whose weights are not numbers does no harm then."""
    model, tokens = ready("gpt2")
    mask = model.graph.possible.copy()
    mask[model.graph.pieces[2]] = False
    expected = masked_run(model, mask)
    broken = jax.tree.map(lambda w: w, model.params)
    broken["blocks"][0]["mlp"]["W_in"] = jnp.full_like(broken["blocks"][0]["mlp"]["W_in"], jnp.nan)
    assert not np.isfinite(masked_run(replace(model, params=broken), mask)).any()
    assert np.abs(masked_run(replace(model, params=broken), mask, skip=True) - expected).max() < 1e-5
    assert np.isfinite(plain(model, tokens)).all()


@pytest.mark.parametrize("neurons", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
def test_derivatives_with_respect_to_the_mask_are_differences(kind: str, neurons: bool) -> None:
    model, _ = ready(kind, neurons)
    mask = jnp.asarray(np.random.default_rng(5).random(model.graph.possible.shape), jnp.float32)
    weights = jnp.asarray(np.random.default_rng(6).standard_normal((2, 7, model.config.n_logits)), jnp.float32)

    def value(m: jax.Array) -> jax.Array:
        return (masked_run(model, m) * weights).sum()

    gradient = jax.jit(jax.grad(value))(mask)
    direction = jnp.asarray(np.random.default_rng(7).standard_normal(mask.shape), jnp.float32)
    numeric = (value(mask + 1e-2 * direction) - value(mask - 1e-2 * direction)) / 2e-2
    assert abs(float((gradient * direction).sum() - numeric)) < 0.01 * abs(float(numeric))
    assert float(jnp.abs(jnp.where(model.graph.possible, 0, gradient)).max()) == 0


def test_masks_of_nodes_are_induced_masks() -> None:
    model, _ = ready("gpt2")
    nodes = np.ones(len(model.graph.sources), bool)
    nodes[2] = False
    mask = model.graph.induced(nodes)
    only = model.graph.possible.copy()
    only[2] = False  # what the head reads does not matter, for nobody reads the head
    assert np.abs(masked_run(model, mask) - masked_run(model, only)).max() < 1e-6


def test_the_embedded_model_under_a_mask_of_ones() -> None:
    model = embedded_model()
    tokens = np.random.default_rng(0).integers(0, model.config.d_vocab, (1, 48)).astype(np.int32)
    zeros = jnp.zeros((len(Graph.of(model.config).sources), model.config.d_model))
    ready = masked_model(model.config, model.params, tokens, zeros)
    got = jax.nn.log_softmax(masked_run(ready, ready.graph.possible))
    expected = jax.nn.log_softmax(model.run(tokens, ["logits"])["logits"])
    assert np.allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(jnp.exp(got) - jnp.exp(expected)).max() < 1e-5


def test_what_does_not_fit_is_refused() -> None:
    config, params = random_model("gpt2")
    tokens, graph = tokens_of(config), Graph.of(config)
    values = source_outputs(config, params, tokens)
    assert isinstance(values, jax.Array)
    model = masked_model(config, params, tokens, values)
    with pytest.raises(ModelError, match="another model"):
        masked_run(model, graph.possible[:-1])
    with pytest.raises(ModelError, match="one a position"):
        masked_run(model, np.broadcast_to(graph.possible, (3, *graph.possible.shape)))
    with pytest.raises(ModelError, match="of 5 positions, the sequences of 7"):
        masked_model(config, params, tokens, values[0, :, :5])
    with pytest.raises(ModelError, match="made for another model"):
        masked_model(config, params, tokens, values[:, :-1])
    with pytest.raises(ModelError, match="0 neurons a layer"):
        masked_model(config, params, tokens, Outputs(values, values))
    with pytest.raises(ModelError, match="have shape"):
        masked_model(config, params, tokens, values[0, 0, 0])
    params["blocks"][1]["attn"]["W_Q"] = Chain(jnp.zeros((12, 2)), jnp.zeros((2, 12)))
    with pytest.raises(ModelError, match=r"blocks\.1\.attn\.W_Q is an operator"):
        masked_model(config, params, tokens, values)
