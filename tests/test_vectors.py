"""Rows of numbers at a tolerance: the same solver, codes and ledger, under a Gaussian output."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from decompositions.baselines import Affine, TokenTable
from decompositions.pca import PCA
from estimators.fidelity import Bench
from estimators.gaussian_kernels import GaussianEvaluator
from estimators.kernels import evaluator_for
from estimators.solver import KL_PROMISE
from mdl.data import from_rows
from mdl.errors import DataError, ExplanationError, MDLError, ModelError, TaskError
from mdl.models import Vectors, load_model
from mdl.protocols import Settings
from mdl.receiver import decoder_of
from mdl.score import compare, default_explanations
from mdl.task import Region, Task, build_task, parse_region
from mdl.verify import verify

ROWS, WIDTH = 600, 6


def clustered(rows: int = ROWS, seed: int = 0) -> np.ndarray:
    """Rows around 4 centres: what clusters explain and principal axes do not."""
    rng = np.random.default_rng(seed)
    centres = 8.0 * rng.standard_normal((4, WIDTH))
    return centres[rng.integers(4, size=rows)] + rng.standard_normal((rows, WIDTH))


@pytest.fixture(scope="module")
def vectors() -> Vectors:
    return Vectors.of(clustered(), "clustered")


@pytest.fixture(scope="module")
def task(vectors: Vectors) -> Task:
    return build_task(vectors, "vectors", from_rows(vectors.first_equal, None, 0, "clustered"), lambda *_: None)


def test_the_region_and_its_refusals(vectors: Vectors) -> None:
    assert parse_region(" vectors ", vectors) == Region("vectors", "nothing", "vectors")
    with pytest.raises(TaskError, match="their region is 'vectors'"):
        parse_region("upstream of blocks.0.hook_resid_pre", vectors)
    assert "token-table" not in default_explanations(vectors, "vectors")


def test_every_row_is_a_sequence_of_one_position(task: Task) -> None:
    assert task.held_out is not None
    splits = (task.fit_activations, task.tune_activations, task.held_out)
    assert [len(s.tokens) for s in splits] == [360, 90, 150]
    assert all(s.tokens.shape[1] == 1 and not s.tokens.any() and s.scored.all() for s in splits)
    every = np.concatenate([s.outputs[:, 0] for s in splits])
    assert np.array_equal(np.unique(every, axis=0), np.unique(task.model.rows, axis=0))


def test_kl_is_half_the_squared_error_in_nats(task: Task) -> None:
    """N(x, 1) against N(x + e, 1), by numerical integration: e^2 / 2 nats a dimension."""
    bench, error = Bench(task, 1e6), np.array([0.3, -2.0, 0.0, 1.0, 0.5, -0.1])
    damage = bench.measure(bench.held_out, bench.held_out.sample.outputs + error, np.zeros((0, WIDTH)))
    y = np.linspace(-12, 12, 200_001)
    density = np.exp(-(y**2) / 2) / math.sqrt(2 * math.pi)
    nats = sum(float(np.trapezoid(density * ((y - e) ** 2 - y**2) / 2, y)) for e in error)
    assert np.allclose(damage.kl_bits, nats / math.log(2), rtol=1e-5)
    assert np.isnan(damage.loss_bits).all()


def test_the_metric_is_the_fisher_metric(task: Task) -> None:
    """e^T G e / 2 is the KL in nats, exactly, and the gradients' second moments are G."""
    bench, error = Bench(task, 1e6), np.full((1, WIDTH), 0.7)
    outputs = bench.held_out.sample.outputs
    damage = bench.measure(bench.held_out, outputs + error, np.zeros((0, WIDTH)))
    (metric,) = bench.metrics
    assert math.isclose(metric.distortion(error) / 2, damage.kl_bits.mean() * math.log(2), rel_tol=1e-5)
    gradients = bench.evaluator.score_gradients(task.fit_activations, 0)
    assert np.allclose(gradients.T @ gradients / len(gradients), np.eye(WIDTH), atol=6 / math.sqrt(len(gradients)))


def test_a_fidelity_is_the_share_of_variance_unexplained(task: Task) -> None:
    bench = Bench(task, 1e6)
    outputs, mean = bench.held_out.sample.outputs, task.fit.outputs.mean(0, dtype=np.float64)
    assert math.isclose(bench.null_kl, np.square(outputs - mean).sum(1).mean() / 2 / math.log(2), rel_tol=1e-6)


def test_scale_changes_no_bit_of_the_streams(in_little_time: None) -> None:
    """sigma cancels: rows in another unit (a power of two, so that rounding is the same) cost the same."""
    units = [Vectors.of(scale * clustered(), "rows") for scale in (1, 8)]
    ones, eights = (compare(rows, explanations=["nothing"], fidelities=[0.01]) for rows in units)
    assert ones.scores[0].rate == eights.scores[0].rate
    assert math.isclose(eights.task["null_kl_bits"], 64 * ones.task["null_kl_bits"], rel_tol=1e-6)


