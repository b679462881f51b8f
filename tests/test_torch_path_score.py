"""A torch module without an adapter is scored as the same weights are through ours."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import GPT2Config, GPT2LMHeadModel

from estimators.kernels import Evaluator, evaluator_for
from estimators.kernels import kl_nats as jax_kl_nats
from estimators.torch_kernels import TorchEvaluator, kl_nats, sample_rows
from mdl.data import Sizes, from_tokens
from mdl.errors import DataError, ModelError, TaskError
from mdl.ledger import read_scorecard
from mdl.models import load_model
from mdl.report.table import print_scorecard
from mdl.score import compare, default_explanations
from mdl.task import build_task, parse_region

VOCABULARY, CONTEXT, WIDTH = 29, 24, 8
SITE = "blocks.1"


class Block(torch.nn.Module):
    """A causal running mean and a nonlinear layer, both beside a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = torch.nn.Linear(WIDTH, WIDTH)
        self.mlp = torch.nn.Sequential(torch.nn.Linear(WIDTH, 16), torch.nn.GELU(), torch.nn.Linear(16, WIDTH))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, str]:
        seen = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        x = x + self.mix(x.cumsum(1) / seen)
        return x + self.mlp(x), "something beside it"


class Tiny(torch.nn.Module):
    """A language model of our own making; dropout would show if it did not run in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = torch.nn.ModuleList([Block() for _ in range(3)])
        self.dropout = torch.nn.Dropout(0.5)
        self.head = torch.nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)[0]
        return 3 * self.head(self.dropout(x))


class Wrapped(torch.nn.Module):
    """A GPT-2 behind a module that no adapter knows."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.inner(tokens).logits


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads cost more than they give at this size."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    torch.manual_seed(0)
    return Tiny()


