"""Nothing, the token table and the affine map: what they fit, what they send, what they refuse."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from decompositions.baselines import (
    Affine,
    AffineDecoder,
    ConstantDecoder,
    Nothing,
    TableDecoder,
    TableExplanation,
    TokenTable,
)
from mdl.errors import ExplanationError, MessageError
from mdl.message import QuantisedArray, Section, decode_message, encode_message
from mdl.protocols import Decoder, Decomposition, Explanation, Inputs, Sample, Settings
from mdl.state import NoState
from mdl.task import Task

WIDTH = 6
FINE = Settings(1e12, 1e-3, np.eye(WIDTH))


def task_of(tokens: np.ndarray, outputs: np.ndarray, values: np.ndarray | None = None) -> Any:
    """As much of a task as `fit` looks at."""
    inputs = Inputs(tokens[None], np.ones((1, len(tokens)), bool), None if values is None else values[None])
    return SimpleNamespace(
        fit=Sample(inputs, outputs),
        width=outputs.shape[1],
        region=SimpleNamespace(name="a region", input="inputs", output="a site"),
    )


def fit(decomposition: Decomposition, task: Any) -> Explanation:
    """Fit without the run-time check of the task's type."""
    return inspect.unwrap(type(decomposition).fit)(decomposition, task)


def received(explanation: Explanation, kind: type, settings: Settings = FINE) -> Decoder:
    """The decoder that the explanation's bytes give."""
    message = encode_message([explanation.section(settings)])
    return kind.from_section(decode_message(message.data)[0])


