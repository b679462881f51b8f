"""Block-sparse features: the least squares of a support, bases, slots by rank, training, the way to the receiver."""

from __future__ import annotations

import numpy as np
import pytest

from decompositions.block_sparse import (
    Bases,
    BlockSparse,
    BlockSparseDecoder,
    least_squares,
    slots_of,
    state_of,
)
from decompositions.block_sparse_training import Schedule, encode_groups, train
from estimators.conduct import check_decoder
from mdl.errors import ExplanationError, MessageError
from mdl.message import QuantisedArray, Section, decode_message, encode_message
from mdl.protocols import Decoder, Decomposition, Explanation, Inputs, Settings
from mdl.receiver import decoder_of
from mdl.state import DenseState, JoinedState, SparseState, first_use_order
from mdl.task import Task

WIDTH = 12


def blocky(n: int = 4000, groups: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points that lie in one of some planes, each an orthonormal pair [groups, 2, d]; which one."""
    rng = np.random.default_rng(seed)
    planes = np.stack([np.linalg.qr(rng.normal(size=(WIDTH, 2)))[0].T for _ in range(groups)])
    owner = rng.integers(0, groups, n)
    codes = rng.normal(size=(n, 2))
    return planes, owner, (codes[:, None] @ planes[owner])[:, 0].astype(np.float32)


def small_decoder(groups: int = 5, size: int = 2, active: int = 3) -> BlockSparseDecoder:
    rng = np.random.default_rng(1)
    ranks = np.array([3, 0, 4, 1, 2])[:groups]
    return BlockSparseDecoder(np.ones(4, np.float32), rng.normal(size=(groups, size, 4)), ranks, active)


def test_training_finds_the_planes() -> None:
    planes, owner, points = blocky()
    blocks = train(points, 8, 2, 1, Schedule(steps=400, batch=256, rate=5e-3), seed=0)
    chosen = encode_groups(blocks, points)
    values = least_squares(blocks.decoder, points, chosen, np.eye(WIDTH))
    left = points - np.einsum("nlb,nlbd->nd", values, blocks.decoder[chosen])
    assert np.square(left).sum() < 0.15 * np.square(points).sum()
    again = train(points, 8, 2, 1, Schedule(steps=3, batch=64), seed=0)
    same = train(points, 8, 2, 1, Schedule(steps=3, batch=64), seed=0)
    assert np.array_equal(again.decoder, same.decoder)
    assert len(np.unique(owner)) == len(planes)


def test_least_squares_is_what_a_slow_one_says() -> None:
    rng = np.random.default_rng(2)
    rows, points = rng.normal(size=(5, 2, WIDTH)), rng.normal(size=(7, WIDTH))
    root = np.diag(rng.uniform(0.5, 2, WIDTH))
    chosen = np.array([rng.choice(5, 3, replace=False) for _ in range(7)])
    chosen[2, 1] = -1
    found = least_squares(rows, points, chosen, root)
    for x, groups, coefficients in zip(points, chosen, found, strict=True):
        here = groups >= 0
        matrix = rows[groups[here]].reshape(-1, WIDTH) @ root
        exact = np.linalg.lstsq(matrix.T, x @ root, rcond=None)[0]
        assert np.allclose(coefficients[here].ravel(), exact, atol=0.02)  # but for the ridge
        assert not coefficients[~here].any()


def test_bases_are_orthonormal_in_the_metric_and_principal() -> None:
    rng = np.random.default_rng(3)
    planes, owner, points = blocky()
    mixed = np.array([rng.normal(size=(2, 2)) @ p for p in planes])
    root = np.diag(rng.uniform(0.5, 2, WIDTH))
    bases = Bases.of(mixed, points, owner[:, None], root)
    for rows, plane in zip(bases.rows, planes, strict=True):
        assert np.allclose((rows @ root) @ (rows @ root).T, np.eye(2), atol=1e-8)
        assert np.allclose(rows @ plane.T @ plane, rows, atol=1e-8)
    assert (bases.energy[:, 0] >= bases.energy[:, 1]).all()
    assert bases.energy.sum() == pytest.approx(np.square(points @ root).sum(1).mean(), rel=0.01)
    assert sorted(bases.ranks) == list(range(6))


def test_slots_go_by_rank_whatever_the_parts_are_called() -> None:
    decoder = small_decoder()
    chosen = np.array([[0, 2, 4], [1, 3, -1], [0, 1, 2]])
    integers = np.arange(1, 19).reshape(3, 3, 2)
    integers[2, 1] = 0  # a group whose integers are all zero is off
    state = state_of(integers, chosen, decoder)
    support, values = state.streams
    assert isinstance(support, SparseState)
    assert isinstance(values, DenseState)
    assert support.matrix().toarray().tolist() == [[1, 0, 1, 0, 1], [0, 1, 0, 1, 0], [1, 0, 1, 0, 0]]
    assert values.values[0].tolist() == [5, 6, 1, 2, 3, 4]  # ranks of 4, 0 and 2: 2, 3, 4
    assert values.values[2].tolist() == [13, 14, 17, 18, 0, 0]
    tokens, groups, slots = slots_of(support, decoder.ranks)
    assert list(zip(tokens.tolist(), groups.tolist(), slots.tolist(), strict=True))[:3] == [
        (0, 4, 0),
        (0, 0, 1),
        (0, 2, 2),
    ]
    expected = [sum(integers[t, j] @ decoder.rows[g] for j, g in enumerate(chosen[t]) if g >= 0) for t in range(3)]
    inputs = Inputs(np.zeros((1, 3), np.int64), np.ones((1, 3), bool))
    predicted = decoder.predict(inputs, state)
    assert np.allclose(predicted, 1 + np.array(expected), atol=1e-4)
    order = first_use_order(state.touched())
    moved = BlockSparseDecoder(decoder.bias, decoder.rows[order], decoder.ranks[order], 3)
    assert np.allclose(moved.predict(inputs, state.reordered(order)), predicted, atol=1e-5)
    assert decoder.flops_per_token(inputs, state) == 2 * 4 * 2 * 7 / 3


def test_from_fit_to_what_the_receiver_sees(tiny_task: Task) -> None:
    task = tiny_task.for_fitting()
    explanation = BlockSparse(groups=16, size=2, active=3, steps=60).fit(task)
    assert isinstance(explanation, Explanation)
    assert isinstance(BlockSparse(), Decomposition)
    assert explanation.name == "block-sparse (16 x 2, l=3)"
    settings = Settings(1e8, 0.05, np.eye(16), {"static": 1.0, "value": 1.0})
    section = explanation.section(settings)
    decoder = decoder_of(decode_message(encode_message([section]).data)[0])
    assert isinstance(decoder, Decoder)
    sample = task.tune_activations.head(6).sample()
    state = explanation.encode(decoder, sample, settings)
    assert isinstance(state, JoinedState)
    left = sample.outputs - decoder.predict(sample.inputs, state)
    assert np.square(left).mean() < 0.6 * sample.outputs.var(0).mean()
    coarse = Settings(1e8, 0.05, np.eye(16), {"static": 1.0, "value": 10.0})
    cheap = explanation.encode(decoder_of(explanation.section(coarse)), sample, coarse)
    assert cheap.bits() < state.bits()
    check_decoder("block-sparse", section, sample.inputs, state)


def test_bad_sections_and_options_are_refused(tiny_task: Task) -> None:
    with pytest.raises(MessageError, match="two header arrays and two of parts at least, not 0"):
        BlockSparseDecoder.from_section(Section("block-sparse"))
    one = QuantisedArray.from_integers(np.array([[1]]))
    wide = QuantisedArray.from_values(np.ones((1, 3)), 1.0)
    with pytest.raises(MessageError, match="do not fit a bias of 3"):
        BlockSparseDecoder.from_section(Section("block-sparse", (wide, one), (one, one)))
    decoder = small_decoder(active=1)
    state = state_of(np.ones((1, 2, 2), np.int64), np.array([[0, 1]]), decoder)
    with pytest.raises(MessageError, match="a token with 2 groups; there are values for 1"):
        decoder.coefficients(state)
    for options in ({"active": 0}, {"active": 9, "groups": 8}, {"size": 17}, {"steps": 0}):
        with pytest.raises(ExplanationError, match="needed are 1 <= active <= groups"):
            BlockSparse(**options).fit(tiny_task.for_fitting())