@pytest.fixture(scope="module")
def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(1)
    config = GPT2Config(
        n_embd=WIDTH, n_layer=3, n_head=2, vocab_size=VOCABULARY, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sequences of skewed, repetitive tokens behind a start token."""
    rng = np.random.default_rng(0)
    drawn = np.minimum(rng.geometric(0.15, (100, CONTEXT)), VOCABULARY - 1)
    drawn[:, 1::3] = drawn[:, 0::3]
    drawn[:, 0] = 0
    path = tmp_path_factory.mktemp("tokens") / "tokens.npy"
    np.save(path, drawn)
    return path


@pytest.fixture(scope="module")
def data(tokens):
    return from_tokens(tokens, Sizes(40, 16, 16), 0)


EXPLANATIONS = ["nothing", "token-table", "pca:rank=4"]


def test_a_module_of_ones_own_is_scored(tiny, tokens, tmp_path):
    arguments = {"tokens": tokens, "explanations": EXPLANATIONS, "fidelities": [0.05], "sequences": 20}
    card = compare(tiny, f"upstream of {SITE}", **arguments, out=tmp_path)
    assert [(s.explanation, s.fidelity) for s in card.scores] == [
        (name, setting) for name in ("nothing", "token-table", "pca-4") for setting in (0.05, None)
    ]
    for score in card.scores:
        assert "evaluated through the slower torch path (no JAX adapter for Tiny)" in score.notes
        assert math.isnan(score.beside["flops_ratio"])
        if score.fidelity is not None:
            assert score.kl_bits == pytest.approx(0.05 * card.task["null_kl_bits"], rel=0.02)
            assert score.rate > 0
    null = next(s for s in card.scores if s.explanation == "nothing" and s.fidelity is None)
    assert null.rate == pytest.approx(card.task["null_kl_bits"], rel=0.02)
    assert card.task["width"] == WIDTH
    again = read_scorecard(tmp_path / "scorecard.json")
    assert [s.notes for s in again.scores] == [s.notes for s in card.scores]
    shown = io.StringIO()
    print_scorecard(again, Console(file=shown, width=200))
    assert "slower torch path" in shown.getvalue()
    assert not re.search(r"\bnan\b", shown.getvalue())


def test_both_paths_give_the_same_scores(gpt2, tokens, monkeypatch):
    # The paths draw different samples of the Fisher information; with the draws of one, nothing else may differ.
    gradients: dict[int, np.ndarray] = {}
    draw = Evaluator.score_gradients
    monkeypatch.setattr(
        Evaluator, "score_gradients", lambda self, a, seed: gradients.setdefault(seed, draw(self, a, seed))
    )
    monkeypatch.setattr(TorchEvaluator, "score_gradients", lambda self, a, seed: gradients[seed])
    arguments = {"tokens": tokens, "explanations": ["nothing"], "fidelities": [0.05], "sequences": 20}
    fast = compare(gpt2, "upstream of blocks.2.hook_resid_pre", **arguments)
    slow = compare(Wrapped(gpt2), "upstream of inner.transformer.h.1", **arguments)
    assert slow.task["null_kl_bits"] == pytest.approx(fast.task["null_kl_bits"], rel=1e-4)
    for a, b in zip(slow.scores, fast.scores, strict=True):
        assert (a.explanation, a.fidelity) == (b.explanation, b.fidelity)
        assert a.rate == pytest.approx(b.rate, rel=1e-3)
        assert a.static.whole_bits == pytest.approx(b.static.whole_bits, rel=1e-2)
        for name in ("ce_recovered", "kl_recovered", "explained_variance"):
            assert a.beside[name] == pytest.approx(b.beside[name], rel=1e-2, abs=1e-2)
        assert not b.notes


def test_both_evaluators_measure_the_same_damage(gpt2, data):
    regions = {"upstream of inner.transformer.h.1": Wrapped(gpt2), "upstream of blocks.2.hook_resid_pre": gpt2}
    damages, gradients = [], []
    for region, module in regions.items():
        model = load_model(module)
        task = build_task(model, region, data, lambda *_: None)
        evaluator = evaluator_for(model, task.region)
        reference = evaluator.reference(task.tune_activations)
        noise = 0.3 * np.random.default_rng(2).normal(size=task.tune_activations.outputs.shape)
        values = (task.tune_activations.outputs + noise).astype(np.float32)
        damages.append(evaluator.damage(task.tune_activations, reference, values))
        unchanged = evaluator.damage(task.tune_activations, reference, task.tune_activations.outputs)
        assert np.abs(unchanged.kl_bits).max() < 1e-9
        draws = [evaluator.score_gradients(task.tune_activations, seed) for seed in range(12)]
        gradients.append(np.mean([g.T.astype(float) @ g / len(g) for g in draws], 0))
    slow, fast = damages
    np.testing.assert_allclose(slow.kl_bits, fast.kl_bits, rtol=1e-3, atol=1e-6)
    assert slow.kl_bits.mean() == pytest.approx(fast.kl_bits.mean(), rel=1e-4)
    np.testing.assert_allclose(slow.loss_bits, fast.loss_bits, atol=1e-4)
    assert np.isnan(slow.loss_bits).sum() == len(data.tune)
    # Different draws of the same Fisher information, 12 x 368 gradients each.
    assert np.linalg.norm(gradients[0] - gradients[1]) < 0.15 * np.linalg.norm(gradients[1])


def test_the_kernels_agree_with_ours_and_draws_with_their_chances():
    rng = np.random.default_rng(3)
    p, q = (rng.normal(size=(50, 7)).astype(np.float32) for _ in range(2))
    q[:25] = p[:25] + 1e-3 * q[:25]
    ours = kl_nats(torch.as_tensor(p), torch.as_tensor(q)).numpy()
    np.testing.assert_allclose(ours, np.asarray(jax_kl_nats(jnp.asarray(p), jnp.asarray(q))), rtol=1e-4, atol=1e-10)
    assert (ours >= 0).all()
    draws = sample_rows(torch.as_tensor(p[:1]).expand(40000, -1), rng.random(40000, np.float32))[:, 0]
    chances = np.exp(p[0]) / np.exp(p[0]).sum()
    frequencies = np.bincount(draws.numpy(), minlength=7) / 40000
    np.testing.assert_allclose(frequencies, chances, atol=4 * np.sqrt(0.25 / 40000))


def test_score_gradients_are_the_derivative_of_the_sampled_likelihood(tiny, data):
    model = load_model(tiny)
    task = build_task(model, f"upstream of {SITE}", data, lambda *_: None)
    activations = task.tune_activations.head(2)
    evaluator = TorchEvaluator(model, task.region)
    gradients = evaluator.score_gradients(activations, 5)
    np.testing.assert_array_equal(gradients, evaluator.score_gradients(activations, 5))
    assert all(parameter.grad is None and parameter.requires_grad for parameter in tiny.parameters())
    assert torch.is_grad_enabled()

    uniform = np.random.default_rng(5).random(activations.tokens.shape, np.float32)
    drawn = sample_rows(evaluator._logits(activations.tokens, activations.outputs), uniform)
    direction = np.random.default_rng(6).normal(size=activations.outputs.shape) * activations.scored[..., None]

    def likelihood(step: float) -> float:
        logits = evaluator._logits(activations.tokens, activations.outputs + step * direction).detach()
        return float(logits.double().log_softmax(-1).gather(-1, drawn).sum())

    slope = (likelihood(1e-3) - likelihood(-1e-3)) / 2e-3
    assert float((gradients * direction[activations.scored]).sum()) == pytest.approx(slope, rel=2e-3)


def test_the_evaluator_is_chosen_by_the_model(gpt2):
    slow, fast = load_model(Wrapped(gpt2)), load_model(gpt2)
    assert isinstance(evaluator_for(slow, parse_region("model", slow)), TorchEvaluator)
    assert isinstance(evaluator_for(fast, parse_region("model", fast)), Evaluator)


def test_the_whole_module_is_a_region_too(tiny, tokens):
    card = compare(tiny, "model", tokens=tokens, explanations=["nothing"], sequences=8)
    (score,) = card.scores
    assert score.phenomenon == "behaviour"
    assert score.rate == pytest.approx(card.task["null_kl_bits"], rel=0.02)


def test_regions_that_make_no_sense_are_refused(tiny, gpt2, tokens, data):
    model = load_model(tiny)
    with pytest.raises(ModelError, match=r"Did you mean 'blocks\.1'"):
        parse_region("upstream of blocs.1", model)
    with pytest.raises(TaskError, match=r"Did you mean 'upstream of blocks\.1.*' .*submodule"):
        parse_region("upstream  blocks.1", model)
    with pytest.raises(TaskError, match=r"Tiny runs as a torch module.*no default region"):
        compare(tiny, tokens=tokens)
    with pytest.raises(TaskError, match=r"blocks\.1\.mlp does not cut the model in two"):
        build_task(model, "upstream of blocks.1.mlp", data, lambda *_: None)
    assert default_explanations(model, f"upstream of {SITE}")[:3] == ["nothing", "token-table", "pca:rank=1"]
    assert parse_region("model", model).output == "logits"


def test_tokens_and_shapes_are_checked_before_any_work(tiny, gpt2, data, tokens):
    def last_only(module: torch.nn.Module, _: object, output: torch.Tensor) -> torch.Tensor:
        return output[:, -1]

    narrow = Tiny()
    narrow.head = torch.nn.Linear(WIDTH, 20)
    with pytest.raises(DataError, match="token id 28 is outside the model's vocabulary of 20"):
        build_task(load_model(narrow), f"upstream of {SITE}", data, lambda *_: None)
    narrow = Tiny()
    narrow.embed = torch.nn.Embedding(20, WIDTH)
    with pytest.raises(ModelError, match=r"Tiny failed on an input of shape .*IndexError"):
        build_task(load_model(narrow), f"upstream of {SITE}", data, lambda *_: None)
    pooled = Tiny()
    pooled.register_forward_hook(last_only)
    with pytest.raises(ModelError, match=r"'logits' gives \(1, 29\)"):
        build_task(load_model(pooled), f"upstream of {SITE}", data, lambda *_: None)
    wrapped = Wrapped(gpt2)
    wrapped.config = type("Settings", (), {"n_ctx": 8})()
    with pytest.raises(DataError, match="24 tokens exceed the model's context of 8"):
        build_task(load_model(wrapped), "upstream of inner.transformer.h.1", data, lambda *_: None)
    with pytest.raises(DataError, match="this model takes 2 to 8"):
        compare(load_model(wrapped), "upstream of inner.transformer.h.1", tokens=tokens, context=9)
