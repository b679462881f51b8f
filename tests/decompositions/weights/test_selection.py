"""The sender's choice of components, against the best of all subsets where there are few enough to try."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from decompositions.weights.components import Components
from decompositions.weights.gated import GatedDecoder
from decompositions.weights.selection import ROWS, Selector
from decompositions.weights.truths import gated_truth
from mdl.models.toys.superposition import Superposition
from mdl.protocols import Settings
from mdl.receiver import decoder_of
from mdl.task import Task
from tests.decompositions.weights.cases import (
    gated,
    pentagon,
    random_factors,
    settings_of,
    state_of,
    superposition,
    task_of,
)

SUBSETS = np.array(list(product([False, True], repeat=4)))


@pytest.fixture(scope="module")
def toy() -> Task:
    return task_of(gated())


def bits_of(
    decoder: GatedDecoder, task: Task, masks: np.ndarray, root: np.ndarray, step: float | None, prices: np.ndarray
) -> np.ndarray:
    """J of each token [n], in numpy: as `decompositions.weights.selection` has it."""
    error = decoder.predict(task.fit.inputs, state_of(masks)).astype(np.float64) - task.fit.outputs
    squares = np.square(error @ root.T / (step or 1.0))
    left = squares / (2 * np.log(2)) if step is None else 0.5 * np.log2(1 + squares)
    return np.asarray(masks @ prices + left.sum(1))


def choices(
    decoder: GatedDecoder, task: Task, root: np.ndarray, step: float | None, prices: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bits of the sender's choice and of the best of all subsets, [n], and the choice itself."""
    network, inputs = task.fit.inputs.network, task.fit.inputs
    assert network is not None
    selector = Selector(network, *decoder.weights(network), root, step, prices)
    chosen = selector.choose(inputs, task.fit.outputs)
    every = [np.broadcast_to(s, (inputs.n_tokens, 4)) for s in SUBSETS]
    best = np.min([bits_of(decoder, task, m, root, step, prices) for m in every], 0)
    return bits_of(decoder, task, chosen, root, step, prices), best, chosen


@pytest.mark.parametrize("step", [0.02, 0.3, None])
def test_of_gated_functions_it_is_the_best_of_all_subsets(toy: Task, step: float | None) -> None:
    model = gated()
    truth = gated_truth(model.network, model.weights)
    explanation = Components(object=truth.factors).fit(toy)
    decoder = decoder_of(explanation.section(settings_of(explanation, toy, 1e-3)))
    assert isinstance(decoder, GatedDecoder)
    prices = np.array([1.0, 2.0, 1.5, 0.5])
    root = np.eye(1) / (0.05 if step is None else 1.0)
    found, best, chosen = choices(decoder, toy, root, step, prices)
    assert (found >= best - 1e-4).all()
    assert (found <= best + 0.01).mean() > 0.98
    if step == 0.02:  # where an error is dear: the functions whose control bits are on
        wanted = toy.fit.inputs.scored_values()[:, 1:] > 0
        assert (chosen == wanted).mean() > 0.95
        assert not (chosen & ~wanted).any()


@pytest.mark.parametrize("step", [0.05, None])
def test_of_components_that_overlap_it_is_never_better_and_usually_equal(step: float | None) -> None:
    task, network = task_of(superposition(200)), Superposition(5, 2)
    factors = random_factors(network, {"W": [0, 1, 2, 3]}, seed=5)
    explanation = Components(object=factors, leftover="send").fit(task)
    decoder = decoder_of(explanation.section(settings_of(explanation, task, 1e-3)))
    assert isinstance(decoder, GatedDecoder)
    root = np.eye(5) / (0.05 if step is None else 1.0)
    found, best, chosen = choices(decoder, task, root, step, np.full(4, 0.7))
    assert (found >= best - 1e-3).all()
    assert (found <= best + 0.01).mean() > 0.8
    assert found.mean() < 1.1 * best.mean()
    for whole in (np.zeros_like(chosen), np.ones_like(chosen)):
        assert found.mean() < bits_of(decoder, task, whole, root, step, np.full(4, 0.7)).mean()


