"""The certificate: honest residuals agree, dishonest ones do not, and the audit is fixed by the message alone."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from decompositions.baselines import Nothing, TokenTable
from estimators import certify as certify_module
from estimators.certify import (
    Certificate,
    _choose,
    _sample,
    _uniform,
    audit_seed,
    certify,
    certify_attempt,
    explained_reference,
    reconstruction,
)
from estimators.fidelity import Attempt, Bench, Coding
from estimators.kernels import Evaluator, RegionEvaluator, evaluator_for
from estimators.solver import Solution
from mdl.codes.tokens import TokenCode
from mdl.data import Dataset
from mdl.errors import CodeError, DataError, TaskError
from mdl.models.model import Model
from mdl.models.torch_path import wrap
from mdl.protocols import Decomposition, Settings
from mdl.task import Activations, Task, build_task
from mdl.units import nats_to_bits

SEQUENCES, DRAWS = 48, 64
VOCABULARY = 40
Noisy = tuple[RegionEvaluator, Activations, np.ndarray, np.ndarray]
REGIONS = ["upstream of blocks.1.hook_resid_pre", "upstream of blocks.1.hook_resid_post", "blocks.1.mlp", "model"]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def predictions(evaluator: RegionEvaluator, activations: Activations, values: np.ndarray) -> np.ndarray:
    """Logits with values in the region's place."""
    return evaluator.logits(activations, explained_reference(evaluator, activations, values))


def audit(evaluator: RegionEvaluator, activations: Activations, values: np.ndarray, *rest: Any, **sizes: int) -> Any:
    """`certify`, by the values that take the place of the region's outputs."""
    explained = explained_reference(evaluator, activations, values)
    return certify(evaluator, activations, evaluator.reference(activations), explained, *rest, **sizes)


def kl_bits(evaluator: RegionEvaluator, activations: Activations, values: np.ndarray) -> np.ndarray:
    """KL of each scored position by the full sum, in float64."""
    log_p, log_q = (log_softmax(predictions(evaluator, activations, v)) for v in (activations.outputs, values))
    return nats_to_bits(np.sum(np.exp(log_p) * (log_p - log_q), 1))


def attempt_of(bench: Bench, decomposition: Decomposition, step: float | None) -> Attempt:
    """An explanation of the held-out data, with a residual coder of that step or (None) under behaviour."""
    metric = bench.metrics[0]
    settings = Settings(bench.horizon, step or 0.1, metric.root, {"static": 4.0})
    examples = None if step is None else bench.examples
    coding = Coding.prepare(bench, decomposition.fit(bench.task.for_fitting()), metric, settings, step or 0.1, examples)
    return coding.attempt(bench, bench.held_out)


@pytest.fixture(scope="module")
def table(tiny_bench: Bench) -> Attempt:
    """The token table under behaviour: a KL of a good part of a bit."""
    return attempt_of(tiny_bench, TokenTable(), None)


@pytest.fixture(scope="module")
def noisy(tiny_task: Task) -> Noisy:
    """Evaluator, M's activations, a slightly wrong reconstruction, and its honest KL."""
    evaluator, activations = evaluator_for(tiny_task.model, tiny_task.region), tiny_task.held_out
    assert activations is not None
    spread = activations.outputs.std()
    noise = np.random.default_rng(3).normal(size=activations.outputs.shape)
    values = (activations.outputs + 0.13 * spread * noise).astype(np.float32)
    return evaluator, activations, values, kl_bits(evaluator, activations, values)


def test_the_seed_is_the_hash_of_the_message() -> None:
    message = b"frozen"
    assert audit_seed(message) == int(hashlib.sha256(message).hexdigest()[:16], 16)
    assert audit_seed(message) != audit_seed(b"frozen.")
    others = {
        audit_seed(message, b"a"),
        audit_seed(message, b"b"),
        audit_seed(message, b"a", b"b"),
        audit_seed(message),
    }
    assert len(others) == 4


