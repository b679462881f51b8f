"""Training compute recovered: exact on laws, monotone, 1 at the model's own loss; and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from estimators.training_compute import (
    MeasuredCurve,
    ScalingLaw,
    compute_recovered,
    fit_scaling_law,
    training_loss,
)
from mdl.errors import DataError, TaskError
from mdl.score import EMBEDDED, EMBEDDED_TRAINING_TOKENS
from mdl.training import loss_curve, read_loss_curve, scaling_law, training_flops

ROOT = Path(__file__).resolve().parents[2]
LAW = ScalingLaw(1.7, 400.0, 0.2, 1e15)


def write_curve(path: Path, records: list[dict[str, float]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


@pytest.mark.parametrize("fraction", [1e-6, 0.01, 0.1, 0.5, 0.99, 1.0, 3.0])
def test_a_law_gives_back_the_compute_it_was_asked_at(fraction: float) -> None:
    gap = float(LAW.loss(fraction * LAW.flops) - LAW.loss(LAW.flops))
    assert LAW.fraction(gap) == pytest.approx(fraction, rel=1e-9)


def test_a_loss_below_the_laws_floor_takes_more_than_any_compute() -> None:
    assert LAW.fraction(-float(LAW.loss(LAW.flops))) == math.inf


def test_a_measured_curve_gives_back_its_own_law() -> None:
    compute = np.linspace(0.002, 1.0, 2000) * 1e15
    curve = MeasuredCurve.of(compute, LAW.loss(compute), 30.0, 1e15)
    for fraction in (0.01, 0.1, 0.5, 0.9, 1.0):
        gap = float(LAW.loss(fraction * LAW.flops) - LAW.loss(LAW.flops))
        assert curve.fraction(gap) == pytest.approx(fraction, rel=1e-4)


def test_a_noisy_curve_is_monotone_and_ends_at_one() -> None:
    rng = np.random.default_rng(0)
    compute = np.arange(1.0, 101.0)
    loss = 2.0 + 4.0 * compute**-0.5 + 0.1 * rng.normal(size=100)
    curve = MeasuredCurve.of(compute, loss, math.log(2048), 100.0)
    assert np.all(np.diff(curve.loss_nats) < 0)
    assert np.all(np.diff(curve.compute) > 0)
    gaps = np.linspace(0.0, 8.0, 200)
    found = np.array([curve.fraction(float(g)) for g in gaps])
    assert np.all(np.diff(found) <= 0)
    assert found[0] == 1.0
    assert curve.fraction(-0.5) == 1.0  # the curve says nothing beyond the model
    assert found[-1] == 0.0  # worse than knowing nothing
    assert curve.fraction(math.log(2048) - float(curve.loss_nats[-1])) == 0.0


def test_a_law_is_recovered_from_its_points() -> None:
    compute = np.logspace(12, 15, 40)
    found, error = fit_scaling_law(compute, LAW.loss(compute), 1e15)
    assert error < 1e-6
    assert found.irreducible_nats == pytest.approx(1.7, abs=1e-3)
    assert found.coefficient == pytest.approx(400.0, rel=1e-2)
    assert found.exponent == pytest.approx(0.2, rel=1e-3)
    with pytest.raises(DataError, match="from 3 points"):
        fit_scaling_law(compute[:3], LAW.loss(compute[:3]), 1e15)


def test_bits_are_nats_over_ln_two() -> None:
    gap_nats = float(LAW.loss(0.3 * LAW.flops) - LAW.loss(LAW.flops))
    assert compute_recovered(LAW, gap_nats / math.log(2)) == pytest.approx(0.3)


def test_the_embedded_curve_is_the_runs_record() -> None:
    """The shipped points are the log's means of 50 steps, each at the middle of its steps."""
    log = (ROOT / "experiments/embedded_model/loss_curve.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in log]
    points = json.loads((EMBEDDED / "loss_curve.json").read_text())
    ends = np.array([0, *(r["tokens"] for r in records)])
    assert points["compute"] == ((ends[1:] + ends[:-1]) / 2).tolist()
    assert points["loss_nats"] == pytest.approx([r["loss_nats"] for r in records], abs=1e-6)
    assert points["final"] == EMBEDDED_TRAINING_TOKENS == ends[-1]
    curve = training_loss(loss_curve(points, 2048))
    assert curve.fraction(0.0) == 1.0
    shares = [curve.fraction(gap) for gap in (0.05, 0.2, 1.0, 3.0)]
    assert shares == pytest.approx([0.918, 0.759, 0.275, 0.025], abs=1e-3)


@pytest.mark.parametrize("key", ["flops", "tokens", "step"])
@pytest.mark.parametrize("loss", ["loss", "loss_nats"])
def test_a_log_is_read(tmp_path: Path, key: str, loss: str) -> None:
    path = write_curve(tmp_path / "log.jsonl", [{key: 10.0 * i, loss: 5.0 / i, "seconds": 1.0} for i in (1, 2, 4)])
    record = read_loss_curve(path, 100)
    assert record["compute"] == [10.0, 20.0, 40.0]
    assert record["unit"] == key
    assert training_loss(record).fraction(1.25) == pytest.approx(0.5)
    assert training_loss(record).fraction(0.0) == 1.0


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "of 0 points"),
        ([{"step": 1, "loss": 2.0}], "of 1 points"),
        ([{"step": 5, "loss": 2.0}, {"step": 3, "loss": 1.0}], "Was a resumed run's log joined"),
        ([{"step": 0, "loss": 2.0}, {"step": 3, "loss": 1.0}], "compute positive"),
        ([{"step": 1, "loss": math.nan}, {"step": 3, "loss": 1.0}], "losses finite"),
        ([{"step": 1, "loss": 2.0}, {"tokens": 3, "loss": 1.0}], "is no loss curve"),
        ([{"step": 1, "accuracy": 2.0}], "is no loss curve"),
        ([{"step": "one", "loss": 2.0}], "is no loss curve"),
    ],
)
def test_what_is_no_curve_is_refused(tmp_path: Path, records: list[dict[str, float]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_loss_curve(write_curve(tmp_path / "log.jsonl", records), 100)


def test_a_file_that_is_no_log_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("not json")
    for path in (tmp_path / "x", tmp_path / "absent"):
        with pytest.raises(DataError, match="is no loss curve"):
            read_loss_curve(path, 100)


def test_a_law_needs_the_models_compute() -> None:
    known = scaling_law([1.7, 400.0, 0.2], training_flops(1e6, 2e7))
    assert known["flops"] == 6 * 2e13
    assert scaling_law([1.7, 400.0, 0.2, 1e15], 3.0)["flops"] == 1e15  # said, so it counts
    assert training_loss(scaling_law([1.7, 400.0, 0.2, 1e15], None)) == LAW
    with pytest.raises(TaskError, match="needs the model's training compute"):
        scaling_law([1.7, 400.0, 0.2], None)


@pytest.mark.parametrize("numbers", [[1.7, -4.0, 0.2, 1e9], [1.0, 1.0, 0.0, 1e9], [-1.0, 1.0, 0.1, 1e9], [1.0, 2.0]])
def test_what_is_no_law_is_refused(numbers: list[float]) -> None:
    with pytest.raises(TaskError, match="it is E,A,alpha or E,A,alpha,C"):
        scaling_law(numbers, None)
