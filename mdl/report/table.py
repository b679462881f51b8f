"""A scorecard as tables for the terminal. No bit is computed here: only what `Scorecard` and `Score` say is shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from mdl.ledger import Score, Scorecard
from mdl.report.answer import answer, setting_text, yardstick_text
from mdl.report.envelope import (
    LARGEST_TOKENS,
    YARDSTICK,
    Setting,
    headline,
    horizon,
    paired,
    ranked,
    token_grid,
    winners,
)
from mdl.report.figures import count, human, interval_text, percent, with_error
from mdl.report.published import published_table

MARKS = {"coded": "●", "codelength": "○", "estimate": "~"}
_MEANING = {
    "coded": "a bitstream of that length exists and was decoded",
    "codelength": "exact length of a named decodable code",
    "estimate": "asymptotic or model-based",
}
# Keys of `Score.beside`, with the header and the format of each.
BESIDE = {
    "l0": ("L0", count),
    "explained_variance": ("expl.\nvar.", percent),
    "ce_recovered": ("CE\nrecov.", percent),
    "kl_recovered": ("KL\nrecov.", percent),
    "flops_ratio": ("FLOPs\nratio", human),
}
PUBLISHED_TITLE = "what others' formulas say (~ estimates, never added up), bits a token"
COMPUTE = "compute_recovered"  # of `Score.beside`
_UNBOUNDED = 10_000  # columns: wide enough to measure what a table would take


def print_scorecard(scorecard: Scorecard, console: Console) -> None:
    """The answer, the headline's table, total(N), the other settings' tables, legend and notes, on a rich console."""
    console.print(Text(answer(scorecard), style="bold"), soft_wrap=False)
    console.print(Text(_task_line(scorecard.task), style="dim"))
    first = headline(scorecard)
    for setting in [first, *(s for s in scorecard.settings if s != first)]:
        console.print()
        console.print(Text(_setting_title(scorecard, setting), style="italic"))
        console.print(setting_table(scorecard, setting, console.width))
        if line := training_line(ranked(scorecard, setting)):
            console.print(Text(line, style="dim"))
        if setting == first:
            console.print()
            console.print(Text(_totals_title(scorecard, setting), style="italic"))
            console.print(totals_table(scorecard, setting))
            envelope = envelope_table(scorecard, setting)
            if envelope is not None:
                n = count(horizon(scorecard))
                console.print()
                console.print(Text(f"shorter than that by, with precisions chosen for each N, not for {n}:", "italic"))
                console.print(envelope)
            published = published_table(ranked(scorecard, setting))
            if published is not None:
                console.print()
                console.print(Text(f"{PUBLISHED_TITLE}, {setting_text(setting)}:", "italic"))
                console.print(published)
    console.print()
    console.print(_legend(scorecard))


def setting_table(scorecard: Scorecard, setting: Setting, width: int) -> RenderableType:
    """Scores of one phenomenon at one fidelity, shortest total at the horizon first."""
    scores = ranked(scorecard, setting)
    keys = [k for k in BESIDE if any(k in s.beside for s in scores)]
    one = _filled_table(scorecard, setting, scores, keys, wide=True)
    if Console(width=_UNBOUNDED).measure(one).maximum <= width:
        return one
    narrow = _filled_table(scorecard, setting, scores, [], wide=False)
    return Group(narrow, _beside_table(scores, keys)) if keys else narrow


def training_line(scores: Sequence[Score]) -> str:
    """Shares of the model's training compute, empty where its training is not known."""
    known = [s for s in scores if COMPUTE in s.beside]
    if not known:
        return ""
    key = f"{COMPUTE}_corrected"
    shown = [f"{s.explanation} {_training_share(s, COMPUTE)}{_training_share(s, key)}" for s in known]
    coder = " (with the residual coder)" if any(key in s.beside for s in known) else ""
    return f"share of its training compute at which the model was as good as explained{coder}: {', '.join(shown)}"


def _training_share(score: Score, key: str) -> str:
    text = percent(score.beside[key]) if key in score.beside else ""
    return f" ({text})" if text and key != COMPUTE else text


def totals_table(scorecard: Scorecard, setting: Setting) -> Table:
    """total(N) in bits for N = 1, 10, ... 10^10 and the model's training tokens; the shortest is bold and starred."""
    scores, tokens = ranked(scorecard, setting), [10.0**k for k in range(11)]
    training = scorecard.task.get("training_tokens")
    if training is not None:
        tokens = sorted({*tokens, float(training)})
    table = Table(box=None, padding=0, pad_edge=False)
    table.add_column("N", overflow="fold")
    for n in tokens:
        style = "bold magenta" if training is not None and n == float(training) else "bold"
        table.add_column(count(n) + " ", justify="right", no_wrap=True, min_width=7, header_style=style)
    best = [min(scores, key=lambda s: float(s.total(n))) for n in tokens]
    for score in scores:
        cells = [_total_cell(score, n, score is winner) for n, winner in zip(tokens, best, strict=True)]
        table.add_row(Text(score.explanation), *cells)
    return table


def envelope_table(scorecard: Scorecard, setting: Setting) -> Table | None:
    """How much shorter total(N) is where every precision is chosen anew for N; None where that was not tried."""
    others = sorted({s.horizon for s in scorecard.envelope})
    if not others:
        return None
    tokens = sorted({*others, horizon(scorecard)})
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    table.add_column("N")
    for n in tokens:
        table.add_column(count(n), justify="right", no_wrap=True, header_style="bold")
    for score in ranked(scorecard, setting):
        gains = [1.0 - scorecard.lowest(score, n) / float(score.total(n)) for n in tokens]
        table.add_row(Text(score.explanation), *(f"{100 * gain:.1f}%" if gain > 0 else "0" for gain in gains))
    return table


