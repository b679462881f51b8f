"""A table by pairs behind the table by token: keys, shrinkage, what is sent, what is refused."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from decompositions.baselines import TokenTable
from decompositions.token_pairs import (
    SPAN,
    TokenPairs,
    TokenPairsDecoder,
    coded_keys,
    decoded_keys,
    nested_effects,
    own_keys,
    pair_keys,
)
from mdl.errors import ExplanationError, MessageError
from mdl.message import QuantisedArray, Section, decode_message, encode_message
from mdl.protocols import Decoder, Decomposition, Explanation, Inputs, Sample, Settings
from mdl.receiver import decoder_of
from mdl.state import NoState
from mdl.task import Task

WIDTH = 5
FINE = Settings(1e6, 1e-3, np.eye(WIDTH))


def task_of(tokens: np.ndarray, outputs: np.ndarray) -> Any:
    """As much of a task as `fit` looks at: sequences of tokens, all positions but the first scored."""
    scored = np.ones(tokens.shape, bool)
    scored[:, 0] = False
    sample = Sample(Inputs(tokens, scored), outputs[scored])
    return SimpleNamespace(fit=sample, region=SimpleNamespace(output="a site"))


def fit(decomposition: Any, task: Any) -> Any:
    """Fit without the run-time check of the task's type."""
    return inspect.unwrap(type(decomposition).fit)(decomposition, task)


def received(explanation: Explanation, settings: Settings = FINE) -> TokenPairsDecoder:
    """The decoder that the explanation's bytes give."""
    return TokenPairsDecoder.from_section(decode_message(encode_message([explanation.section(settings)]).data)[0])


