"""A scorecard as one picture: total bits a token against N, and rate against KL.

Drawn with matplotlib's Agg canvas on a figure of its own: no global state of matplotlib is touched.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mdl.ledger import Score, Scorecard
from mdl.report.answer import answer, setting_text
from mdl.report.envelope import (
    LARGEST_TOKENS,
    YARDSTICK,
    Overtaking,
    Setting,
    headline,
    horizon,
    overtakings,
    ranked,
    token_grid,
    winners,
)
from mdl.report.figures import count, fidelity_text, human, interval_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito 2008, without black (the yardstick's) and yellow (too faint on white).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195")
DASHES = ("-", (0, (5.0, 1.6)), (0, (1.2, 1.2)), (0, (6.0, 1.5, 1.2, 1.5)))
YARDSTICK_COLOUR = "#000000"
GREY, FAINT = "#555555", "#DDDDDD"
_SETTINGS: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 12.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "grid.color": "#EEEEEE",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.labelcolor": "#222222",
    "xtick.minor.visible": False,
    "ytick.minor.visible": False,
}
_HOW_TO_READ = (
    "Left: total(N) = static(N) + N × (state + residual), static paid on first use. Yellow: the shortest total; "
    "circles: where the lead changes, with the 95 % interval of that N. Beside the names: bits a token at "
    "the largest N.\nRight: what a token costs once the static bits are paid, against the KL that the decoded "
    "reconstruction causes. Dots: the scored fidelities."
)
_MAX_CROSSINGS_LABELLED = 8
_LABEL_POINTS = 17.0  # the least distance of two labels, in points


@dataclass(frozen=True)
class Style:
    """How one explanation is drawn in both panels."""

    colour: str
    dash: str | tuple[int, tuple[float, ...]]
    width: float


def draw(scorecard: Scorecard, path: Path) -> None:
    """Draw the picture into a PNG file of 2000 x 1125 pixels, written beside it first and renamed."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=(20, 11.25), dpi=100, facecolor="white")
        FigureCanvasAgg(figure)
        _compose(figure, scorecard)
        temporary = path.with_name(path.name + ".partial")
        figure.savefig(temporary, format="png")
    os.replace(temporary, path)


def _compose(figure: Figure, scorecard: Scorecard) -> None:
    setting = headline(scorecard)
    scores = ranked(scorecard, setting)
    styles = assign_styles([s.explanation for s in scores])
    left = figure.add_gridspec(2, 1, height_ratios=(24, 1), left=0.05, right=0.43, top=0.8, bottom=0.115, hspace=0.03)
    right = figure.add_gridspec(1, 1, left=0.625, right=0.85, top=0.8, bottom=0.115)
    totals = figure.add_subplot(left[0])
    strip = figure.add_subplot(left[1], sharex=totals)
    plane = figure.add_subplot(right[0])
    _title(figure, scorecard)
    _draw_totals(totals, scorecard, setting, scores, styles)
    _draw_strip(strip, scorecard, setting, scores, styles)
    _draw_plane(plane, scorecard, setting, scores, styles)


def assign_styles(names: Sequence[str]) -> dict[str, Style]:
    """A colour and a dash for each explanation; the yardstick is black and solid."""
    styles = {YARDSTICK: Style(YARDSTICK_COLOUR, "-", 2.2)}
    for index, name in enumerate(n for n in names if n != YARDSTICK):
        cycle, colour = divmod(index, len(COLOURS))
        styles[name] = Style(COLOURS[colour], DASHES[cycle % len(DASHES)], 2.2)
    return styles


def _title(figure: Figure, scorecard: Scorecard) -> None:
    """The answer, the task under it, and at the bottom how to read the panels."""
    task = scorecard.task
    size, lines = 19.0, textwrap.wrap(answer(scorecard), 130)
    if len(lines) > 2:
        size, lines = 16.0, textwrap.wrap(answer(scorecard), 155)
    figure.text(0.018, 0.972, "\n".join(lines), fontsize=size, fontweight="bold", va="top", linespacing=1.25)
    parts = [f"{key} {task[key]}" for key in ("model", "region") if key in task]
    if "held_out_tokens" in task:
        parts.append(f"rates from {count(float(task['held_out_tokens']))} held-out tokens")
    figure.text(0.018, 0.958 - 0.034 * len(lines) * size / 19.0, "     ".join(parts), fontsize=13, color=GREY, va="top")
    figure.text(0.018, 0.018, _HOW_TO_READ, fontsize=11.5, color=GREY, va="bottom", linespacing=1.4)