@pytest.mark.parametrize("step", [None, 0.3, 0.1])
@pytest.mark.parametrize("decomposition", [Nothing(), TokenTable()])
def test_honest_attempts_agree(decomposition: Decomposition, step: float | None, tiny_bench: Bench) -> None:
    attempt = attempt_of(tiny_bench, decomposition, step)
    found = certify_attempt(tiny_bench, tiny_bench.held_out, attempt, sequences=SEQUENCES, draws=DRAWS)
    assert found.agrees
    assert found.kl_bits == pytest.approx(attempt.kl, rel=1e-6)  # all sequences are audited
    assert found.tokens == tiny_bench.held_out.activations.n_tokens
    assert found.difference == pytest.approx(attempt.kl, abs=4 * found.stderr + found.tolerance)
    assert found.seed == audit_seed(attempt.message.data)


def test_the_solution_at_one_percent_agrees(tiny_bench: Bench, nothing_at_one_percent: Solution) -> None:
    attempt = nothing_at_one_percent.attempt
    found = certify_attempt(tiny_bench, tiny_bench.held_out, attempt)
    assert found.agrees
    assert len(found.sequences) == 8
    assert found.tokens == 8 * 15
    more = certify_attempt(tiny_bench, tiny_bench.held_out, attempt, sequences=SEQUENCES, draws=512)
    assert more.agrees
    # Enough draws tell the KL of 1 % from nothing, and from half of itself.
    assert more.difference > 0.5 * attempt.kl + 4 * more.stderr + more.tolerance


@pytest.mark.parametrize("region", REGIONS)
def test_every_kind_of_region(region: str, tiny_model: Model, tiny_data: Dataset) -> None:
    bench = Bench(build_task(tiny_model, region, tiny_data, lambda *_: None), 1e6)
    attempt = attempt_of(bench, TokenTable(), None)
    found = certify_attempt(bench, bench.held_out, attempt, sequences=SEQUENCES, draws=DRAWS)
    assert found.agrees
    assert found.kl_bits == pytest.approx(attempt.kl, rel=1e-6)
    assert found.kl_bits > 0.1
    doubled = replace(attempt, damage=replace(attempt.damage, kl_bits=2 * attempt.damage.kl_bits))
    assert not certify_attempt(bench, bench.held_out, doubled, sequences=SEQUENCES, draws=DRAWS).agrees


@pytest.mark.parametrize("region", REGIONS)
def test_logits_are_those_of_the_whole_model_with_a_write(region: str, tiny_model: Model, tiny_data: Dataset) -> None:
    task = build_task(tiny_model, region, tiny_data, lambda *_: None)
    activations, output = task.held_out.head(5), task.region.output
    values = (0.7 * activations.outputs).astype(np.float32)
    expected = values
    if output != "logits":
        expected = np.asarray(tiny_model.run(activations.tokens, ["logits"], {output: values})["logits"])
    found = predictions(Evaluator(task.model, task.region), activations, values)
    assert found.dtype == np.float32
    assert np.allclose(found, expected[activations.scored], rtol=1e-4, atol=1e-4)


