"""CE and KL recovered against sae-lens's own evaluation of the same SAE on the same tokens.

What is aligned: sae-lens averages KL over every position and CE over every position but a sequence's last, in nats, and
leaves out positions whose token is ignored; at those the SAE's output is not put in, but zero ablation zeroes them as
well. We average over scored positions, in bits, and CE's last position is NaN. A special token that starts every
sequence has one activation in a causal model, so that our constant there is the activation which sae-lens keeps.
"""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from estimators.accounting import SurpriseAccounting
from estimators.kernels import Damage
from estimators.recovered import Baselines, explained_variance, recovered
from mdl.data import Dataset
from mdl.models import load_model
from mdl.task import Task, build_task
from mdl.units import bits_to_nats

lens = pytest.importorskip("transformer_lens", reason="TransformerLens is not installed")
sae_lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed")

SITE = "blocks.1.hook_resid_pre"
VOCABULARY, CONTEXT, WIDTH, START = 50, 12, 16, 0
SPLITS = (16, 12, 20)  # fit, tune, held-out sequences


@pytest.fixture(scope="module")
def hooked() -> Any:
    """A random HookedTransformer, scaled up so that what is lost at the site matters."""
    sizes = {"n_layers": 2, "d_model": WIDTH, "n_ctx": CONTEXT, "d_head": 4, "n_heads": 4, "d_mlp": 32}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = lens.HookedTransformerConfig(**sizes, d_vocab=VOCABULARY, act_fn="gelu_new", seed=3, device="cpu")
        model = lens.HookedTransformer(config).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def sae() -> Any:
    """Random directions with tied weights and a threshold: a reconstruction that is neither right nor useless."""
    metadata = sae_lens.saes.sae.SAEMetadata(hook_name=SITE, model_name="tiny")
    made = sae_lens.StandardSAE(sae_lens.StandardSAEConfig(d_in=WIDTH, d_sae=48, metadata=metadata))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        rows = torch.randn(made.W_dec.shape, generator=generator)
        made.W_dec.copy_(rows / rows.norm(dim=1, keepdim=True))
        made.W_enc.copy_(0.6 * made.W_dec.T)
        made.b_enc.fill_(-0.1)
        made.b_dec.copy_(0.1 * torch.randn(made.b_dec.shape, generator=generator))
    return made


def tokens_of(special: tuple[int, ...]) -> np.ndarray:
    tokens = np.random.default_rng(6).integers(1, VOCABULARY, (sum(SPLITS), CONTEXT)).astype(np.int32)
    if special:
        tokens[:, 0] = START
    return tokens


def task_of(hooked: Any, special: tuple[int, ...]) -> Task:
    parts = np.split(tokens_of(special), np.cumsum(SPLITS)[:2])
    groups = tuple(np.arange(len(part)) for part in parts)
    data = Dataset(*parts, groups, special, {"data": "uniform"})
    return build_task(load_model(hooked), f"upstream of {SITE}", data, lambda *_: None)


@torch.no_grad()
def theirs(hooked: Any, sae: Any, tokens: np.ndarray, special: tuple[int, ...]) -> dict[str, float]:
    """sae-lens's own figures: `get_recons_loss`, averaged by `get_downstream_reconstruction_metrics`."""
    from sae_lens.evals import get_downstream_reconstruction_metrics
    from sae_lens.training.activation_scaler import ActivationScaler

    store = SimpleNamespace(get_batch_tokens=lambda size: torch.from_numpy(tokens[:size]).long())
    return get_downstream_reconstruction_metrics(
        sae, hooked, store, ActivationScaler(), True, True, 1, len(tokens), ignore_tokens=list(special) or None
    )


@torch.no_grad()
def raw_reconstruction(sae: Any, outputs: np.ndarray) -> np.ndarray:
    return sae(torch.from_numpy(np.ascontiguousarray(outputs, np.float32))).numpy()