def _draw_totals(
    axes: Axes, scorecard: Scorecard, setting: Setting, scores: Sequence[Score], styles: Mapping[str, Style]
) -> None:
    """Left panel: total(N) / N of every explanation, the lower envelope, and where the lead changes."""
    tokens = token_grid()
    lines = {s.explanation: s.total(tokens) / tokens for s in scores}
    envelope = np.min(np.stack(list(lines.values())), axis=0)
    axes.plot(tokens, envelope, color="#F0E442", linewidth=11, alpha=0.75, solid_capstyle="round", zorder=1)
    for name, line in lines.items():
        style = styles[name]
        axes.plot(tokens, line, color=style.colour, linestyle=style.dash, linewidth=style.width, zorder=3)
    # A line without a rate falls for ever: the panel ends a little below the shortest total at the horizon.
    shortest = min(float(s.total(horizon(scorecard))) for s in scores) / horizon(scorecard)
    low, high = max(float(envelope.min()), shortest / 30), float(max(line.max() for line in lines.values()))
    changes = overtakings(scorecard, setting)
    rows = _stagger([float(np.log10(c.tokens)) for c in changes], apart=2.6)
    room = 0.05 + 0.034 * (max(rows, default=0) + 1)  # the share of the height that the labels of crossings take
    bottom = low / (high / low) ** (room / (1 - room))
    axes.set(xscale="log", yscale="log", xlim=(1, LARGEST_TOKENS), ylim=(bottom, high * 1.6))
    axes.set_title(
        f"Total bits a token {setting_text(setting)}: lower is better, and it depends on N",
        loc="left", fontsize=14.5, pad=10,
    )  # fmt: skip
    axes.set_ylabel("total(N) / N, bits a token")
    axes.tick_params(labelbottom=False, length=0)
    _human_ticks(axes, "y")
    _mark_horizon(axes, scorecard)
    _mark_crossings(axes, scores, changes, rows)
    _label_ends(axes, [(s.explanation, LARGEST_TOKENS, float(lines[s.explanation][-1])) for s in scores], styles, True)


def _mark_horizon(axes: Axes, scorecard: Scorecard) -> None:
    marks = [(horizon(scorecard), "horizon")]
    training = scorecard.task.get("training_tokens")
    if training is not None:
        marks.append((float(training), "model's training"))
    for n, name in marks:
        axes.axvline(n, color="#999999", linewidth=1.1, linestyle=(0, (2, 2)), zorder=0)
        axes.annotate(
            f"{name}: N = {count(n)}", (n, 1), (5, -4), xycoords=("data", "axes fraction"), textcoords="offset points",
            rotation=90, ha="left", va="top", fontsize=11, color=GREY,
        )  # fmt: skip


def _mark_crossings(axes: Axes, scores: Sequence[Score], changes: Sequence[Overtaking], rows: Sequence[int]) -> None:
    """A dot where the lead changes, its interval as a bar, and its N on a line down to the strip."""
    by_name = {s.explanation: s for s in scores}
    bottom = axes.get_ylim()[0]
    for change, row in zip(changes, rows, strict=True):
        height = float(by_name[change.winner].total(change.tokens)) / change.tokens
        axes.plot([change.tokens] * 2, [bottom, height], color=GREY, linewidth=0.9, zorder=2)
        if change.interval is not None:
            ends = np.clip([change.interval.low, change.interval.high], 1, LARGEST_TOKENS)
            axes.plot(ends, [height] * 2, color="black", linewidth=1.8, zorder=5)
            axes.plot(ends, [height] * 2, "|", color="black", markersize=17, markeredgewidth=1.8, zorder=5)
        axes.plot([change.tokens], [height], "o", color="white", markeredgecolor="black", markersize=5, zorder=6)
        if len(changes) > _MAX_CROSSINGS_LABELLED:
            continue
        interval = f" {interval_text(change.interval)}" if change.interval else ""
        axes.annotate(
            f"N = {count(change.tokens)}{interval}", (change.tokens, 0), (5, 5 + 19 * row),
            xycoords=("data", "axes fraction"), textcoords="offset points", fontsize=11.5, zorder=7,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )  # fmt: skip