class Unknown(torch.nn.Module):
    """A language model that no adapter knows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCABULARY, 8)
        self.block = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh())
        self.head = torch.nn.Linear(8, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return 3 * self.head(self.block(self.embed(tokens).cumsum(1)))


@pytest.mark.parametrize("region", ["upstream of block", "model"])
def test_the_torch_path_certifies_too(region: str, tiny_data: Dataset) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        module = Unknown()
    bench = Bench(build_task(wrap(module), region, tiny_data, lambda *_: None), 1e6)
    attempt = attempt_of(bench, Nothing(), None)
    found = certify_attempt(bench, bench.held_out, attempt, sequences=SEQUENCES, draws=DRAWS)
    assert found.agrees
    assert found.kl_bits == pytest.approx(attempt.kl, rel=1e-6)
    halved = replace(attempt, damage=replace(attempt.damage, kl_bits=attempt.damage.kl_bits / 2))
    assert not certify_attempt(bench, bench.held_out, halved, sequences=SEQUENCES, draws=DRAWS).agrees


def test_the_model_under_itself_costs_nothing_more(noisy: Noisy) -> None:
    evaluator, activations, _, _ = noisy
    found = audit(evaluator, activations, activations.outputs, np.zeros(activations.n_tokens), 5)
    assert found.explained_bits == found.model_bits
    assert (found.difference, found.stderr, found.z, found.agrees) == (0.0, 0.0, 0.0, True)
    claimed = audit(evaluator, activations, activations.outputs, np.full(activations.n_tokens, 0.1), 5)
    assert not claimed.agrees
    assert claimed.z == -np.inf


SEEDS = range(100, 130)


def refuted(noisy: Noisy, kl: np.ndarray, values: np.ndarray | None = None) -> float:
    """The share of audits, over seeds, that refuse a reported KL."""
    evaluator, activations, honest, _ = noisy
    values = honest if values is None else values
    found = [audit(evaluator, activations, values, kl, s, sequences=SEQUENCES, draws=DRAWS) for s in SEEDS]
    return float(np.mean([not c.agrees for c in found]))


def test_wrong_residuals_are_refuted(noisy: Noisy) -> None:
    """Half of it, clipped, of a better explanation, of the same one sharpened: refused every time; the truth, never."""
    evaluator, activations, values, kl = noisy
    better = (activations.outputs + 0.5 * (values - activations.outputs)).astype(np.float32)
    assert 0.02 < kl.mean() < 1.0
    assert refuted(noisy, kl) == 0.0
    assert refuted(noisy, 0.5 * kl) == 1.0
    assert refuted(noisy, 1.5 * kl) == 1.0
    assert refuted(noisy, np.minimum(kl, np.median(kl))) == 1.0
    assert refuted(noisy, kl_bits(evaluator, activations, better)) == 1.0


def test_sharpened_predictions_are_refuted(tiny_model: Model, tiny_data: Dataset) -> None:
    """M_E's distribution cubed flatters an argmax; its samples cost what its KL really is, not what it was before."""
    task = build_task(tiny_model, "model", tiny_data, lambda *_: None)
    evaluator, activations = evaluator_for(task.model, task.region), task.held_out
    noise = np.random.default_rng(4).normal(size=activations.outputs.shape)
    values = (activations.outputs + 0.3 * noise).astype(np.float32)
    kl = kl_bits(evaluator, activations, values)
    honest = audit(evaluator, activations, values, kl, 1, sequences=SEQUENCES, draws=DRAWS)
    assert honest.agrees
    sharpened = audit(evaluator, activations, 3 * values, kl, 1, sequences=SEQUENCES, draws=DRAWS)
    assert not sharpened.agrees
    assert sharpened.difference > 2 * kl.mean()
    true = kl_bits(evaluator, activations, 3 * values)
    assert audit(evaluator, activations, 3 * values, true, 1, sequences=SEQUENCES, draws=DRAWS).agrees


def test_the_difference_has_the_kl_for_its_expectation(noisy: Noisy) -> None:
    """Standard normal z over seeds, and a mean within four standard errors of the KL."""
    evaluator, activations, values, kl = noisy
    found = [audit(evaluator, activations, values, kl, s, sequences=SEQUENCES, draws=8) for s in range(64)]
    z = np.array([c.z for c in found])
    print(f"z over {len(z)} seeds: mean {z.mean():.3f}, sd {z.std(ddof=1):.3f}, largest {np.abs(z).max():.2f}")
    assert abs(z.mean()) < 4 / np.sqrt(len(z))
    assert 0.6 < z.std(ddof=1) < 1.4
    differences = np.array([c.difference for c in found])
    error = differences.std(ddof=1) / np.sqrt(len(z))
    assert abs(differences.mean() - kl.mean()) < 4 * error + found[0].tolerance
    for c in found:
        assert c.stderr_by_token == pytest.approx(c.stderr, rel=0.4)
    assert np.mean([c.stderr_by_sequence for c in found]) == pytest.approx(found[0].stderr, rel=0.2)


