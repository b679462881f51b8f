"""The horizon N: precisions chosen for it, rows paid on first use, and the lower envelope over several N."""

from __future__ import annotations

import numpy as np
import pytest

from decompositions.baselines import TokenTable
from mdl.ledger import Scorecard
from mdl.protocols import Settings
from mdl.report.table import envelope_table
from mdl.score import score
from mdl.task import ACTIVATIONS, Task

pytestmark = pytest.mark.usefixtures("in_little_time")

HORIZON, FEW = 1e5, 200.0


@pytest.fixture(scope="module")
def card(tiny_task: Task, in_little_time: None) -> Scorecard:
    found, _ = score(
        tiny_task, [TokenTable()], phenomena=[ACTIVATIONS], fidelities=[0.1], horizon=HORIZON, envelope=[FEW]
    )
    return found


def test_a_horizon_of_its_own_makes_a_score_of_its_own(card: Scorecard) -> None:
    (main,), (anew,) = card.scores, card.envelope
    assert (main.horizon, anew.horizon) == (HORIZON, FEW)
    assert (anew.explanation, anew.fidelity) == (main.explanation, main.fidelity)
    assert anew.kl_bits == pytest.approx(main.kl_bits, rel=0.05)
    # Fewer tokens to spread it over: a coarser table, and more left to its residual coder.
    assert anew.static.whole_bits < 0.8 * main.static.whole_bits
    assert anew.rate > main.rate


def test_the_envelope_is_the_shorter_of_both_at_every_horizon(card: Scorecard) -> None:
    (main,), (anew,) = card.scores, card.envelope
    for n in (1.0, FEW, 1e4, HORIZON, 1e8):
        assert card.lowest(main, n) == min(main.total(n), anew.total(n))
    assert card.lowest(main, FEW) == anew.total(FEW) < main.total(FEW)
    assert card.lowest(main, 1e8) == main.total(1e8)


def test_the_table_says_what_one_setting_loses(card: Scorecard) -> None:
    table = envelope_table(card, (ACTIVATIONS, 0.1))
    assert table is not None
    gain = 1 - card.lowest(card.scores[0], FEW) / card.scores[0].total(FEW)
    assert [[str(c) for c in column.cells] for column in table.columns] == [
        ["token-table"],
        [f"{100 * gain:.1f}%"],
        ["0"],
    ]
    assert envelope_table(Scorecard(card.task, card.scores), (ACTIVATIONS, 0.1)) is None


def test_rows_that_are_paid_are_used() -> None:
    """A row of frequency f is paid for by the share 1 - (1 - f)^N of receivers, and each of these uses it the more."""
    settings = Settings(100.0, 0.1, np.eye(4))
    rare, always = settings.static_step(1e-4, 1e-4), settings.static_step(1e-4)
    share = 1 - (1 - 1e-4) ** 100
    assert rare == pytest.approx(always * np.sqrt(share), rel=1e-9)
    # At N = 1 a row that is used is used once, whatever its frequency: APD's mechanistic description length.
    once = Settings(1.0, 0.1, np.eye(4))
    assert once.static_step(1e-4, 1e-4) == pytest.approx(once.static_step(1.0, 1.0), rel=1e-6)
    # For N far above 1 / f nothing changes.
    many = Settings(1e9, 0.1, np.eye(4))
    assert many.static_step(1e-4, 1e-4) == pytest.approx(many.static_step(1e-4), rel=1e-9)
