"""The cases of experiments/learning_coefficient: weights at a minimum, coefficients as they are printed."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from estimators.learning_coefficient import Langevin
from experiments.learning_coefficient.cases import Case, all_cases, monomial, reduced_rank
from experiments.learning_coefficient.run import HERE, measure

PRINTED = json.loads((Path(HERE) / "expected.json").read_text())["reduced_rank"]


@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
def test_weights_are_at_a_minimum(case: Case) -> None:
    gradient = jax.grad(case.loss)(case.params, case.data)
    assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) < 1e-5


@pytest.mark.parametrize("sizes", [key for key in PRINTED if key != "source"])
def test_coefficients_are_the_printed_ones(sizes: str) -> None:
    m, n, h, r = map(int, sizes.split(","))
    assert reduced_rank(m, n, h, r).exact == PRINTED[sizes][0]
    assert 1 + (m + n + h + r) % 2 == PRINTED[sizes][1] or m + r > n + h


def test_measure_takes_any_loss() -> None:
    case = monomial(1)
    sampler = Langevin(1e-5, 1.0, draws=4000, burn_in=1000, chains=8)
    found = measure(case.loss, case.params, case.data, case.n, beta=case.beta, sampler=sampler)
    assert case.integral is not None
    assert abs(found.value - case.integral(sampler)) < 5 * found.stderr
    assert found.sampler == sampler