@pytest.mark.parametrize("special", [(), (START,)], ids=["every position", "start token ignored"])
def test_recovered_equals_sae_lens(hooked: Any, sae: Any, special: tuple[int, ...]):
    estimator = SurpriseAccounting(task_of(hooked, special), 1e6)
    bench = estimator.bench
    split, constant = bench.held_out, bench.special[1]
    damage = bench.measure(split, raw_reconstruction(sae, split.sample.outputs), constant)
    ours = recovered(damage, estimator.baselines)
    expected = theirs(hooked, sae, split.activations.tokens, special)

    assert 0.05 < expected["kl_div_score"] < 0.95  # the comparison is of something
    assert ours["ce_recovered"] == pytest.approx(expected["ce_loss_score"], abs=1e-3)
    assert ours["kl_recovered"] == pytest.approx(expected["kl_div_score"], abs=1e-3)
    for key, found in {
        "kl_div_with_sae": damage.kl_bits,
        "kl_div_with_ablation": estimator.baselines.zero.kl_bits,
        "ce_loss_with_sae": damage.loss_bits,
        "ce_loss_without_sae": estimator.baselines.clean.loss_bits,
        "ce_loss_with_ablation": estimator.baselines.zero.loss_bits,
    }.items():
        assert bits_to_nats(np.nanmean(found)) == pytest.approx(expected[key], abs=1e-3), key
    increase = expected["ce_loss_with_sae"] - expected["ce_loss_without_sae"]
    assert bits_to_nats(ours["loss_increase_bits"]) == pytest.approx(increase, abs=1e-3)


def test_each_token_equals_sae_lens(hooked: Any, sae: Any):
    from sae_lens.evals import get_recons_loss
    from sae_lens.training.activation_scaler import ActivationScaler

    estimator = SurpriseAccounting(task_of(hooked, ()), 1e6)
    split = estimator.bench.held_out
    outputs = split.sample.outputs
    damage = estimator.bench.measure(split, raw_reconstruction(sae, outputs), estimator.bench.special[1])
    tokens = torch.from_numpy(split.activations.tokens).long()
    with torch.no_grad():
        expected = get_recons_loss(sae, hooked, ActivationScaler(), tokens, compute_kl=True, compute_ce_loss=True)
    shape = split.activations.tokens.shape
    kl, loss = bits_to_nats(damage.kl_bits).reshape(shape), bits_to_nats(damage.loss_bits).reshape(shape)
    np.testing.assert_allclose(kl, expected["kl_div_with_sae"].numpy(), atol=1e-4)
    np.testing.assert_allclose(loss[:, :-1], expected["ce_loss_with_sae"].numpy(), atol=1e-4)
    assert np.isnan(loss[:, -1]).all()


def test_explained_variance_equals_sae_lens(sae: Any):
    from sae_lens.evals import ExplainedVarianceCalculator

    outputs = (3 + np.random.default_rng(7).normal(size=(200, WIDTH))).astype(np.float32)
    prediction = raw_reconstruction(sae, outputs)
    calculator = ExplainedVarianceCalculator()
    for start in (0, 70):
        part = slice(start, 70 if start == 0 else None)
        calculator.add_batch(torch.from_numpy(prediction[part]), torch.from_numpy(outputs[part]))
    assert explained_variance(outputs, prediction) == pytest.approx(calculator.compute(), rel=1e-5)


def test_the_ends_of_the_scale():
    def damage(kl: float, loss: float) -> Damage:
        return Damage(np.array([kl, kl]), np.array([loss, np.nan]))

    baselines = Baselines(damage(0.0, 3.0), damage(2.0, 7.0))
    assert recovered(baselines.clean, baselines) == {"ce_recovered": 1, "kl_recovered": 1, "loss_increase_bits": 0}
    assert recovered(baselines.zero, baselines) == {"ce_recovered": 0, "kl_recovered": 0, "loss_increase_bits": 4}
    halfway = recovered(damage(0.5, 4.0), baselines)
    assert halfway == {"ce_recovered": 0.75, "kl_recovered": 0.75, "loss_increase_bits": 1}
    harmless = recovered(baselines.clean, Baselines(baselines.clean, baselines.clean))
    assert np.isnan(harmless["ce_recovered"])  # ablation that costs nothing leaves nothing to recover
    assert np.isnan(harmless["kl_recovered"])