def test_the_standard_error_is_that_of_the_enumerated_distribution(noisy: Noisy) -> None:
    evaluator, activations, values, kl = noisy
    part = activations.head(3)
    log_p, log_q = (log_softmax(predictions(evaluator, part, v)) for v in (part.outputs, values[:3]))
    variance = 0.0
    for p, q in zip(log_p, log_q, strict=True):
        ratios = [(a - b) / np.log(2) for a, b in zip(p, q, strict=True)]
        mean = sum(np.exp(a) * r for a, r in zip(p, ratios, strict=True))
        variance += sum(np.exp(a) * (r - mean) ** 2 for a, r in zip(p, ratios, strict=True))
    n = part.n_tokens
    found = audit(evaluator, part, values[:3], kl[:n], 2, sequences=3, draws=4)
    assert found.stderr == pytest.approx(np.sqrt(variance / 4) / n, rel=1e-6)


def test_the_tolerance_adds_up(noisy: Noisy) -> None:
    evaluator, activations, values, kl = noisy
    found = audit(evaluator, activations, values, kl, 2, draws=4)
    n = 4 * found.tokens
    floor = TokenCode(VOCABULARY).tolerance_bits + certify_module.STREAM_SPREAD_BITS / n
    assert floor <= found.tolerance < floor + 1e-4
    # Two streams and their marks: what both hold is the tokens' information.
    assert found.model_bits / n < np.log2(VOCABULARY) + 1


def test_the_same_message_gives_the_same_audit(tiny_bench: Bench, table: Attempt) -> None:
    split = tiny_bench.held_out
    first, second = (certify_attempt(tiny_bench, split, table) for _ in range(2))
    assert first == second
    other = replace(table, sections=table.sections)
    assert certify_attempt(tiny_bench, split, other) == first
    nonce = certify_attempt(tiny_bench, split, table, nonce=b"drawn later")
    assert nonce.seed != first.seed
    assert nonce.model_bits != first.model_bits


def test_another_message_gives_other_sequences_and_samples(tiny_bench: Bench, table: Attempt) -> None:
    other = attempt_of(tiny_bench, Nothing(), None)
    found = [certify_attempt(tiny_bench, tiny_bench.held_out, a) for a in (table, other)]
    assert found[0].seed != found[1].seed
    assert found[0].sequences != found[1].sequences
    assert not np.array_equal(_uniform(found[0].seed, 3, 100), _uniform(found[1].seed, 3, 100))


def test_a_sequence_s_draws_do_not_depend_on_its_company(noisy: Noisy) -> None:
    evaluator, activations, values, _ = noisy
    drawn: dict[int, list[np.ndarray]] = {}
    for wanted in (4, SEQUENCES):
        chosen = _choose(9, SEQUENCES, wanted)
        part = activations.some(chosen)
        both = evaluator.reference(part), explained_reference(evaluator, part, values[chosen])
        sent = certify_module._Audit(evaluator, part, *both, chosen, 9, 2).send()
        samples = np.concatenate(sent.samples)
        for sequence, own in zip(chosen, np.split(samples, len(chosen)), strict=True):
            drawn.setdefault(int(sequence), []).append(own)
    twice = [pair for pair in drawn.values() if len(pair) == 2]
    assert len(twice) == 4
    assert all(np.array_equal(a, b) for a, b in twice)


