"""PCA of any rank as a base under the standard coder: the yardstick must come out the same."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from decompositions.baselines import Nothing
from decompositions.pca import PCA, PCAExplanation
from estimators.fidelity import Attempt, Bench, Coding
from estimators.solver import Solution, Solver
from mdl.errors import ExplanationError
from mdl.message import decode_message, encode_message
from mdl.protocols import Settings
from mdl.task import Task
from mdl.transform_coding import ComponentsDecoder

HORIZON = 1e6
FULL = 16


@pytest.fixture(scope="module")
def wide_bench(task_of_sizes: Callable[..., Task]) -> Bench:
    """Enough tokens that learning tables and sampling noise are small beside one per cent."""
    return Bench(task_of_sizes(400, 200, 300), HORIZON)


def at_step(bench: Bench, decomposition: Nothing | PCA, step: float) -> Attempt:
    """Held-out data, coded with the Fisher metric at a step."""
    explanation = decomposition.fit(bench.task.for_fitting())
    knobs = {name: grid[len(grid) // 2] for name, grid in explanation.knobs.items()}
    metric = bench.metrics[0]
    settings = Settings(bench.horizon, step, metric.root, knobs)
    coding = Coding.prepare(bench, explanation, metric, settings, step, bench.examples)
    return coding.attempt(bench, bench.held_out)


@pytest.mark.parametrize("step", [0.06, 0.125, 0.25])
def test_any_rank_costs_what_the_yardstick_costs(wide_bench: Bench, step: float) -> None:
    """At equal distortion in the metric, within 1 %. The middle step is about that of the 1 % fidelity."""
    yardstick = at_step(wide_bench, Nothing(), step)
    total = yardstick.total
    for rank in (0, 4, 8, FULL):
        found = at_step(wide_bench, PCA(rank), step)
        # Distortion is worth half a bit an axis and octave.
        corrected = found.total + FULL / 2 * math.log2(found.distortion / yardstick.distortion)
        # Two empty part arrays more are all that rank 0 adds: some 32 bits at a horizon of a million tokens.
        assert corrected == pytest.approx(total, abs=1e-4 if rank == 0 else 0.01 * total)


def total_at(solution: Solution, eps: float) -> float:
    """Bits a token at the horizon, brought to exactly eps along the rate curve."""
    attempt = solution.attempt
    return attempt.total + solution.slope * math.log(attempt.kl / eps)


def test_the_solver_agrees(tiny_bench: Bench, tiny_task: Task, nothing_at_one_percent: Solution) -> None:
    """With 720 held-out tokens the KL of one quantisation is known to some 5 %: 0.6 bits of 39, hence the 3 %."""
    eps = 0.01 * tiny_bench.null_kl
    found = Solver(tiny_bench, PCA(FULL).fit(tiny_task.for_fitting())).solve(eps)
    assert total_at(found, eps) == pytest.approx(total_at(nothing_at_one_percent, eps), rel=0.03)


@pytest.mark.slow
def test_the_solver_agrees_within_two_per_cent_on_more_data(task_of_sizes: Callable[..., Task]) -> None:
    """At equal *measured* KL. Of 30,000 tokens, KL over distortion still moves by 2 % (standard deviation) from one
    realisation of the quantisation to another, with 11.5 bits per unit of ln KL: 0.6 % of the total for either side.
    """
    bench = Bench(task_of_sizes(600, 600, 2000), HORIZON)
    task, eps = bench.task.for_fitting(), 0.01 * bench.null_kl
    yardstick = total_at(Solver(bench, Nothing().fit(task)).solve(eps), eps)
    for rank in (4, 8, FULL):
        assert total_at(Solver(bench, PCA(rank).fit(task)).solve(eps), eps) == pytest.approx(yardstick, rel=0.02)


def test_full_rank_leaves_next_to_nothing_for_the_residual_coder(wide_bench: Bench) -> None:
    attempt = at_step(wide_bench, PCA(FULL), 0.125)
    n = attempt.state.n_tokens
    assert attempt.residual.length().total / n < 0.02 * attempt.state.length().total / n


def test_components_are_those_of_the_data(tiny_task: Task) -> None:
    """Without quantisation in the way: the best rank-4 approximation, as a singular value decomposition finds it."""
    outputs = tiny_task.fit.outputs.astype(np.float64)
    explanation = PCA(4).fit(tiny_task.for_fitting())
    assert isinstance(explanation, PCAExplanation)
    assert explanation.name == "pca-4"
    settings = Settings(1e15, 1e-3, np.eye(FULL))
    decoder = ComponentsDecoder.from_section(decode_message(encode_message([explanation.section(settings)]).data)[0])
    state = explanation.encode(decoder, tiny_task.fit, settings)
    predicted = decoder.predict(tiny_task.fit.inputs, state)
    centred = outputs - outputs.mean(0)
    u, s, v = np.linalg.svd(centred, full_matrices=False)
    best = outputs.mean(0) + (u[:, :4] * s[:4]) @ v[:4]
    assert np.allclose(predicted, best, atol=5e-3)


@pytest.mark.parametrize("rank", [-1, FULL + 1])
def test_ranks_that_do_not_exist_are_refused(rank: int, tiny_task: Task) -> None:
    with pytest.raises(ExplanationError, match=rf"rank {rank} is outside 0 to 16, the width of blocks\.1"):
        PCA(rank).fit(tiny_task.for_fitting())
