from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mdl.errors import MDLError
from mdl.report.answer import answer
from mdl.report.envelope import headline, horizon, overtakings, ranked, rate_difference, token_grid, winners

SETTING = ("activations", 0.01)


def test_headline_is_one_percent_or_the_first_setting(scorecard):
    assert headline(scorecard) == SETTING
    rest = dataclasses.replace(scorecard, scores=tuple(s for s in scorecard.scores if s.fidelity != 0.01))
    assert headline(rest) == ("activations", 0.1)
    with pytest.raises(MDLError, match="no scores"):
        headline(dataclasses.replace(scorecard, scores=()))


def test_a_scorecard_without_a_horizon_is_refused(scorecard):
    with pytest.raises(MDLError, match="horizon"):
        horizon(dataclasses.replace(scorecard, task={}))


def test_ranking_is_by_total_at_the_horizon(scorecard):
    totals = [float(s.total(1e6)) for s in ranked(scorecard, SETTING)]
    assert totals == sorted(totals)
    assert len(totals) == 10


def test_overtakings_are_exactly_where_the_winner_changes(scorecard):
    scores = scorecard.select(*SETTING)
    changes = overtakings(scorecard, SETTING)
    assert [(c.loser, c.winner) for c in changes] == [("nothing", "affine"), ("affine", "table")]
    by_name = {s.explanation: s for s in scores}
    for c in changes:
        before, after = (
            [by_name[name].total(n) for name in (c.winner, c.loser)] for n in (c.tokens / 1.01, c.tokens * 1.01)
        )
        assert before[0] > before[1]
        assert after[0] < after[1]
        assert c.interval is not None
        assert c.interval.low < c.tokens < c.interval.high


def test_a_far_crossing_of_the_same_pair_is_not_taken_for_this_one(scorecard):
    moved = tuple(
        dataclasses.replace(c, crossing=dataclasses.replace(c.crossing, value=1e9)) if c.crossing else c
        for c in scorecard.comparisons
    )
    changes = overtakings(dataclasses.replace(scorecard, comparisons=moved), SETTING)
    assert [c.interval for c in changes] == [None, None]


def test_winners_against_a_plain_loop(scorecard):
    scores, grid = scorecard.select(*SETTING), token_grid()[::400]
    slow = [min(range(len(scores)), key=lambda i: float(scores[i].total(n))) for n in grid]
    assert np.array_equal(winners(scores, grid), slow)


def test_rate_differences_turn_with_the_order(scorecard):
    one = rate_difference(scorecard, "table", "nothing", SETTING)
    other = rate_difference(scorecard, "nothing", "table", SETTING)
    assert one.value == -other.value < 0
    assert one.low == -other.high < one.value < one.high
    assert rate_difference(scorecard, "table", "absent", SETTING) is None


def test_the_answer_names_winner_margin_interval_and_crossing(scorecard):
    assert answer(scorecard) == (
        "At 1 % of the null's KL and N = 1M tokens, table has the shortest total: 91.1 bits a token, 41.9 % below the "
        "standard coder alone (its rate differs by −66.1 bits a token, 95 % interval −67.1 to −65.1); it overtakes "
        "affine at N = 33.7k [28k–40.5k]."
    )


def test_the_answer_where_nothing_wins_and_where_the_lead_is_lost_later(scorecard):
    early = answer(dataclasses.replace(scorecard, task={**scorecard.task, "horizon": 10.0}))
    assert (
        "nothing beats the standard coder alone: 759 bits a token; the next, clusters(k=256), is 26.2 % longer" in early
    )
    middle = answer(dataclasses.replace(scorecard, task={**scorecard.task, "horizon": 5000.0}))
    assert "affine has the shortest total" in middle
    assert "it overtakes nothing at N = 917 [887–948], and table overtakes it at N = 33.7k" in middle


def test_the_answer_for_behaviour(scorecard):
    card = dataclasses.replace(scorecard, scores=tuple(s for s in scorecard.scores if s.phenomenon == "behaviour"))
    assert answer(card).startswith(
        "For behaviour and N = 1M tokens, table has the shortest total: 1.45 bits a token, 74.2 % below the null (its"
    )
