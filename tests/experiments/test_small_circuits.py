"""The small models: their data are what they say, and training may be interrupted."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest

from experiments.small_circuits.examples import (
    ASK,
    PAD,
    additions,
    balanced,
    brackets,
    is_balanced,
    repeats,
)
from experiments.small_circuits.models import (
    MODULUS,
    initial_weights,
    last_logits,
    model_named,
    models,
    split_additions,
)
from experiments.small_circuits.training import as_model, figures, restore, save, train
from mdl.data import Sizes, from_tokens
from mdl.errors import ModelError
from mdl.models.transformer import run


def test_repeats_have_their_period_and_answers_that_are_determined():
    found = repeats(200, np.random.default_rng(3), 64, 48, range(8, 24))
    assert found.tokens.shape == found.measured.shape == found.answers.shape == (200, 48)
    periods = found.measured.argmax(1)
    assert set(periods.tolist()) == set(range(8, 24))
    for tokens, measured, answers, r in zip(found.tokens, found.measured, found.answers, periods, strict=True):
        assert len(set(tokens[:r].tolist())) == r
        np.testing.assert_array_equal(tokens[r:], tokens[:-r])
        np.testing.assert_array_equal(measured, np.arange(48) >= r)
        for t in range(r, 48):  # the token behind the one other occurrence nearest before
            before = np.flatnonzero(tokens[:t] == tokens[t])[-1]
            assert answers[t] == tokens[before + 1]
        assert (answers[:r] == -1).all()


def test_additions_are_all_pairs_once():
    found = additions(MODULUS)
    assert len({tuple(row) for row in found.tokens.tolist()}) == len(found) == MODULUS**2
    assert (found.tokens[:, 2] == MODULUS).all()
    np.testing.assert_array_equal(found.answers[:, 2], found.tokens[:, :2].sum(1) % MODULUS)
    assert found.measured.sum() == MODULUS**2
    seen, unseen = split_additions(0)
    assert len(seen) == 5107
    assert len(seen) + len(unseen) == MODULUS**2
    both = {tuple(row) for part in (seen, unseen) for row in part.tokens.tolist()}
    assert len(both) == MODULUS**2
    assert (split_additions(1)[0].tokens != seen.tokens).any()


def test_balanced_strings_are_all_equally_likely():
    """The five balanced strings of three pairs, each a fifth of the time: 4 standard errors."""
    rng = np.random.default_rng(0)
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(3000):
        string = balanced(3, rng)
        assert is_balanced(string)
        counts[tuple(string.tolist())] = counts.get(tuple(string.tolist()), 0) + 1
    assert len(counts) == 5
    assert max(abs(c - 600) for c in counts.values()) < 4 * np.sqrt(3000 * 0.2 * 0.8)


@pytest.mark.parametrize(
    ("string", "answer"), [([0, 1], True), ([1, 0], False), ([0, 0, 1], False), ([0, 0, 1, 1, 0, 1], True)]
)
def test_is_balanced(string, answer):
    assert is_balanced(np.array(string)) is answer


def test_bracket_answers_are_right_and_half_of_them_yes():
    found = brackets(400, np.random.default_rng(1), 30)
    hard = 0
    for tokens, measured, answers in zip(found.tokens, found.measured, found.answers, strict=True):
        end = int(np.flatnonzero(tokens == ASK)[0])
        assert 10 <= end <= 30
        assert end % 2 == 0
        assert (tokens[end + 1 :] == PAD).all()
        assert measured.sum() == 1
        assert measured[end]
        assert answers[end] == is_balanced(tokens[:end])
        hard += int(answers[end] == 0 and (tokens[:end] == 0).sum() * 2 == end)
    share = (found.answers.max(1) == 1).mean()
    assert abs(share - 0.5) < 4 * 0.5 / np.sqrt(400)
    assert hard > 40  # as many opening as closing ones, and not balanced


def test_data_are_what_compare_reads(tmp_path):
    found = repeats(40, np.random.default_rng(5), 64, 48, range(8, 24))
    found.save(tmp_path / "data.npz")
    data = from_tokens(tmp_path / "data.npz", Sizes(), 0)
    assert data.measured is not None
    assert sum(len(part) for part in (data.fit, data.tune, data.held_out)) == 40
    assert data.special_tokens == ()
    for tokens, measured in zip((data.fit, data.tune, data.held_out), data.measured, strict=True):
        for row, mask in zip(tokens, measured, strict=True):
            r = int(mask.argmax())
            np.testing.assert_array_equal(row[r:], row[:-r])


def test_the_last_position_alone_has_the_model_s_logits():
    config = model_named("modular-addition").config
    params, tokens = initial_weights(config, 3), additions(MODULUS).tokens[::999]
    whole = run(config, params, tokens, ["logits"])["logits"][:, -1]
    np.testing.assert_allclose(last_logits(config, params, tokens), whole, atol=1e-5)


@pytest.fixture
def tiny():
    """Three steps of brackets on few examples."""
    small = model_named("brackets")
    return replace(small, steps=3, examples=lambda step, seed: brackets(8, np.random.default_rng([seed, step]), 30))


def test_an_interrupted_training_ends_at_the_same_weights(tiny, tmp_path):
    told: list[tuple[int, float, float]] = []
    whole = train(tiny, 7, tmp_path / "whole", lambda *report: told.append(report))
    train(tiny, 7, tmp_path / "parts", stop=2)
    again = train(tiny, 7, tmp_path / "parts")
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [step for step, _, _ in told] == [3]
    other = train(tiny, 8, tmp_path / "other")
    assert any(
        (np.asarray(a) != np.asarray(b)).any() for a, b in zip(*map(jax.tree.leaves, (whole, other)), strict=True)
    )
    loss, accuracy = figures(tiny, whole, brackets(64, np.random.default_rng(9), 30))
    assert 0.3 < loss < 2.0
    assert 0.2 < accuracy < 0.8
    assert as_model(tiny, whole).fingerprint == as_model(tiny, again).fingerprint


def test_a_checkpoint_is_whole(tmp_path):
    tree = {"a": np.arange(3.0), "b": [np.ones((2, 2))]}
    save(tmp_path / "c.npz", tree, 5)
    found, step = restore(tmp_path / "c.npz", tree)
    assert step == 5
    np.testing.assert_array_equal(found["b"][0], tree["b"][0])
    assert [p.name for p in tmp_path.iterdir()] == ["c.npz"]


def test_there_are_five_models():
    assert list(models()) == ["induction-1", "induction-2", "induction-4", "modular-addition", "brackets"]
    with pytest.raises(ModelError, match="Did you mean 'induction-2'"):
        model_named("induction2")