def _setting_title(scorecard: Scorecard, setting: Setting) -> str:
    what = setting[0] if setting[1] is None else f"{setting[0]} {setting_text(setting)}"
    return f'{what}, in bits, N = {count(horizon(scorecard))} tokens ("nothing" is {yardstick_text(setting)})'


def _totals_title(scorecard: Scorecard, setting: Setting) -> str:
    title = f"total(N) in bits {setting_text(setting)}, * the shortest"
    training = scorecard.task.get("training_tokens")
    return title if training is None else title + f"; the model was trained on {count(float(training))} tokens"


def _filled_table(scorecard: Scorecard, setting: Setting, scores: list[Score], keys: list[str], wide: bool) -> Table:
    table = _score_table(scorecard, setting, keys, wide)
    for score in scores:
        cells = [*_score_cells(scorecard, score), *(_beside_cell(score, k) for k in keys)]
        table.add_row(*map(Text, cells), style=_row_style(score))
    return table


def _score_table(scorecard: Scorecard, setting: Setting, keys: list[str], wide: bool) -> Table:
    n = count(horizon(scorecard))
    against = "coder alone" if setting[1] is not None else "the null"
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0) if wide else 0, pad_edge=False)
    right: dict[str, Any] = {"justify": "right", "no_wrap": True}
    table.add_column("explanation", overflow="fold", min_width=12)
    table.add_column("static\nkbit", **right)
    table.add_column("state\nper token", **right)
    table.add_column("residual\nper token", **right)
    table.add_column("total\n/ N", **right, style="bold")
    table.add_column(f"saved\nat {n}", **right)
    table.add_column(f"shorter than\n{against}", no_wrap=True)
    table.add_column("KL\nper token" if wide else "KL", **right)
    table.add_column("", no_wrap=True)
    for key in keys:
        table.add_column(BESIDE[key][0], **right, style="dim", header_style="dim")
    return table


def _score_cells(scorecard: Scorecard, score: Score) -> list[str]:
    n = horizon(scorecard)
    setting = (score.phenomenon, score.fidelity)
    yardstick = any(s.explanation == YARDSTICK for s in scorecard.select(*setting))
    return [
        score.explanation,
        human(score.static.whole_bits / 1000.0),
        with_error(score.column("state"), score.column_stderr("state")),
        with_error(score.column("residual"), score.column_stderr("residual")),
        human(float(score.total(n)) / n),
        percent(scorecard.saved(score, n)) if yardstick and score.explanation != YARDSTICK else "",
        _wins(scorecard, score) if yardstick and score.explanation != YARDSTICK else "",
        human(score.kl_bits),
        MARKS[score.obtained],
    ]


def _wins(scorecard: Scorecard, score: Score) -> str:
    """For which N the total is shorter than the yardstick's."""
    setting = (score.phenomenon, score.fidelity)
    c = paired(scorecard, score.explanation, YARDSTICK, setting)
    if c is not None and c.crossing is not None:
        when = "from" if c.overtaker == score.explanation else "until"
        return f"{when} {count(c.crossing.value)} {interval_text(c.crossing)}"
    none = next(s for s in scorecard.select(*setting) if s.explanation == YARDSTICK)
    shortest = set(winners([none, score], token_grid()).tolist())
    return {(0,): "never", (1,): "always"}.get(tuple(sorted(shortest)), "for some N")


def _row_style(score: Score) -> str:
    return "cyan" if score.explanation == YARDSTICK else ""


def _beside_cell(score: Score, key: str) -> str:
    return BESIDE[key][1](score.beside[key]) if key in score.beside else ""


def _beside_table(scores: list[Score], keys: list[str]) -> Table:
    """The figures that people know, for terminals too narrow to have them in the same table."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, style="dim", header_style="dim")
    table.add_column("beside, not in the score", no_wrap=True, overflow="ellipsis", style="dim")
    for key in keys:
        table.add_column(BESIDE[key][0].replace("\n", " "), justify="right", no_wrap=True, style="dim")
    for score in scores:
        table.add_row(Text(score.explanation), *(_beside_cell(score, k) for k in keys))
    return table


def _total_cell(score: Score, n: float, shortest: bool) -> Text:
    text = human(float(score.total(n)))
    return Text(f"{text}*", style="bold green") if shortest else Text(f"{text} ")


def _task_line(task: Mapping[str, Any]) -> str:
    parts = [
        f"model {task['model']}" if "model" in task else "",
        f"region {task['region']}" if "region" in task else "",
    ]
    if "held_out_tokens" in task:
        units = f" in {count(task['held_out_units'])} documents" if "held_out_units" in task else ""
        parts.append(f"rates from {count(task['held_out_tokens'])} held-out tokens{units}")
    return "; ".join(parts)


def _legend(scorecard: Scorecard) -> Text:
    used = [o for o in MARKS if any(s.obtained == o for s in scorecard.scores)]
    lines = ["; ".join(f"{MARKS[o]} {o}: {_MEANING[o]}" for o in used)]
    lines.append(
        f"static: the whole message, paid on first use; ±: standard error by document; [a–b]: 95 % interval, "
        f"N from 1 to {count(LARGEST_TOKENS)}"
    )
    notes = dict.fromkeys(f"{s.explanation}: {note}" for s in scorecard.scores for note in s.notes)
    return Text("\n".join([*lines, *notes]), style="dim")
