"""Blocks under what was learnt from the blocks before, on a tiny model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from decompositions.baselines import Nothing, TokenTable
from decompositions.clusters import Clusters
from estimators.fidelity import Bench
from estimators.fisher import Metric
from estimators.prequential import Block, Prequential, Stream, _first_block, _next_block, block_edges, prequential
from estimators.relearning import Past, exponent_of, joined, learnt_metric, metric_scale, next_code, step_of
from mdl.task import Activations, Task

pytestmark = pytest.mark.usefixtures("in_little_time")
SEQUENCES = 16


@pytest.fixture(scope="module")
def eps(tiny_bench: Bench) -> float:
    return 0.05 * tiny_bench.null_kl


@pytest.fixture(scope="module")
def stream(tiny_bench: Bench) -> Stream:
    return Stream.of(tiny_bench, seed=0, sequences=SEQUENCES)


@pytest.fixture(scope="module")
def table(stream: Stream, eps: float) -> Prequential:
    return prequential(stream, TokenTable(), eps, {"static": 1.0})


def test_blocks_double() -> None:
    assert block_edges(1) == [0, 1]
    assert block_edges(9) == [0, 1, 2, 4, 8, 9]
    assert block_edges(64) == [0, 1, 2, 4, 8, 16, 32, 64]


def test_every_sequence_is_in_one_block(tiny_task: Task, tiny_bench: Bench) -> None:
    stream = Stream.of(tiny_bench, seed=3)
    assert tiny_task.held_out is not None
    every = np.concatenate(
        [tiny_task.fit_activations.tokens, tiny_task.tune_activations.tokens, tiny_task.held_out.tokens]
    )
    found = np.concatenate([s.activations.tokens for s in stream.splits])
    assert sorted(map(bytes, found)) == sorted(map(bytes, every))


def test_every_block_meets_the_fidelity(table: Prequential, eps: float) -> None:
    assert len(table.blocks) == 5
    for block in table.blocks:
        assert block.kl == pytest.approx(eps, rel=0.3)  # 15 tokens: KL jumps
        assert abs(block.correction) < 0.3 * block.residual


def test_learning_pays(table: Prequential) -> None:
    """The last block, behind half of the data, is far cheaper a token than the first."""
    first, last = table.blocks[0], table.blocks[-1]
    assert last.bits / last.tokens < 0.6 * first.bits / first.tokens


def test_totals_add_up() -> None:
    blocks = tuple(Block(tokens, 1.0, 2.0, 3.0 * tokens, 0.0, 0.1, 1.0) for tokens in (10, 10, 20))
    found = Prequential("x", 0.1, blocks)
    assert found.total(10.0) == 33.0
    assert found.total(40.0) == 9.0 + 120.0
    assert found.total(15.0) == pytest.approx(33.0 + 16.5)
    with pytest.raises(ValueError, match="40"):
        found.total(41.0)


def blank(activations: Activations) -> Activations:
    """What a receiver has of a block: no outputs."""
    return replace(activations, outputs=np.full_like(activations.outputs, np.nan))


@pytest.mark.parametrize("decomposition", [Nothing(), TokenTable(), Clusters(k=8, rounds=3)])
def test_a_receiver_learns_the_same_to_the_bit(
    tiny_bench: Bench, stream: Stream, eps: float, decomposition: Nothing | TokenTable | Clusters
) -> None:
    """It has inputs, symbols and steps; outputs are NaN throughout. Its reconstructions are the sender's."""
    task = tiny_bench.task
    empty = replace(task, fit_activations=blank(task.fit_activations), tune_activations=blank(task.tune_activations))
    knobs, metric = {"static": 1.0}, None
    _, past = _first_block(tiny_bench, stream.splits[0], eps)
    received = past  # the first block is symbols on fixed axes: nothing is learnt there
    for split in stream.splits[1:4]:
        metric = learnt_metric(tiny_bench, past, metric)
        sender, block, past = _next_block(tiny_bench, split, eps, past, metric, decomposition, knobs)
        codes = past.codes[len(received.codes) :]
        received = receive(
            tiny_bench, received, empty, decomposition, blank(split.activations), sender.state, codes, block
        )
        np.testing.assert_array_equal(received.known.outputs, past.known.outputs)
        np.testing.assert_array_equal(received.errors, past.errors)


def receive(bench, past, task, decomposition, activations, state, codes, block) -> Past:  # type: ignore[no-untyped-def]
    """What a receiver does with a block: the metric, the code, the reconstruction."""
    metric: Metric = learnt_metric(bench, past, None)
    begins = past.exponent if len(past.errors) else exponent_of(step_of(past.exponent) * metric_scale(metric))
    code = next_code(past, task, decomposition, metric, {"static": 1.0}, step_of(begins))
    inputs = replace(activations, outputs=np.zeros_like(activations.outputs)).sample().inputs
    prediction = code.predict(inputs, state)
    values = code.corrected(prediction, codes, block.step)
    special = past.known.outputs[past.known.tokens == bench.special[0][0]][0]
    known = replace(activations, outputs=activations.filled(values, {bench.special[0][0]: special}))
    errors = np.concatenate([past.errors, values - prediction])
    after = np.concatenate([past.codes, codes])
    return Past(joined([past.known, known]), errors, after, exponent_of(block.step))


def test_nothing_is_learnt_from_outputs(tiny_bench: Bench, stream: Stream, eps: float) -> None:
    """Past data hold reconstructions: none of them is an output of the model."""
    _, past = _first_block(tiny_bench, stream.splits[0], eps)
    metric = learnt_metric(tiny_bench, past, None)
    _, _, after = _next_block(tiny_bench, stream.splits[1], eps, past, metric, Nothing(), {})
    outputs = np.concatenate([s.activations.outputs for s in stream.splits[:2]])
    assert after.known.outputs.shape == outputs.shape
    assert not np.any(after.known.outputs[after.known.scored] == outputs[after.known.scored])