def _draw_strip(
    axes: Axes, scorecard: Scorecard, setting: Setting, scores: Sequence[Score], styles: Mapping[str, Style]
) -> None:
    """Under the left panel: who has the shortest total at each N."""
    changes = overtakings(scorecard, setting)
    first = scores[int(winners(scores, np.array([1.0]))[0])].explanation
    edges = [1.0, *(c.tokens for c in changes), LARGEST_TOKENS]
    for start, end, name in zip(edges, edges[1:], [first, *(c.winner for c in changes)], strict=False):
        axes.axvspan(start, end, facecolor=styles[name].colour, edgecolor="white", linewidth=1.5)
        decades = np.log10(end / start)
        if decades * 6.8 >= len(_short(name)):  # about 6.8 letters fit into a decade
            axes.text(
                np.sqrt(start * end), 0.5, _short(name), transform=axes.get_xaxis_transform(), color="white",
                ha="center", va="center", fontsize=11.5, fontweight="bold",
            )  # fmt: skip
    axes.set_xlabel("N, the number of tokens to explain        (the bar says which total is the shortest)")
    axes.set_yticks([])
    axes.grid(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="x", length=0, pad=5)
    _human_ticks(axes, "x")


def _draw_plane(
    axes: Axes, scorecard: Scorecard, setting: Setting, scores: Sequence[Score], styles: Mapping[str, Style]
) -> None:
    """Right panel: the rate against the KL that it leaves, one curve an explanation."""
    ends, exact = [], []
    for score in scores:
        name, style = score.explanation, styles[score.explanation]
        same = [s for s in scorecard.scores if s.explanation == name and s.phenomenon == setting[0]]
        frontier = rate_frontier(same)
        if not frontier:
            exact.append(f"{name} ({human(score.rate)} bits a token)")
            continue
        kl, rate = zip(*frontier, strict=True)
        axes.plot(kl, rate, color=style.colour, linestyle=style.dash, linewidth=style.width, zorder=3)
        scored = [(s.kl_bits, s.rate) for s in same if s.kl_bits > 0]
        axes.plot(
            [k for k, _ in scored], [r for _, r in scored], "o", color=style.colour, markersize=6.5,
            markeredgecolor="white", markeredgewidth=0.8, zorder=4,
        )  # fmt: skip
        ends.append((name, *frontier[-1]))
    axes.set(xscale="log")
    axes.set_ylim(bottom=0)
    axes.set_title("Bits a token for a given closeness: lower left is better", loc="left", fontsize=14.5, pad=28)
    axes.set_xlabel("KL that remains, bits a token (measured; left: closer to the model)")
    axes.set_ylabel("state + residual, bits a token")
    axes.tick_params(length=0)
    _human_ticks(axes, "x")
    if exact:
        text = textwrap.fill("Leaves no KL at all, so not on this scale: " + ", ".join(exact), 44)
        axes.text(0.02, 0.015, text, transform=axes.transAxes, va="bottom", fontsize=11, color=GREY)
    _mark_targets(axes, scorecard, setting)
    _label_ends(axes, ends, styles, with_values=False)


def _mark_targets(axes: Axes, scorecard: Scorecard, setting: Setting) -> None:
    """The fidelities as vertical lines, at the KL that the yardstick was measured to leave."""
    for score in scorecard.scores:
        if score.explanation != YARDSTICK or score.phenomenon != setting[0] or score.fidelity is None:
            continue
        chosen = score.fidelity == setting[1]
        axes.axvline(score.kl_bits, color="black" if chosen else "#999999", linewidth=1.3, linestyle=":", zorder=1)
        axes.annotate(
            f"{fidelity_text(score.fidelity)}{' of the null’s KL' if chosen else ''}", (score.kl_bits, 1), (0, 3),
            xycoords=("data", "axes fraction"), textcoords="offset points", ha="center", va="bottom",
            fontsize=11.5, color="black" if chosen else GREY, fontweight="bold" if chosen else "normal",
        )  # fmt: skip


