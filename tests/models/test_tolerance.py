"""Rows at a stated tolerance: Gaussian noise of their own variance, by which there is a behaviour too."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from estimators.fidelity import Bench
from mdl.data import from_rows
from mdl.errors import ModelError, TaskError
from mdl.models import Vectors
from mdl.models.toys.modular import ModularAddition, modular_inputs
from mdl.models.toys.superposition import Superposition, superposition_inputs
from mdl.score import check_phenomena
from mdl.task import build_task

WEIGHTS = {"W": np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.5]]), "b": np.full(3, -0.1)}


def toy() -> Vectors:
    network = Superposition(3, 2)
    return Vectors.computed(network, WEIGHTS, superposition_inputs(network, 300, 0, 0.3), "toy")


def sums() -> Vectors:
    network = ModularAddition(5, 4)
    weights = {name: np.ones(shape) for name, shape in network.matrices.items()}
    return Vectors.computed(network, weights, modular_inputs(network), "sums", "categorical")


def test_the_noise_is_a_share_of_all_variance() -> None:
    rows, noisy = toy(), toy().tolerating(0.04)
    assert rows.noise is None
    assert noisy.noise == pytest.approx(0.2 * math.sqrt(rows.rows.var(0).sum()), rel=1e-5)
    np.testing.assert_array_equal(noisy.rows, rows.rows)
    assert noisy.network == rows.network
    assert Vectors.of(rows.rows).tolerating(0.04).noise == pytest.approx(noisy.noise)


def test_rows_at_another_tolerance_are_another_model() -> None:
    """Else totals under behaviour that mean different things would stand in one table."""
    prints = {model.fingerprint for model in (toy(), toy().tolerating(0.01), toy().tolerating(0.02))}
    assert len(prints) == 3
    assert toy().tolerating(0.01).fingerprint == toy().tolerating(0.01).fingerprint


def test_what_behaves() -> None:
    assert not toy().behaves
    assert toy().tolerating(0.01).behaves
    assert sums().behaves
    assert check_phenomena(toy(), "vectors", None, None)[0] == ["activations"]
    for model in (toy().tolerating(0.01), sums()):
        assert check_phenomena(model, "vectors", None, None)[0] == ["activations", "behaviour"]
    with pytest.raises(TaskError, match=r"no behaviour without a tolerance"):
        check_phenomena(toy(), "vectors", ["behaviour"], None)


@pytest.mark.parametrize("tolerance", [0.0, -0.1, math.nan])
def test_a_tolerance_is_above_zero(tolerance: float) -> None:
    with pytest.raises(ModelError, match="give one above 0"):
        toy().tolerating(tolerance)


def test_labels_have_no_tolerance() -> None:
    with pytest.raises(ModelError, match="for categorical outputs"):
        sums().tolerating(0.1)


def test_the_mean_leaves_half_a_nat_over_the_tolerance() -> None:
    """1 / (2 tolerance ln 2) bits a row, and fidelities are shares of variance as without noise."""
    model = toy().tolerating(0.01)
    task = build_task(model, "vectors", from_rows(model.first_equal, None, 0, "toy"), lambda *_: None)
    bench = Bench(task, 1e4)
    assert bench.null_kl == pytest.approx(1 / (2 * 0.01 * math.log(2)), rel=0.4)  # on other rows
    outputs, error = bench.held_out.sample.outputs, np.array([0.3, -0.2, 0.1])
    damage = bench.measure(bench.held_out, outputs + error, np.zeros((0, 3)))
    assert model.noise is not None
    wanted = np.square(error).sum() / (2 * model.noise**2 * math.log(2))
    np.testing.assert_allclose(damage.kl_bits, wanted, rtol=1e-4)
    (metric,) = bench.metrics
    assert metric.distortion(error[None]) / 2 == pytest.approx(wanted * math.log(2), rel=1e-5)
    plain = Bench(build_task(toy(), "vectors", from_rows(toy().first_equal, None, 0, "toy"), lambda *_: None), 1e4)
    assert plain.null_kl / bench.null_kl == pytest.approx(model.noise**2, rel=1e-5)


@pytest.mark.parametrize("noise", [None, 0.05])
def test_saved_and_read_back(noise: float | None, tmp_path: Path) -> None:
    model = toy() if noise is None else toy().tolerating(noise)
    model.save(tmp_path / "toy")
    assert json.loads((tmp_path / "toy" / "network.json").read_text())["noise"] == model.noise
    found = Vectors.load(tmp_path / "toy")
    assert found.noise == model.noise
    assert found.behaves == model.behaves
    assert found.fingerprint == model.fingerprint
    np.testing.assert_array_equal(found.rows, model.rows)


def test_a_folder_without_its_noise_is_refused(tmp_path: Path) -> None:
    toy().save(tmp_path / "toy")
    path = tmp_path / "toy" / "network.json"
    known = json.loads(path.read_text())
    del known["noise"]
    path.write_text(json.dumps(known))
    with pytest.raises(ModelError, match="holds no network"):
        Vectors.load(tmp_path / "toy")