def words(
    n: int = 3000, vocabulary: int = 30, noise: float = 0.3, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids of Zipfian frequency, a vector for each, and outputs that are the vector and noise."""
    rng = np.random.default_rng(seed)
    p = 1 / np.arange(1, vocabulary + 1)
    tokens = (7 * rng.choice(vocabulary, n, p=p / p.sum())).astype(np.int32)
    vectors = rng.normal(size=(7 * vocabulary, WIDTH))
    outputs = (vectors[tokens] + noise * rng.normal(size=(n, WIDTH)) + 2).astype(np.float32)
    return tokens, vectors, outputs


def test_nothing_is_the_mean() -> None:
    tokens, _, outputs = words()
    task = task_of(tokens, outputs)
    explanation = fit(Nothing(), task)
    decoder = received(explanation, ConstantDecoder)
    predicted = decoder.predict(task.fit.inputs, NoState(len(tokens)))
    assert predicted.dtype == np.float32
    assert predicted.shape == outputs.shape
    assert np.allclose(predicted, outputs.mean(0), atol=1e-4)
    assert explanation.name == "nothing"
    assert decoder.touched(task.fit.inputs, NoState(3)) is None
    assert decoder.flops_per_token(task.fit.inputs, NoState(3)) == 0
    state = explanation.encode(decoder, task.fit, FINE)
    assert (state.n_tokens, state.length().total) == (len(tokens), 0.0)


def test_the_table_is_nearer_the_truth_than_plain_means() -> None:
    tokens, vectors, outputs = words(noise=1.5)
    explanation = fit(TokenTable(), task_of(tokens, outputs))
    decoder = received(explanation, TableDecoder)
    every = Inputs(explanation.ids[None].astype(np.int32), np.ones((1, len(explanation.ids)), bool))
    predicted, truth = decoder.predict(every, NoState(len(explanation.ids))), vectors[explanation.ids] + 2
    plain = np.array([outputs[tokens == i].mean(0) for i in explanation.ids])
    assert np.square(predicted - truth).sum() < 0.95 * np.square(plain - truth).sum()
    often = np.array([(tokens == i).sum() > 200 for i in explanation.ids])
    assert often.sum() > 2
    assert np.allclose(predicted[often], plain[often], atol=0.15)


def test_a_token_behind_one_token_alone_has_told_little() -> None:
    """Of two tokens seen equally often, the one seen behind many others is believed more."""
    rng = np.random.default_rng(0)
    pairs = rng.normal(size=(60, 60, WIDTH))
    before = rng.integers(2, 60, 4000)
    tokens = np.stack([before, rng.integers(2, 60, 4000)], 1)
    tokens[:200, 1], tokens[200:400, 1] = 0, 1
    tokens[200:400, 0] = 2  # token 1 stands behind token 2 alone
    inputs = Inputs(tokens.astype(np.int32), np.tile([False, True], (4000, 1)))
    outputs = (1.0 + pairs[tokens[:, 1], tokens[:, 0]] + 0.1 * rng.normal(size=(4000, WIDTH))).astype(np.float32)
    task = SimpleNamespace(
        fit=Sample(inputs, outputs),
        width=WIDTH,
        region=SimpleNamespace(name="a region", input="inputs", output="a site"),
    )
    explanation = fit(TokenTable(), task)
    one, other = (np.linalg.norm(explanation.rows[i]) for i in (0, 1))
    raw = np.linalg.norm(outputs[200:400].mean(0) - outputs.mean(0))
    assert other < 0.5 * raw
    assert one < raw


def test_a_table_of_noise_shrinks_to_nothing() -> None:
    tokens, _, _ = words()
    noise = np.random.default_rng(1).normal(size=(len(tokens), WIDTH)).astype(np.float32)
    explanation = fit(TokenTable(), task_of(tokens, noise))
    own = np.array([noise[tokens == i].mean(0) for i in explanation.ids]) - noise.mean(0)
    assert np.square(explanation.rows).sum() < 0.2 * np.square(own).sum()


def test_unknown_tokens_get_the_mean() -> None:
    tokens, _, outputs = words()
    decoder = received(fit(TokenTable(), task_of(tokens, outputs)), TableDecoder)
    strange = Inputs(np.array([[1, 10**6, 6, 0]], np.int32), np.ones((1, 4), bool))
    predicted = decoder.predict(strange, NoState(4))
    assert np.allclose(predicted[:3], outputs.mean(0), atol=1e-3)
    assert not np.allclose(predicted[3], outputs.mean(0), atol=0.1)
    touched = decoder.touched(strange, NoState(4)).toarray()
    assert touched.shape == (4, len(decoder.ids))
    assert touched.sum(1).tolist() == [0, 0, 0, 1]


def test_rows_that_round_to_nothing_are_not_sent() -> None:
    mean, rows = np.zeros(WIDTH), np.zeros((4, WIDTH))
    rows[1], rows[3] = 1.0, 1e-9
    explanation = TableExplanation(mean, np.array([2, 5, 9, 11]), rows, np.full(4, 0.25))
    decoder = received(explanation, TableDecoder, Settings(1e3, 0.1, np.eye(WIDTH)))
    assert decoder.ids.tolist() == [5]
    assert received(TableExplanation(mean, np.array([3]), np.zeros((1, WIDTH)), np.ones(1)), TableDecoder).predict(
        Inputs(np.array([[3]]), np.ones((1, 1), bool)), NoState(1)
    ).shape == (1, WIDTH)


def test_rare_tokens_are_sent_coarsely() -> None:
    tokens, _, outputs = words()
    explanation = fit(TokenTable(), task_of(tokens, outputs))
    section = explanation.section(Settings(1e5, 0.1, np.eye(WIDTH)))
    exponents = section.parts[1].exponents
    frequent = explanation.frequency > 0.1
    assert len(exponents) == len(explanation.ids)
    assert exponents[frequent].max() < exponents[explanation.frequency < 0.01].min()


def test_token_ids_have_to_increase() -> None:
    section = Section(
        "table",
        (QuantisedArray.from_values(np.zeros(WIDTH), 0.1),),
        (QuantisedArray.from_integers(np.array([3, 0])), QuantisedArray.from_values(np.ones((2, WIDTH)), 0.1)),
    )
    with pytest.raises(MessageError, match="increase from row to row"):
        TableDecoder.from_section(section)


@pytest.mark.parametrize("kind", [ConstantDecoder, TableDecoder, AffineDecoder])
def test_sections_of_the_wrong_make_are_refused(kind: type) -> None:
    with pytest.raises(MessageError, match="section has"):
        kind.from_section(Section("x"))


def test_the_affine_map_is_found_and_charged() -> None:
    rng = np.random.default_rng(2)
    values = (rng.normal(size=(2000, 4)) + 1).astype(np.float32)
    matrix, bias = rng.normal(size=(4, WIDTH)), rng.normal(size=WIDTH)
    outputs = (values @ matrix + bias).astype(np.float32)
    task = task_of(np.zeros(2000, np.int32), outputs, values)
    explanation = fit(Affine(ridge=1e-9), task)
    decoder = received(explanation, AffineDecoder)
    assert np.allclose(decoder.matrix, matrix, atol=1e-3)
    assert np.allclose(decoder.predict(task.fit.inputs, NoState(2000)), outputs, atol=1e-2)
    assert decoder.flops_per_token(task.fit.inputs, NoState(1)) == 2 * 4 * WIDTH
    coarse, fine = (
        encode_message([explanation.section(Settings(n, 0.1, np.eye(WIDTH)))]).whole_bits for n in (1e4, 1e8)
    )
    assert fine > coarse + 4 * WIDTH * 4


def test_an_affine_map_of_token_ids_is_refused() -> None:
    tokens, _, outputs = words(100)
    with pytest.raises(ExplanationError, match="affine: the input of region 'a region' is token ids"):
        fit(Affine(), task_of(tokens, outputs))


def test_yardsticks_on_a_real_task(tiny_task: Task) -> None:
    """On the model's own activations: the table predicts more than the mean does."""
    sample = tiny_task.held_out.sample()
    left = {}
    for name, decomposition, kind in (
        ("nothing", Nothing(), ConstantDecoder),
        ("table", TokenTable(), TableDecoder),
        ("affine", Affine(), AffineDecoder),
    ):
        explanation = decomposition.fit(tiny_task.for_fitting())
        assert isinstance(explanation, Explanation)
        assert isinstance(decomposition, Decomposition)
        settings = Settings(1e8, 0.05, np.eye(16))
        decoder = received(explanation, kind, settings)
        assert isinstance(decoder, Decoder)
        left[name] = float(np.square(sample.outputs - decoder.predict(sample.inputs, NoState(1))).mean())
    assert left["table"] < 0.9 * left["nothing"]
    assert left["affine"] < 0.9 * left["nothing"]