def bigrams(sequences: int = 60, noise: float = 0.2, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, the sum of an effect of the token and one of the pair, and outputs with noise on it."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 6, (sequences, 20))
    own, pair = rng.normal(size=(6, WIDTH)), rng.normal(size=(7, 6, WIDTH))
    before = np.concatenate([np.full((sequences, 1), 6), tokens[:, :-1]], 1)
    exact = own[tokens] + pair[before, tokens]
    return tokens, exact, (exact + noise * rng.normal(size=exact.shape)).astype(np.float32)


def test_pairs_are_found_and_sent() -> None:
    tokens, exact, outputs = bigrams()
    task = task_of(tokens, outputs)
    explanation = fit(TokenPairs(count=2), task)
    decoder = received(explanation)
    assert isinstance(explanation, Explanation)
    assert isinstance(decoder, Decoder)
    assert isinstance(TokenPairs(), Decomposition)
    predicted = decoder.predict(task.fit.inputs, NoState(task.fit.inputs.n_tokens))
    assert predicted.dtype == np.float32
    assert np.square(predicted - exact[task.fit.inputs.scored]).mean() < 0.1 * 0.2**2 + 36 / 1140 * 0.2**2
    # A token's own table cannot say it.
    table = np.square(exact[:, 1:] - exact[:, 1:].mean((0, 1))).mean()
    assert np.square(predicted - outputs[task.fit.inputs.scored]).mean() < 0.05 * table
    assert decoder.flops_per_token(task.fit.inputs, NoState(1)) == 2 * WIDTH
    assert isinstance(explanation.encode(decoder, task.fit, FINE), NoState)


def slow_prediction(decoder: TokenPairsDecoder, tokens: np.ndarray, scored: np.ndarray) -> np.ndarray:
    """Position by position, from a dictionary of rows."""
    rows = {(int(k) // SPAN, int(k) % SPAN - 2): row for k, row in zip(decoder.keys, decoder.rows, strict=True)}
    found = []
    for sequence, chosen in zip(tokens, scored, strict=True):
        for place in np.flatnonzero(chosen):
            token, before = int(sequence[place]), int(sequence[place - 1]) if place else -1
            row = rows.get((token, -2), 0.0) + rows.get((token, before), np.zeros(WIDTH))
            found.append(decoder.mean + row)
    return np.array(found)


def test_the_prediction_is_what_a_slow_one_says() -> None:
    tokens, _, outputs = bigrams()
    decoder = received(fit(TokenPairs(count=6), task_of(tokens, outputs)))
    strange = np.array([[1, 2, 99, 3, 1], [0, 0, 0, 99, 99]])
    scored = np.ones(strange.shape, bool)  # the first position, too: nothing stands before it
    predicted = decoder.predict(Inputs(strange, scored), NoState(10))
    assert np.allclose(predicted, slow_prediction(decoder, strange, scored), atol=1e-6)
    touched = decoder.touched(Inputs(strange, scored), NoState(10)).toarray()
    assert touched.shape == (10, len(decoder.keys))
    assert touched.sum(1).max() == 2
    assert touched[2].sum() == 0


def test_what_no_token_touches_is_not_needed_and_the_future_is_not_seen() -> None:
    tokens, _, outputs = bigrams()
    decoder = received(fit(TokenPairs(count=2), task_of(tokens, outputs)))
    inputs = Inputs(tokens[:1], np.ones((1, 20), bool))
    touched = decoder.touched(inputs, NoState(20)).toarray().any(0)
    without = TokenPairsDecoder(decoder.mean, decoder.keys, decoder.rows * touched[:, None])
    whole = decoder.predict(inputs, NoState(20))
    assert np.array_equal(without.predict(inputs, NoState(20)), whole)
    changed = tokens[:1].copy()
    changed[:, 10:] = (changed[:, 10:] + 1) % 6
    other = decoder.predict(Inputs(changed, inputs.scored), NoState(20))
    assert np.array_equal(other[:10], whole[:10])
    assert not np.allclose(other[10], whole[10], atol=1e-2)


def test_rare_pairs_are_left_out_and_the_token_answers_for_them() -> None:
    tokens, _, outputs = bigrams(10)
    task = task_of(tokens, outputs)
    keys, counts = np.unique(pair_keys(task.fit.inputs), return_counts=True)
    explanation = fit(TokenPairs(count=5), task)
    assert set(explanation.keys) == set(keys[counts >= 5]) | set(own_keys(task.fit.inputs))
    assert explanation.name == "token-pairs, 5 or more"
    assert fit(TokenPairs(), task).name == "token-pairs"
    assert fit(TokenPairs(count=10**6), task).keys.tolist() == [t * SPAN for t in range(6)]


def test_effects_are_shrunk_as_much_as_they_are_noise() -> None:
    """Balanced data in one dimension, where the best linear prediction has a closed form."""
    rng = np.random.default_rng(1)
    tokens, pairs, each = 200, 8, 3
    a, b = rng.normal(size=tokens) * 2, rng.normal(size=(tokens, pairs)) * 1.5
    x = a[:, None, None] + b[..., None] + rng.normal(size=(tokens, pairs, each))
    owner = np.repeat(np.arange(tokens), pairs)
    mean, own, beyond = nested_effects(x.reshape(-1, 1), owner, np.repeat(np.arange(tokens * pairs), each))
    centred = x.mean((1, 2)) - x.mean()
    inner = x.mean(2) - x.mean((1, 2))[:, None]
    expected = centred * 4 / (4 + 1.5**2 / pairs + 1 / (pairs * each))
    assert mean[0] == pytest.approx(x.mean())
    assert np.allclose(own[:, 0], expected, rtol=0.03, atol=0.01)
    share = 1.5**2 / (1.5**2 + 1 / each)
    wanted = share * (inner + (centred - own[:, 0])[:, None])
    assert np.allclose(beyond.reshape(tokens, pairs), wanted, rtol=0.06, atol=0.01)


def test_pairs_that_say_nothing_shrink_to_nothing() -> None:
    tokens, _, _ = bigrams()
    rng = np.random.default_rng(2)
    own = rng.normal(size=(6, WIDTH))
    outputs = (own[tokens] + 0.5 * rng.normal(size=(*tokens.shape, WIDTH))).astype(np.float32)
    explanation = fit(TokenPairs(count=2), task_of(tokens, outputs))
    pairs = explanation.keys % SPAN > 0
    # A mean of some 30 values with noise of variance 1/4.
    assert np.square(explanation.rows[pairs]).mean() < 0.2 * 0.25 / 30
    decoder = received(explanation, Settings(100.0, 0.3, np.eye(WIDTH)))
    assert (decoder.keys % SPAN == 0).all()


def test_keys_travel_as_increments() -> None:
    keys = np.array([3 * SPAN, 3 * SPAN + 2, 3 * SPAN + 9, 7 * SPAN + 4, (2**31 - 1) * SPAN + SPAN - 1])
    increments, codes = coded_keys(keys)
    assert increments.symbols[:, 0].tolist() == [4, 0, 0, 4, 2**31 - 8]
    assert codes.symbols[:3, 0].tolist() == [0, 2, 7]
    assert np.array_equal(decoded_keys(increments, codes), keys)
    none = coded_keys(np.zeros(0, np.int64))
    assert len(decoded_keys(*none)) == 0


@pytest.mark.parametrize(
    ("increments", "codes", "fault"),
    [
        ([0], [0], "belongs to no token"),
        ([2, 0], [5, 0], "have to increase"),
        ([2**31, 2**31], [0, 0], "there are none"),
        ([-1], [0], "lie in"),
    ],
)
def test_keys_that_are_none_are_refused(increments: list[int], codes: list[int], fault: str) -> None:
    arrays = (QuantisedArray.from_integers(np.array(a)) for a in (increments, codes))
    with pytest.raises(MessageError, match=fault):
        decoded_keys(*arrays)


def test_bad_sections_and_options_are_refused() -> None:
    with pytest.raises(MessageError, match="three part arrays, not 0 header"):
        TokenPairsDecoder.from_section(Section("token-pairs"))
    tokens, _, outputs = bigrams(2)
    with pytest.raises(ExplanationError, match="seen once at least"):
        fit(TokenPairs(count=0), task_of(tokens, outputs))
    part = QuantisedArray.from_integers(np.array([1]))
    section = Section("token-pairs", (QuantisedArray.from_values(np.zeros(2), 1.0),), (part, part, part))
    with pytest.raises(MessageError, match="do not fit a mean of 2"):
        TokenPairsDecoder.from_section(section)


def test_on_a_real_task_pairs_leave_less_than_the_table(tiny_task: Task) -> None:
    sample = tiny_task.held_out.sample()
    settings = Settings(1e9, 0.05, np.eye(16))
    left = {}
    for name, decomposition in (("table", TokenTable()), ("pairs", TokenPairs(count=2))):
        explanation = decomposition.fit(tiny_task.for_fitting())
        predicted = decoder_of(explanation.section(settings)).predict(sample.inputs, NoState(sample.inputs.n_tokens))
        left[name] = float(np.square(sample.outputs - predicted).mean())
    assert left["pairs"] < left["table"]
