"""Behaviour that shows at some positions: the rest is predicted and paid for, but no KL counts there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from decompositions.weights.curvature import MeasuredCurvature, measure
from estimators.kernels import evaluator_for
from mdl.data import Dataset, Sizes, from_tokens
from mdl.errors import DataError
from mdl.models.model import Model
from mdl.score import compare
from mdl.task import Task, build_task
from mdl.verify import verify
from tests.conftest import VOCABULARY


def silent(*_: object) -> None:
    """Nobody looks."""


@pytest.fixture(scope="module")
def archive(tiny_data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens, measured where the one before was even."""
    tokens = np.concatenate([tiny_data.fit, tiny_data.tune, tiny_data.held_out])
    path = tmp_path_factory.mktemp("measured") / "data.npz"
    np.savez(path, tokens=tokens, measured=np.roll(tokens, 1, 1) % 2 == 0)
    return path


@pytest.fixture(scope="module")
def task_of(tiny_model: Model, archive: Path) -> Callable[[str], Task]:
    def make(region: str) -> Task:
        return build_task(tiny_model, region, from_tokens(archive, Sizes(60, 30, 20), 0), silent)

    return make


def test_masks_go_with_their_sequences_and_into_the_hash(archive: Path, tmp_path: Path) -> None:
    data = from_tokens(archive, Sizes(), 0)
    assert data.measured is not None
    for _, tokens, _, measured in data.splits():
        assert measured is not None
        assert np.array_equal(measured, np.roll(tokens, 1, 1) % 2 == 0)
    with np.load(archive) as arrays:
        np.savez(tmp_path / "all.npz", tokens=arrays["tokens"])
    assert from_tokens(tmp_path / "all.npz", Sizes(), 0).description["data_sha256"] != data.description["data_sha256"]
    data.save(tmp_path / "data.npz")
    again = Dataset.load(tmp_path / "data.npz")
    assert again.description["data_sha256"] == data.description["data_sha256"]
    assert again.measured is not None
    assert all(np.array_equal(a, b) for a, b in zip(again.measured, data.measured, strict=True))


def test_documents_stay_together(tiny_data: Dataset, tmp_path: Path) -> None:
    documents = np.arange(len(tiny_data.fit)) // 4
    tokens = tiny_data.fit.copy()
    tokens[:, 1] = 1 + documents  # recognised by its first token
    np.savez(tmp_path / "data.npz", tokens=tokens, documents=documents)
    data = from_tokens(tmp_path / "data.npz", Sizes(), 0)
    found = [set(split[:, 1]) for _, split, _, _ in data.splits()]
    assert [len(f) for f in found] == [12, 3, 5]
    assert len(set.union(*found)) == 20
    assert [len(np.unique(groups)) for _, _, groups, _ in data.splits()] == [12, 3, 5]


def test_a_context_cuts_the_mask_too(archive: Path) -> None:
    data = from_tokens(archive, Sizes(), 0, context=8)
    assert data.measured is not None
    assert data.measured[0].shape == data.fit.shape == (len(data.fit), 8)


@pytest.mark.parametrize("region", ["upstream of blocks.1.hook_resid_pre", "blocks.0.mlp", "model"])
def test_no_kl_where_nothing_is_asked(region: str, task_of: Callable[[str], Task], tiny_model: Model) -> None:
    task = task_of(region)
    everywhere = replace(task.held_out, measured=None)
    evaluator = evaluator_for(tiny_model, task.region)
    reference, values = evaluator.reference(everywhere), np.zeros_like(everywhere.outputs)
    some, all_ = (evaluator.damage(a, reference, values) for a in (task.held_out, everywhere))
    asked = task.held_out.asked[task.held_out.scored]
    assert 0 < asked.sum() < len(asked)
    assert (some.kl_bits[~asked] == 0).all()
    assert np.isnan(some.loss_bits[~asked]).all()
    assert np.array_equal(some.kl_bits[asked], all_.kl_bits[asked])
    assert (all_.kl_bits[~asked] > 0).any()


def test_the_metric_is_of_what_is_asked_for(task_of: Callable[[str], Task], tiny_model: Model) -> None:
    task = task_of("upstream of blocks.1.hook_resid_post")  # nothing but an unembedding behind it: positions are alone
    gradients = evaluator_for(tiny_model, task.region).score_gradients(task.held_out, 3)
    assert (np.abs(gradients).max(1) > 0).tolist() == task.held_out.asked[task.held_out.scored].tolist()


def test_curvature_of_logits_is_the_fisher_information(task_of: Callable[[str], Task], tiny_model: Model) -> None:
    """Of the last bias before the unembedding: W (diag(p) - p p^T) W^T, summed over the positions asked for."""
    curvature = MeasuredCurvature.of(task_of("model"))
    tokens, asked, w = curvature.inputs.tokens, curvature.asked, np.asarray(tiny_model.params["embed"]["W_E"]).T
    p = np.asarray(jax.nn.softmax(tiny_model.run(tokens, ["logits"])["logits"]), np.float64)[asked]
    expected = np.diag(w @ (np.diag(p.sum(0)) - p.T @ p) @ w.T) / curvature.inputs.n_tokens
    draws = [
        measure(curvature.network, curvature.weights, curvature.inputs, asked, np.eye(VOCABULARY), seed).others[
            "ln_final.b"
        ]
        for seed in range(100)
    ]
    assert np.mean(draws, 0).ravel() == pytest.approx(expected, rel=0.6)  # a square of one Gaussian each: 14 % of error
    assert np.mean(draws) == pytest.approx(expected.mean(), rel=0.15)


@pytest.mark.usefixtures("in_little_time")
def test_a_run_is_verified(tiny_model: Model, archive: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    region = "upstream of blocks.1.hook_resid_pre"
    kinds = ["token-table", "pca:rank=3"]
    card = compare(
        tiny_model, region, tokens=archive, sequences=16, explanations=kinds, fidelities=[0.1], horizon=1e4, out=out
    )
    for score in card.scores:
        if score.phenomenon == "activations":
            assert score.kl_bits <= 0.1 * card.task["null_kl_bits"] * 1.02
    assert card.task["measured_tokens"] < card.task["held_out_tokens"]
    assert verify(out, model=tiny_model).agrees


@pytest.mark.parametrize(
    ("measured", "message"),
    [
        (np.ones((40, 11), bool), "for tokens"),
        (np.ones((40, 12), int), "True or False"),
    ],
)
def test_masks_that_do_not_fit_are_refused(measured: np.ndarray, message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", tokens=np.ones((40, 12), int), measured=measured)
    with pytest.raises(DataError, match=message):
        from_tokens(tmp_path / "data.npz", Sizes(), 0)


def test_documents_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", tokens=np.ones((40, 12), int), documents=np.zeros(39, int))
    with pytest.raises(DataError, match="`documents` is int64"):
        from_tokens(tmp_path / "data.npz", Sizes(), 0)


def test_nothing_measured_is_refused(tiny_model: Model, tiny_data: Dataset, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", tokens=tiny_data.fit, measured=np.zeros(tiny_data.fit.shape, bool))
    with pytest.raises(DataError, match="no position of the fit data"):
        build_task(tiny_model, "model", from_tokens(tmp_path / "data.npz", Sizes(), 0), silent)


def test_an_archive_without_tokens_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", measured=np.ones((3, 3), bool))
    with pytest.raises(DataError, match="`tokens`"):
        from_tokens(tmp_path / "data.npz", Sizes(), 0)
