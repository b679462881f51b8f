"""The KL kernel against a float64 oracle, and the evaluator against the whole model and against TransformerLens."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from estimators.kernels import FINAL, Evaluator, compare_chunked, kl_nats
from mdl.data import Dataset
from mdl.models import load_model
from mdl.models.model import Model
from mdl.task import Activations, Task, build_task
from mdl.units import nats_to_bits

VOCABULARY = 2000
REGIONS = [
    "upstream of blocks.0.hook_resid_mid",
    "upstream of blocks.1.hook_resid_post",
    "blocks.0.mlp",
    "blocks.1.attn",
    "model",
]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def exact_kl(reference: np.ndarray, explained: np.ndarray) -> np.ndarray:
    """sum p (log p - log q), nats, in the widest floating-point numbers there are."""
    log_p, log_q = (log_softmax(x.astype(np.longdouble)) for x in (reference, explained))
    return np.sum(np.exp(log_p) * (log_p - log_q), -1).astype(np.float64)


def pair(kind: str, noise: float, rows: int = 64) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(rows, VOCABULARY)) * 3
    if kind == "peaked":
        reference[np.arange(rows), rng.integers(0, VOCABULARY, rows)] = 60.0
    if kind == "large":
        reference = rng.uniform(-60, 60, reference.shape)
    if kind == "offset":
        reference = reference + 60.0
    explained = reference + noise * rng.normal(size=reference.shape)
    return reference.astype(np.float32), explained.astype(np.float32)


# Noise of .0045 a logit is a KL of 1e-5 nats: half its variance.
@pytest.mark.parametrize("noise", [0.0045, 0.03, 0.3, 3.0])
@pytest.mark.parametrize("kind", ["soft", "peaked", "large", "offset"])
def test_kl_in_float32_is_that_in_float64(kind: str, noise: float) -> None:
    reference, explained = pair(kind, noise)
    oracle = exact_kl(reference, explained)
    found = np.asarray(jax.jit(kl_nats)(jnp.asarray(reference), jnp.asarray(explained)))
    assert found.dtype == np.float32
    assert (found >= 0).all()
    assert found.mean(dtype=np.float64) == pytest.approx(oracle.mean(), rel=1e-3)
    if kind == "soft" and noise == 0.0045:
        assert 5e-6 < oracle.mean() < 2e-5


def test_kl_of_opposite_predictions() -> None:
    """Each model is sure, of another token: the KL is the difference of their logits."""
    reference, explained = np.full((2, 50), -60.0, np.float32), np.full((2, 50), -60.0, np.float32)
    reference[:, 3], explained[:, 7] = 60.0, 60.0
    assert np.allclose(np.asarray(kl_nats(jnp.asarray(reference), jnp.asarray(explained))), 120.0, rtol=1e-5)


def test_kl_of_equals_is_nothing() -> None:
    reference, _ = pair("soft", 0.0)
    assert (np.asarray(kl_nats(jnp.asarray(reference), jnp.asarray(reference))) == 0).all()
    shifted = np.asarray(kl_nats(jnp.asarray(reference), jnp.asarray(reference + np.float32(5))))
    assert np.abs(shifted).max() < 1e-9


@pytest.mark.parametrize("chunk", [1, 7, 16, 50, 64, 512])
def test_chunks_do_not_show(chunk: int) -> None:
    rng = np.random.default_rng(1)
    weights = jnp.asarray(rng.normal(size=(8, 30)).astype(np.float32))
    hidden, other = (jnp.asarray(rng.normal(size=(50, 8)).astype(np.float32)) for _ in range(2))
    targets = jnp.asarray(rng.integers(0, 30, 50).astype(np.int32))
    found = np.asarray(compare_chunked(lambda h: h @ weights, hidden, other, targets, chunk))
    logits = np.asarray(hidden) @ np.asarray(weights), np.asarray(other) @ np.asarray(weights)
    assert np.allclose(found[:, 0], exact_kl(*logits), rtol=1e-4, atol=1e-6)
    loss = -log_softmax(logits[1].astype(np.float64))[np.arange(50), np.asarray(targets)]
    assert np.allclose(found[:, 1], loss, rtol=1e-5)


def evaluate(model: Model, activations: Activations, values: np.ndarray, output: str) -> tuple[np.ndarray, np.ndarray]:
    """KL and loss in bits at the scored positions, from two runs of the whole model, logits kept, in float64."""
    tokens = activations.tokens
    plain = np.asarray(model.run(tokens, ["logits"])["logits"], np.float64)
    written = values if output == "logits" else model.run(tokens, ["logits"], {output: values})["logits"]
    explained = np.asarray(written, np.float64)
    loss = np.full(tokens.shape, np.nan)
    following = tokens[:, 1:, None].astype(int)
    loss[:, :-1] = -np.take_along_axis(log_softmax(explained)[:, :-1], following, 2)[..., 0]
    kl = exact_kl(plain, explained)
    return nats_to_bits(kl[activations.scored]), nats_to_bits(loss[activations.scored])


@pytest.mark.parametrize("region", REGIONS)
def test_damage_is_that_of_the_whole_model_with_a_write(
    region: str, tiny_model: Model, tiny_data: Dataset, build: Callable[..., Task]
) -> None:
    task = build(tiny_model, region, tiny_data)
    activations = task.held_out
    noise = np.random.default_rng(2).normal(size=activations.outputs.shape).astype(np.float32)
    values = activations.outputs + 0.3 * activations.outputs.std() * noise
    evaluator = Evaluator(tiny_model, task.region)
    damage = evaluator.damage(activations, evaluator.reference(activations), values)
    kl, loss = evaluate(tiny_model, activations, values, task.region.output)
    assert kl.mean() > 0.01
    assert np.allclose(damage.kl_bits, kl, atol=1e-5 * max(1.0, kl.max()))
    assert np.allclose(damage.loss_bits, loss, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert np.isnan(damage.loss_bits).sum() == len(activations.tokens)


@pytest.mark.parametrize("region", REGIONS)
def test_no_change_does_no_damage(
    region: str, tiny_model: Model, tiny_data: Dataset, build: Callable[..., Task]
) -> None:
    task = build(tiny_model, region, tiny_data)
    evaluator = Evaluator(tiny_model, task.region)
    found = evaluator.damage(task.held_out, evaluator.reference(task.held_out), task.held_out.outputs)
    assert (found.kl_bits >= 0).all()
    assert found.kl_bits.max() < 1e-8


def test_the_final_site_is_what_the_unembedding_reads(tiny_model: Model) -> None:
    assert FINAL in tiny_model.sites()


def lens_model() -> object:
    """A small HookedTransformer with weights that are large enough for ablation to matter."""
    lens = pytest.importorskip("transformer_lens", reason="TransformerLens is not installed")
    import torch

    sizes = {"n_layers": 2, "d_model": 16, "n_ctx": 16, "d_head": 4, "n_heads": 4, "d_vocab": 40, "d_mlp": 24}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = lens.HookedTransformer(
            lens.HookedTransformerConfig(**sizes, act_fn="gelu_new", seed=0, device="cpu", default_prepend_bos=False)
        )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("site", ["blocks.1.hook_resid_pre", "blocks.0.hook_resid_mid"])
def test_the_null_is_mean_ablation_of_transformer_lens(
    site: str, tiny_data: Dataset, build: Callable[..., Task]
) -> None:
    import torch

    hooked = lens_model()
    data = Dataset(tiny_data.fit, tiny_data.tune, tiny_data.held_out, tiny_data.groups, (), {"data": "markov"})
    task = build(load_model(hooked), f"upstream of {site}", data)
    activations = task.held_out
    mean = task.fit.outputs.mean(0, dtype=np.float64).astype(np.float32)

    def ablate(value: torch.Tensor, hook: object) -> torch.Tensor:
        return torch.as_tensor(mean).expand_as(value)

    tokens = torch.as_tensor(activations.tokens).long()
    with torch.no_grad():
        plain = hooked(tokens).numpy()
        ablated = hooked.run_with_hooks(tokens, fwd_hooks=[(site, ablate)]).numpy()
    expected = nats_to_bits(exact_kl(plain, ablated).mean())
    evaluator = Evaluator(task.model, task.region)
    values = np.broadcast_to(mean, activations.outputs.shape)
    found = evaluator.damage(activations, evaluator.reference(activations), values).kl_bits.mean()
    assert expected > 0.5
    assert found == pytest.approx(expected, rel=1e-4)


def test_nothing_is_compiled_twice(tiny_task: Task) -> None:
    evaluator = Evaluator(tiny_task.model, tiny_task.region)
    activations = tiny_task.held_out
    reference = evaluator.reference(activations)
    for scale in (1.0, 0.9, 0.5):
        evaluator.damage(activations, reference, scale * activations.outputs)
    for seed in range(3):
        evaluator.score_gradients(activations, seed)
    assert evaluator._damage._cache_size() == 1
    assert evaluator._gradient._cache_size() == 1
    assert evaluator._hidden._cache_size() == 1


@pytest.mark.parametrize("tokens_a_batch", [64, 100])
def test_batches_do_not_show(tokens_a_batch: int, tiny_task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    activations = tiny_task.tune_activations
    values = 0.8 * activations.outputs
    whole = Evaluator(tiny_task.model, tiny_task.region)
    expected = whole.damage(activations, whole.reference(activations), values).kl_bits
    monkeypatch.setattr("estimators.kernels.BATCH_TOKENS", tokens_a_batch)
    cut = Evaluator(tiny_task.model, tiny_task.region)
    found = cut.damage(activations, cut.reference(activations), values).kl_bits
    assert np.allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert cut._damage._cache_size() == 1


def test_score_gradients_have_mean_zero_and_a_seed(last_task: Task) -> None:
    """E[d log p] = 0; a seed gives the same draw, another one another."""
    evaluator = Evaluator(last_task.model, last_task.region)
    draws = [evaluator.score_gradients(last_task.fit_activations, seed) for seed in range(4)]
    again = evaluator.score_gradients(last_task.fit_activations, 0)
    assert np.array_equal(draws[0], again)
    assert not np.array_equal(draws[0], draws[1])
    everything = np.concatenate(draws).astype(np.float64)
    error = everything.std(0) / np.sqrt(len(everything))
    assert (np.abs(everything.mean(0)) < 4.5 * error).all()


@pytest.fixture(scope="session")
def build() -> Callable[..., Task]:
    """Tasks by model, region and data, each built once."""
    from functools import cache

    @cache
    def make(key: tuple[int, str, int]) -> Task:
        model, data = held[key]
        return build_task(model, key[1], data, lambda *_: None)

    held: dict[tuple[int, str, int], tuple[Model, Dataset]] = {}

    def by_region(model: Model, region: str, data: Dataset) -> Task:
        key = (id(model), region, id(data))
        held[key] = (model, data)
        return make(key)

    return by_region
