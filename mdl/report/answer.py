"""The answer of a scorecard in one sentence."""

from __future__ import annotations

from mdl.ledger import Score, Scorecard
from mdl.report.envelope import YARDSTICK, Overtaking, Setting, headline, horizon, overtakings, ranked, rate_difference
from mdl.report.figures import count, fidelity_text, human, interval_text, percent


def answer(scorecard: Scorecard) -> str:
    """Which explanation has the shortest total at the horizon, by how much, how sure, and from which N on."""
    setting, n = headline(scorecard), horizon(scorecard)
    scores = ranked(scorecard, setting)
    best = scores[0]
    words = setting_text(setting)
    where = f"{words[0].upper()}{words[1:]} and N = {count(n)} tokens"
    per_token = f"{human(float(best.total(n)) / n)} bits a token"
    if best.explanation == YARDSTICK:
        return f"{where}, nothing beats {yardstick_text(setting)}: {per_token}{_runner_up(scorecard, scores)}."
    return (
        f"{where}, {best.explanation} has the shortest total: {per_token}"
        f"{_margin(scorecard, best, setting)}{_history(scorecard, best, setting)}."
    )


def setting_text(setting: Setting) -> str:
    """A setting in words: "at 1 % of the null's KL", "for behaviour"."""
    phenomenon, fidelity = setting
    return f"at {fidelity_text(fidelity)} of the null's KL" if fidelity is not None else f"for {phenomenon}"


def yardstick_text(setting: Setting) -> str:
    """What "nothing" means at a setting."""
    return "the standard coder alone" if setting[1] is not None else "the null"


def _margin(scorecard: Scorecard, best: Score, setting: Setting) -> str:
    if not any(s.explanation == YARDSTICK for s in scorecard.select(*setting)):
        return ""
    text = f", {_points(scorecard.saved(best, horizon(scorecard)))} below {yardstick_text(setting)}"
    d = rate_difference(scorecard, best.explanation, YARDSTICK, setting)
    if d is None:
        return text
    level = f"{100 * d.level:.3g} % interval"
    return text + f" (its rate differs by {human(d.value)} bits a token, {level} {human(d.low)} to {human(d.high)})"


def _history(scorecard: Scorecard, best: Score, setting: Setting) -> str:
    """Where the winner takes the lead before the horizon, and where it loses it after."""
    n, name = horizon(scorecard), best.explanation
    changes = overtakings(scorecard, setting)
    before = [c for c in changes if c.winner == name and c.tokens <= n]
    after = [c for c in changes if c.loser == name and c.tokens > n]
    parts = []
    if before:
        parts.append(f"it overtakes {before[-1].loser} at N = {_at(before[-1])}")
    else:
        parts.append("it leads from the first token on")
    if after:
        parts.append(f"{after[0].winner} overtakes it at N = {_at(after[0])}")
    return "; " + ", and ".join(parts)


def _points(fraction: float) -> str:
    return percent(fraction).replace("%", " %")


def _at(change: Overtaking) -> str:
    return count(change.tokens) + (f" {interval_text(change.interval)}" if change.interval else "")


def _runner_up(scorecard: Scorecard, scores: list[Score]) -> str:
    if len(scores) < 2:
        return ""
    second = scores[1]
    above = _points(-scorecard.saved(second, horizon(scorecard)))
    return f"; the next, {second.explanation}, is {above} longer"