def test_dear_components_are_left_off_and_free_ones_that_help_are_on(toy: Task) -> None:
    model = gated()
    factors = gated_truth(model.network, model.weights).factors
    explanation = Components(object=factors).fit(toy)
    decoder = decoder_of(explanation.section(settings_of(explanation, toy, 1e-3)))
    assert isinstance(decoder, GatedDecoder)
    network, sample = toy.fit.inputs.network, toy.fit
    assert network is not None
    chosen = {}
    for price in (0.0, 1e6):
        selector = Selector(network, *decoder.weights(network), np.eye(1), 0.01, np.full(4, price))
        chosen[price] = selector.choose(sample.inputs, sample.outputs)
    assert not chosen[1e6].any()
    needed = sample.inputs.scored_values()[:, 1:] > 0
    assert (chosen[0.0] | ~needed).mean() > 0.97


def test_tokens_are_chosen_for_one_by_one_however_many_there_are() -> None:
    """More than fit one call: the first come out as they do by themselves."""
    assert ROWS < 700
    task, factors = task_of(superposition(1200, 0.3)), random_factors(Superposition(5, 2), {"W": [0, 1, 2]}, seed=2)
    explanation = Components(object=factors, leftover="send").fit(task)
    decoder = decoder_of(explanation.section(settings_of(explanation, task, 1e-3)))
    assert isinstance(decoder, GatedDecoder)
    network, sample = Superposition(5, 2), task.fit
    assert sample.inputs.n_tokens > ROWS
    selector = Selector(network, *decoder.weights(network), np.eye(5), 0.1, np.full(3, 0.5))
    whole = selector.choose(sample.inputs, sample.outputs)
    assert whole.shape == (sample.inputs.n_tokens, 3)
    rows = slice(ROWS - 5, ROWS + 5)
    assert sample.inputs.values is not None
    some = type(sample.inputs)(
        sample.inputs.tokens[rows], sample.inputs.scored[rows], sample.inputs.values[rows], network
    )
    np.testing.assert_array_equal(selector.choose(some, sample.outputs[rows]), whole[rows])
    assert 0 < whole.mean() < 1


def test_the_sender_chooses_by_what_it_pays(toy: Task) -> None:
    """More effort: components stay on for errors that would otherwise be left to the residual coder."""
    model = gated()
    explanation = Components(object=gated_truth(model.network, model.weights).factors).fit(toy)
    on = []
    for effort in (8.0, 1.0):
        settings = settings_of(explanation, toy, 0.5, effort=effort)
        decoder = decoder_of(explanation.section(settings))
        on.append(explanation.encode(decoder, toy.fit, settings).touched().nnz)
    assert on[0] >= on[1] > 0
    alone = Settings(1e3, 0.5, np.eye(1) / 0.2, {"static": 1.0, "effort": 8.0}, corrected=False)
    decoder = decoder_of(explanation.section(alone))
    chosen = explanation.encode(decoder, toy.fit, alone)
    prices = explanation._packing(alone).prices(alone, explanation.section(alone))
    found = bits_of(decoder, toy, chosen.touched().toarray(), alone.root, None, prices)
    for subset in SUBSETS:
        assert (
            found.mean()
            <= bits_of(decoder, toy, np.broadcast_to(subset, (len(found), 4)), alone.root, None, prices).mean()
        )


def test_a_superpositions_truth_is_chosen() -> None:
    """At a fine step the component of a feature is on where the feature is, if it alone answers."""
    task, rows = task_of(superposition(200)), pentagon()["W"]
    factors = random_factors(Superposition(5, 2), {"W": np.arange(5)})
    tensor = factors.tensors["W"]
    tensor.inputs[:], tensor.outputs[:] = np.eye(5), rows
    explanation = Components(object=factors, exact=True).fit(task)
    settings = settings_of(explanation, task, 0.05, effort=8.0)
    decoder = decoder_of(explanation.section(settings))
    on = explanation.encode(decoder, task.fit, settings).touched().toarray()
    features = task.fit.inputs.scored_values()
    strong = features > 0.6
    assert on[strong].mean() > 0.95
    assert on[features == 0].mean() < 0.1