def rate_frontier(scores: Sequence[Score]) -> list[tuple[float, float]]:
    """The (KL, rate) points of one explanation that no other of its points beats in both, by growing KL."""
    points = sorted({p for s in scores for p in [*s.curve, (s.kl_bits, s.rate)] if p[0] > 0})
    frontier: list[tuple[float, float]] = []
    for kl, rate in points:
        if not frontier or rate < frontier[-1][1]:
            frontier.append((kl, rate))
    return frontier


def _label_ends(
    axes: Axes, ends: Sequence[tuple[str, float, float]], styles: Mapping[str, Style], with_values: bool
) -> None:
    """A label to the right of the axes for each line's last point (name, x, y), spread so that none overlap."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    box = axes.get_position()
    width, tall = 72.0 * box.width * figure.get_figwidth(), 72.0 * box.height * figure.get_figheight()  # points
    apart = _LABEL_POINTS / tall
    points = [axes.transAxes.inverted().transform(axes.transData.transform((x, y))) for _, x, y in ends]
    inside = [(float(p[0]), min(max(float(p[1]), 0.0), 1.0)) for p in points]
    heights = spread([y for _, y in inside], apart)
    for (name, _, y), point, height in zip(ends, inside, heights, strict=True):
        colour = styles[name].colour
        axes.plot(
            [point[0], 1.008, 1.0 + 18 / width], [point[1], point[1], height], transform=axes.transAxes, clip_on=False,
            color=colour, linewidth=0.9, alpha=0.8,
        )  # fmt: skip
        axes.plot(
            [1.0 + 18 / width, 1.0 + 42 / width], [height, height], transform=axes.transAxes, clip_on=False,
            color=colour, linestyle=styles[name].dash, linewidth=styles[name].width,
        )  # fmt: skip
        text = _short(name) + (f"  {human(y)}" if with_values else "")
        axes.text(
            1.0 + 47 / width, height, text, transform=axes.transAxes, color=colour, va="center",
            fontsize=12.5, fontweight="bold" if name == YARDSTICK else "normal",
        )  # fmt: skip


def spread(heights: Sequence[float], apart: float) -> list[float]:
    """Positions as near to `heights` as order and a distance of `apart` allow, in least squares, within [0, 1].

    Pool adjacent violators: neighbours that would overlap are stacked around their mean (Barlow et al. 1972).
    """
    order = np.argsort(heights, kind="stable")
    # Shifted by their place in the stack, the positions only have to be non-decreasing.
    blocks: list[list[float]] = []  # sum, number
    for place, index in enumerate(order):
        blocks.append([heights[index] - place * apart, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, number = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += number
    free = (
        np.concatenate([np.full(int(number), total / number) for total, number in blocks]) if blocks else np.array([])
    )
    free = np.clip(free, 0.0, max(0.0, 1.0 - apart * (len(heights) - 1)))
    placed = np.empty(len(heights))
    placed[order] = free + apart * np.arange(len(heights))
    return [float(h) for h in placed]


def _stagger(positions: Sequence[float], apart: float) -> list[int]:
    """The lowest row for each label, left to right, in which the label before it is at least `apart` away."""
    rows: list[int] = []
    last: list[float] = []
    for position in positions:
        row = next((r for r, end in enumerate(last) if position - end >= apart), len(last))
        last[row : row + 1] = [position]
        rows.append(row)
    return rows


def _short(name: str, limit: int = 22) -> str:
    """A long name without its middle: names of one family differ at their ends."""
    keep = (limit - 1) // 2
    return name if len(name) <= limit else f"{name[:keep]}…{name[-keep:]}"


def _human_ticks(axes: Axes, which: str) -> None:
    """Ticks as people write them: 1, 100, 10k, 1M."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(base=10, numticks=12))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
