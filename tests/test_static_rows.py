"""Static rows under the metric: what prediction saves, and what the receiver gets."""

from __future__ import annotations

import numpy as np
import pytest

from mdl.errors import MessageError
from mdl.message import Section, encode_message
from mdl.protocols import Settings
from mdl.static_rows import FEWEST_ROWS, metric_rows, predict_columns

ROWS, WIDTH = 300, 12


def setting(horizon: float = 1e5, step: float = 0.1) -> Settings:
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(WIDTH, WIDTH)))[0]
    return Settings(horizon, step, (rotation * np.logspace(-1, 0.5, WIDTH)) @ rotation.T)


def test_prediction_is_used_where_it_pays() -> None:
    rng = np.random.default_rng(2)
    rows = rng.normal(size=(2000, WIDTH)) @ rng.normal(size=(WIDTH, WIDTH))
    energy = np.full(len(rows), 0.1)
    used = metric_rows(rows, energy, setting(), predict_columns(rows))
    assert used.lattice is not None
    assert used.lattice.prediction is not None
    assert used.lattice.prediction.any()
    plain = metric_rows(rows, energy, setting())
    assert (
        encode_message([Section("x", (), (used,))]).whole_bits < encode_message([Section("x", (), (plain,))]).whole_bits
    )
    white = rng.normal(size=(30, WIDTH))
    unused = metric_rows(white, energy[:30], setting(), predict_columns(white))
    assert unused.lattice is not None
    assert unused.lattice.prediction is None


def test_static_distortion_is_what_the_settings_ask_for() -> None:
    """N E[c^2] |e|_G^2 is d step^2 / 12: the static error's share is that of one step of the residual coder, over N."""
    rows = np.random.default_rng(1).normal(size=(ROWS, WIDTH))
    energy = np.exp2(np.random.default_rng(3).uniform(-8, 0, ROWS))
    settings = setting(horizon=1e6)
    errors = (rows - metric_rows(rows, energy, settings).values()) @ settings.root
    shares = settings.horizon * energy * np.square(errors).sum(1)
    assert shares.mean() == pytest.approx(WIDTH * settings.step**2 / 12, rel=0.1)


def test_few_rows_go_number_by_number() -> None:
    rows = np.random.default_rng(4).normal(size=(FEWEST_ROWS - 1, WIDTH))
    assert metric_rows(rows, np.ones(len(rows)), setting()).lattice is None
    with pytest.raises(MessageError, match="NaN"):
        metric_rows(np.full((40, WIDTH), np.nan), np.ones(40), setting())
    with pytest.raises(MessageError, match="lower fidelity"):
        metric_rows(np.ones((40, WIDTH)), np.ones(40), setting(step=1e-30))


def test_rows_paid_for_at_their_first_use_are_finer() -> None:
    """A row that is used once in 10 N tokens is paid for in one of ten messages, and then used about once."""
    rows, energy = np.random.default_rng(1).normal(size=(ROWS, WIDTH)), np.full(ROWS, 1e-6)
    always = metric_rows(rows, energy, setting(), frequency=1.0)
    rare = metric_rows(rows, energy, setting(), frequency=np.full(ROWS, 1e-6))
    finer = always.exponents - rare.exponents
    assert np.abs(finer + 2 * np.log2(-np.expm1(-0.1))).max() < 1  # quarter octaves


def test_wide_rows_are_not_predicted() -> None:
    assert predict_columns(np.ones((20, 1025))) is None