def test_the_families_work_unchanged_and_are_verified(tmp_path: Path, in_little_time: None) -> None:
    np.save(tmp_path / "clustered.npy", clustered())
    texts = ["pca:rank=2", "clusters:k=4", "random-dictionary:features=16,k=2"]
    card = compare(str(tmp_path / "clustered.npy"), explanations=texts, fidelities=[0.01], out=tmp_path / "run")
    by_name = {s.explanation: s for s in card.scores}
    assert len(by_name) == 4
    for score in card.scores:
        assert abs(score.kl_bits / (0.01 * card.task["null_kl_bits"]) - 1) < KL_PROMISE
        assert score.obtained == "coded"
        assert {"ce_recovered", "loss_increase_bits", "flops_ratio"}.isdisjoint(score.beside)
        assert any("no next token" in note for note in score.notes)
    nothing, clusters = by_name["nothing"], by_name["clusters-4"]
    assert clusters.rate < nothing.rate - 2  # 4 centres far apart: 2 bits name one
    assert math.isclose(by_name["pca-2"].rate, nothing.rate, rel_tol=0.05)
    verification = verify(tmp_path / "run")
    assert verification.agrees
    assert {f.score for f in verification.findings} >= {"nothing @ 1 %", "clusters-4 @ 1 %"}


def test_high_rate_gaussian_rows_cost_what_theory_says(in_little_time: None) -> None:
    """d/2 log2(1 / D) bits by rate-distortion, and 1/2 log2(2 pi e / 12) more a dimension for a uniform quantiser."""
    rows = np.random.default_rng(3).standard_normal((4000, 4))
    (score,) = compare(Vectors.of(rows, "normal"), explanations=["nothing"], fidelities=[0.001]).scores
    theory = 4 * (0.5 * math.log2(1 / 0.001) + 0.5 * math.log2(2 * math.pi * math.e / 12))
    assert score.rate - score.beside["learning_bits"] == pytest.approx(theory, rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"phenomena": ["behaviour"]}, "no behaviour"),
        ({"explanations": ["token-table"]}, "no token ids"),
        ({"explanations": ["affine"]}, "nothing enters"),
        ({"region": "model"}, "their region is 'vectors'"),
        ({"context": 16}, "their own data"),
        ({"text": Path("x.txt")}, "their own data"),
        ({"explanations": ["pca:rank=7"]}, "outside 0 to 6"),
    ],
)
def test_what_makes_no_sense_is_refused(vectors: Vectors, arguments: dict, message: str) -> None:
    with pytest.raises(MDLError, match=message):
        compare(vectors, **arguments)


@pytest.mark.parametrize("decomposition", [TokenTable(), Affine()])
def test_so_it_is_by_fit(task: Task, decomposition: TokenTable | Affine) -> None:
    with pytest.raises(ExplanationError):
        decomposition.fit(task.for_fitting())


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 2, 2)), "Flatten images"),
        (np.zeros((0, 4)), "shape \\(0, 4\\)"),
        (np.array([["a"]]), "expected rows of numbers"),
        (np.array([[1.0, np.nan]]), "1 of 2 numbers are NaN"),
        (np.array([[1e300]]), "NaN or infinite in float32"),
    ],
)
def test_bad_rows_are_refused(array: np.ndarray, message: str) -> None:
    with pytest.raises(ModelError, match=message), np.errstate(over="ignore"):
        Vectors.of(array)


def test_files_that_hold_no_rows(tmp_path: Path) -> None:
    (tmp_path / "bad.npy").write_bytes(b"no array")
    with pytest.raises(ModelError, match="not a readable"):
        load_model(tmp_path / "bad.npy")
    np.savez(tmp_path / "two.npz", a=np.zeros(3))
    (tmp_path / "two.npz").rename(tmp_path / "two.npy")
    with pytest.raises(ModelError, match="archive"):
        load_model(tmp_path / "two.npy")


def test_equal_rows_do_not_stand_on_both_sides() -> None:
    rows = clustered(100)
    doubled = Vectors.of(np.concatenate([rows, rows]), "doubled")
    data = from_rows(doubled.first_equal, None, 0, "doubled")
    assert data.description["duplicates_dropped"] == 100
    assert sum(len(s) for _, s, _, _ in data.splits()) == 100
    by_hand = from_rows(np.arange(200, dtype=np.int32), None, 0, "by hand")
    with pytest.raises(DataError, match="duplicates"):
        build_task(doubled, "vectors", by_hand, lambda *_: None)


def test_rows_cannot_be_written_into(vectors: Vectors) -> None:
    with pytest.raises(ValueError, match="read-only"):
        vectors.rows[0] = 0


def test_a_receiver_holds_no_row(task: Task) -> None:
    outside = Vectors.outside(WIDTH)
    assert outside.rows.size == 0
    evaluator = evaluator_for(outside, task.region)
    assert isinstance(evaluator, GaussianEvaluator)
    with pytest.raises(TaskError, match="no logits"):
        evaluator.logits(task.fit_activations, task.fit_activations.outputs)


def test_pca_sees_the_rows(task: Task) -> None:
    """The explanation's section decodes to the mean and the first axis of the fit rows."""
    explanation = PCA(1).fit(task.for_fitting())
    settings = Settings(1e9, 0.01, np.eye(WIDTH))
    decoder = decoder_of(explanation.section(settings))
    state = explanation.encode(decoder, task.fit, settings)
    centred = task.fit.outputs - task.fit.outputs.mean(0)
    left = np.square(task.fit.outputs - decoder.predict(task.fit.inputs, state)).sum()
    singular = np.linalg.svd(centred, compute_uv=False)
    assert left == pytest.approx(np.square(singular[1:]).sum(), rel=1e-3)
