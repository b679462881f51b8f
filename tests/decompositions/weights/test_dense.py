"""Weights, low-rank weights and fewer neurons, through their messages; and the messages that a decoder refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from decompositions.weights.curvature import MeasuredCurvature, square_root
from decompositions.weights.dense import WeightsDecoder, evaluate
from decompositions.weights.yardsticks import KEPT_SHARES, RANK_SHARES, LowRank, Neurons, Weights
from estimators.conduct import check_decoder
from mdl.alphabets import NoAlphabet
from mdl.data import Dataset
from mdl.errors import ExplanationError, MessageError, TaskError
from mdl.message import QuantisedArray, Section, encode_message
from mdl.models import Vectors
from mdl.models.model import Model
from mdl.models.operators import Chain
from mdl.plugins import make_decomposition
from mdl.protocols import Decoder, Explanation, Inputs
from mdl.receiver import decoder_of
from mdl.state import NoState
from mdl.task import Task, build_task
from tests.decompositions.weights.cases import (
    Linear,
    closest,
    gated,
    no_progress,
    random_inputs,
    received,
    settings_of,
    superposition,
    task_of,
)

REGIONS = ("blocks.0.mlp", "blocks.0.attn", "upstream of blocks.1.hook_resid_pre")


@pytest.fixture(scope="module")
def toy() -> Task:
    return task_of(gated())


@pytest.fixture(scope="module")
def tied() -> Task:
    return task_of(superposition())


@pytest.fixture(scope="module", params=REGIONS)
def region(request: pytest.FixtureRequest, tiny_model: Model, tiny_data: Dataset) -> Task:
    return build_task(tiny_model, request.param, tiny_data, no_progress).for_fitting()


@pytest.mark.parametrize("decomposition", [Weights(), Weights("nearest"), LowRank(), Neurons()], ids=str)
def test_at_fine_steps_they_are_the_networks_own(decomposition, toy: Task) -> None:
    explanation = decomposition.fit(toy)
    assert isinstance(explanation, Explanation)
    decoder, state, found = received(explanation, toy, settings_of(explanation, toy, 1e-4))
    assert isinstance(decoder, Decoder)
    assert isinstance(decoder.alphabet, NoAlphabet)
    assert state == NoState(toy.fit.inputs.n_tokens)
    assert decoder.touched(toy.fit.inputs, state) is None
    assert closest(found, toy.fit.outputs) < 2e-3


def test_so_they_are_of_a_matrix_used_twice(tied: Task) -> None:
    for decomposition in (Weights(), LowRank()):
        explanation = decomposition.fit(tied)
        found = received(explanation, tied, settings_of(explanation, tied, 1e-4))[2]
        assert closest(found, tied.fit.outputs) < 2e-3
    with pytest.raises(ExplanationError, match="the region 'vectors' has none"):
        Neurons().fit(tied)


def test_so_they_are_in_a_transformer(region: Task) -> None:
    decompositions = [Weights(), LowRank()] + [Neurons()] * ("attn" not in region.region.name)
    for decomposition in decompositions:
        explanation = decomposition.fit(region)
        found = received(explanation, region, settings_of(explanation, region, 1e-3))[2]
        assert closest(found, region.fit.outputs) < 0.02, explanation.name


def test_coarser_steps_cost_fewer_bits_and_more_error(toy: Task) -> None:
    explanation = Weights().fit(toy)
    sizes, errors = [], []
    for step in (0.01, 0.1, 1.0):
        settings = settings_of(explanation, toy, step)
        sizes.append(encode_message([explanation.section(settings)]).whole_bits)
        errors.append(float(np.square(received(explanation, toy, settings)[2] - toy.fit.outputs).mean()))
    assert sizes[0] > sizes[1] > sizes[2]
    assert errors[0] < errors[1] < errors[2]
    coarse = settings_of(explanation, toy, 0.1, static=4.0)
    assert encode_message([explanation.section(coarse)]).whole_bits < sizes[1]


@pytest.mark.parametrize("whiten", ["both", "inputs", "no"])
def test_rank_r_is_the_truncated_whitened_svd(whiten: str, toy: Task) -> None:
    source, rank = MeasuredCurvature.of(toy), 2
    explanation = LowRank(rank, whiten).fit(toy)
    assert explanation.name.startswith("rank 2 weights")
    assert "rank" not in explanation.knobs
    settings = settings_of(explanation, toy, 1e-4)
    sent = decoder_of(explanation.section(settings)).weights(source.network)
    for name, curvature in source.under(np.eye(toy.width)).matrices.items():
        matrix = source.weights[name].astype(np.float64)
        left = np.eye(len(matrix)) if whiten == "no" else square_root(curvature.inputs)
        right = square_root(curvature.outputs) if whiten == "both" else np.eye(matrix.shape[1])
        u, values, v = np.linalg.svd(left @ matrix @ right)
        kept = min(rank, len(values))
        wanted = np.linalg.inv(left) @ (u[:, :kept] * values[:kept]) @ v[:kept] @ np.linalg.inv(right)
        assert isinstance(sent[name], Chain)
        found = np.asarray(sent[name].first, np.float64) @ np.asarray(sent[name].second, np.float64)
        error = left @ (found - wanted) @ right
        assert np.linalg.norm(error) < 5e-3 * np.linalg.norm(values), name


def test_the_rank_is_a_share_chosen_by_the_scorer(toy: Task) -> None:
    explanation = LowRank().fit(toy)
    assert explanation.knobs["rank"] == RANK_SHARES
    ranks = []
    for share in (1.0, 0.5, 0.03125):
        section = explanation.section(settings_of(explanation, toy, 0.1, rank=share))
        ranks.append(section.header[0].symbols[0].tolist())
    assert ranks == [[5, 1], [2, 1], [1, 1]]  # 5 x 20 and 20 x 1
    with pytest.raises(ExplanationError, match="a rank of -1"):
        LowRank(-1).fit(toy)


def test_floating_point_operations_are_those_of_what_is_sent(toy: Task) -> None:
    inputs, none = toy.fit.inputs, NoState(toy.fit.inputs.n_tokens)
    found = {}
    for decomposition in (Weights(), LowRank(1), Neurons(10)):
        explanation = decomposition.fit(toy)
        found[explanation.name] = received(explanation, toy, settings_of(explanation, toy, 1e-4))[0]
    flops = {name: decoder.flops_per_token(inputs, none) for name, decoder in found.items()}
    own = sum(np.count_nonzero(w) for name, w in gated().weights.items() if name.startswith("W"))
    assert flops["weights"] == 2 * own
    assert flops["rank 1 weights"] == 2 * (5 + 20 + 20 + 1)
    assert flops["10 neurons"] <= 2 * (10 * 2 + 10)  # of x and the control bit


def test_names_and_refusals(toy: Task) -> None:
    assert Weights("nearest").fit(toy).name == "weights (nearest)"
    assert LowRank(whiten="no").fit(toy).name == "low rank weights (whitened: no)"
    assert Neurons(3, refit=False).fit(toy).name == "3 neurons (mean-ablated)"
    assert Neurons().fit(toy).knobs["kept"] == KEPT_SHARES
    assert make_decomposition("weights:quantiser=nearest") == Weights("nearest")
    assert make_decomposition("low-rank:rank=3,whiten=inputs") == LowRank(3, "inputs")
    assert make_decomposition("neurons:kept=7,refit=false") == Neurons(7, False)
    with pytest.raises(ExplanationError, match="21 of 20 are to be kept"):
        Neurons(21).fit(toy)
    nowhere = task_of(Vectors.of(np.random.default_rng(0).normal(size=(60, 3))))
    for decomposition in (Weights(), LowRank(), Neurons()):
        with pytest.raises(TaskError, match="no weights to describe"):
            decomposition.fit(nowhere)


def test_their_decoder_is_a_function_of_the_past(region: Task) -> None:
    explanation = Weights().fit(region)
    section = explanation.section(settings_of(explanation, region, 0.3))
    check_decoder("weights", section, region.fit.inputs, NoState(region.fit.inputs.n_tokens))


def test_many_sequences_are_run_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Linear()
    inputs, weights = random_inputs(network, 11, 2), {"W": np.arange(12, dtype=np.float32).reshape(4, 3)}
    whole = evaluate(network, weights, inputs)
    np.testing.assert_allclose(whole, inputs.scored_values() @ weights["W"], rtol=1e-5)
    monkeypatch.setattr("decompositions.weights.dense.BATCH_TOKENS", 6)
    np.testing.assert_allclose(evaluate(network, weights, inputs), whole, rtol=1e-5)
    scored = np.random.default_rng(0).random(inputs.scored.shape) < 0.5
    some = replace(inputs, scored=scored)
    np.testing.assert_allclose(evaluate(network, weights, some), whole[scored.ravel()], rtol=1e-5)


def arrays(*shapes: tuple[int, int]) -> list[QuantisedArray]:
    return [QuantisedArray.from_values(np.ones(shape), 0.5) for shape in shapes]


def integers(*values: int) -> QuantisedArray:
    return QuantisedArray.from_integers(np.array([values], np.int64))


W_IN, W_OUT, BIAS = (5, 20), (20, 1), (1, 20)
SECTIONS = {
    "no header": (),
    "ranks in two rows": (QuantisedArray.from_integers(np.zeros((2, 1))), *arrays(W_IN, W_OUT, BIAS)),
    "a rank below zero": (integers(0, -1), *arrays(W_IN, W_OUT, BIAS)),
    "a rank far too large": (integers(0, 1 << 40), *arrays(W_IN, W_OUT, BIAS)),
    "ranks that are no integers": (QuantisedArray.from_values(np.ones((1, 2)), 0.5), *arrays(W_IN, W_OUT, BIAS)),
    "fewer arrays than matrices": (integers(0, 0), *arrays(W_IN)),
    "half of a product": (integers(2, 0), *arrays((5, 2), (2, 20))),
    "a bias too few": (integers(0, 0), *arrays(W_IN, W_OUT)),
    "a bias too many": (integers(0, 0), *arrays(W_IN, W_OUT, BIAS, BIAS)),
    "a matrix too few": (integers(0), *arrays(W_IN, BIAS)),
    "a matrix too many": (integers(0, 0, 0), *arrays(W_IN, W_OUT, W_OUT, BIAS)),
    "no matrix at all": (QuantisedArray.from_integers(np.zeros((1, 0))), *arrays(BIAS)),
    "transposed": (integers(0, 0), *arrays((20, 5), W_OUT, BIAS)),
    "matrices in another order": (integers(0, 0), *arrays(W_OUT, W_IN, BIAS)),
    "a bias as a column": (integers(0, 0), *arrays(W_IN, W_OUT, (20, 1))),
    "a bias in two rows": (integers(0, 0), *arrays(W_IN, W_OUT, (2, 20))),
    "another rank than is said": (integers(3, 0), *arrays((5, 2), (2, 20), W_OUT, BIAS)),
    "factors that do not meet": (integers(2, 0), *arrays((5, 2), (3, 20), W_OUT, BIAS)),
    "a product of other ends": (integers(2, 0), *arrays((4, 2), (2, 20), W_OUT, BIAS)),
    "rank for the other matrix": (integers(0, 2), *arrays((5, 2), (2, 20), W_OUT, BIAS)),
    "empty": (integers(0, 0), *arrays((0, 0), (0, 0), (0, 0))),
}


@pytest.mark.parametrize("what", SECTIONS)
def test_damaged_sections_are_refused(what: str, toy: Task) -> None:
    """By nothing but a MessageError, when the decoder is built or when it first meets the network."""
    with pytest.raises(MessageError):
        WeightsDecoder.from_section(Section("weights", tuple(SECTIONS[what]))).weights(toy.fit.inputs.network)


def test_other_damage(toy: Task) -> None:
    inputs = toy.fit.inputs
    whole = Section("weights", (integers(0, 0), *arrays(W_IN, W_OUT, BIAS)))
    assert WeightsDecoder.from_section(whole).predict(inputs, NoState(inputs.n_tokens)).shape == (inputs.n_tokens, 1)
    with pytest.raises(MessageError, match="has no parts"):
        WeightsDecoder.from_section(replace(whole, parts=tuple(arrays((3, 2)))))
    nowhere = Inputs(inputs.tokens, inputs.scored, inputs.values)
    with pytest.raises(MessageError, match="architecture is not known"):
        WeightsDecoder.from_section(whole).predict(nowhere, NoState(inputs.n_tokens))