def test_chunks_do_not_show(noisy: Noisy, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator, activations, values, kl = noisy
    whole = audit(evaluator, activations, values, kl, 3)
    monkeypatch.setattr(certify_module, "CHUNK_LOGITS", 160)
    cut = audit(evaluator, activations, values, kl, 3)
    assert cut.stderr == pytest.approx(whole.stderr, rel=1e-9)
    assert cut.stderr_by_token == pytest.approx(whole.stderr_by_token, rel=1e-9)
    assert abs(cut.explained_bits - whole.explained_bits) <= 8


def test_sequences_are_chosen_evenly() -> None:
    counts = np.zeros(20)
    for seed in range(2000):
        chosen = _choose(seed, 20, 5)
        assert len(set(chosen)) == 5
        assert (np.diff(chosen) > 0).all()
        counts[chosen] += 1
    assert np.abs(counts - 500).max() < 4.5 * np.sqrt(2000 * 0.25 * 0.75)
    assert np.array_equal(_choose(3, 4, 9), np.arange(4))


def test_samples_follow_the_distribution() -> None:
    probabilities = np.array([[0.0, 0.5, 0.25, 0.0, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    uniform = _uniform(1, 1, 40_000).reshape(2, -1)
    drawn = _sample(probabilities, uniform)
    counts = np.bincount(drawn[0], minlength=6)
    assert (counts[[0, 3, 5]] == 0).all()
    assert np.abs(counts / 20_000 - probabilities[0]).max() < 4.5 * 0.5 / np.sqrt(20_000)
    assert (drawn[1] == 0).all()
    edges = np.array([[0.0, 1.0 - 2.0**-53]])
    assert _sample(probabilities[:1], edges).tolist() == [[1, 4]]
    assert uniform.min() >= 0
    assert uniform.max() < 1


def test_the_reconstruction_is_what_was_measured(tiny_bench: Bench, nothing_at_one_percent: Solution) -> None:
    attempt = nothing_at_one_percent.attempt
    values = reconstruction(tiny_bench, tiny_bench.held_out, attempt)
    activations = tiny_bench.held_out.activations
    found = kl_bits(tiny_bench.evaluator, activations, values)
    assert np.allclose(found, attempt.damage.kl_bits, rtol=1e-3, atol=1e-5)


def disturb(monkeypatch: pytest.MonkeyPatch, factor: float, after: int) -> None:
    """Predictions that are changed after some calls."""
    inner, calls = Evaluator.logits, []

    def logits(self: Evaluator, activations: Activations, values: np.ndarray) -> np.ndarray:
        calls.append(1)
        found = inner(self, activations, values)
        return found * np.float32(factor) if len(calls) > after else found

    monkeypatch.setattr(Evaluator, "logits", logits)


def test_predictions_that_do_not_repeat_are_an_error(noisy: Noisy, monkeypatch: pytest.MonkeyPatch) -> None:
    disturb(monkeypatch, 1.5, after=2)
    with pytest.raises(CodeError):
        audit(*noisy, 1)


def test_predictions_that_are_not_finite_are_refused(noisy: Noisy, monkeypatch: pytest.MonkeyPatch) -> None:
    disturb(monkeypatch, np.nan, after=0)
    with pytest.raises(DataError, match="NaN or infinite"):
        audit(*noisy, 1)


def test_arguments_that_do_not_fit_are_refused(noisy: Noisy) -> None:
    evaluator, activations, values, kl = noisy
    reference = evaluator.reference(activations)
    with pytest.raises(TaskError, match="of other data"):
        certify(evaluator, activations, reference, reference[1:], kl, 1)
    with pytest.raises(TaskError, match="719 KLs"):
        audit(evaluator, activations, values, kl[1:], 1)
    with pytest.raises(TaskError, match="0 sequences with 32 draws"):
        audit(evaluator, activations, values, kl, 1, sequences=0)


def test_a_certificate_cannot_be_changed(noisy: Noisy) -> None:
    evaluator, activations, values, kl = noisy
    found = audit(evaluator, activations, values, kl, 1, sequences=2, draws=1)
    assert isinstance(found, Certificate)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.kl_bits = 0.0  # type: ignore[misc]
