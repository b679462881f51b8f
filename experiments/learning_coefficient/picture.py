"""The picture of this experiment. Nothing is worked out here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito 2008.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Left: estimates beside the exact values; middle: against step and localisation; right: against the virial."""
    figure = Figure((17, 5.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = (figure.add_subplot(1, 3, i + 1) for i in range(3))
    _known(left, results["table"])
    _steps(middle, results["sweeps"])
    _virial(right, results["sweeps"])
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#EEEEEE")
        axes.set_axisbelow(True)
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial)
    partial.replace(path)


def _known(axes: Axes, rows: list[dict[str, Any]]) -> None:
    place = np.arange(len(rows))[::-1]
    axes.barh(place, [r["weights"] / 2 for r in rows], color="#E5E5E5", height=0.7, label="d / 2, were it regular")
    axes.plot([r["lambda"] for r in rows], place, "|", color="black", ms=16, mew=2, label="exact")
    axes.errorbar(
        [r["estimate"] for r in rows],
        place,
        xerr=[2 * r["stderr"] for r in rows],
        fmt="o",
        ms=5,
        color=COLOURS[0],
        label="estimate, 2 standard errors",
    )
    axes.set_yticks(place, [r["case"] for r in rows])
    axes.set(xscale="log", xlabel="local learning coefficient")
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.4, -0.1), ncols=3, fontsize=9)
    axes.set_title("Estimates where the coefficient is known", fontsize=11, loc="left")


def _steps(axes: Axes, rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(r["case"] for r in rows))
    marks = ("-", ":", "--")
    localisations = sorted({r["localisation"] for r in rows})
    for name, mark in zip(names, marks, strict=True):
        for localisation, colour in zip(localisations, COLOURS, strict=False):
            some = [
                r for r in rows if (r["case"], r["localisation"]) == (name, localisation) and r["ratio"] is not None
            ]
            axes.plot([r["share"] for r in some], [r["ratio"] for r in some], mark, color=colour, marker=".", lw=1.6)
        axes.plot([], [], mark, color="black", label=name)
    for localisation, colour in zip(localisations, COLOURS, strict=False):
        axes.plot([], [], color=colour, lw=4, label=f"localisation {localisation:g}")
    axes.axhline(1, color="black", lw=0.8)
    axes.set(xscale="log", ylim=(0.4, 1.8), xlabel="step  n beta h / 4  (1: the stiff direction diverges)")
    axes.set_ylabel("estimate / exact")
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    axes.set_title("A large step inflates, localisation takes away", fontsize=11, loc="left")


def _virial(axes: Axes, rows: list[dict[str, Any]]) -> None:
    for name, colour in zip(dict.fromkeys(r["case"] for r in rows), COLOURS, strict=False):
        some = [r for r in rows if r["case"] == name and r["ratio"] is not None]
        size = [20 + 25 * np.log10(r["localisation"] / 0.1) for r in some]
        axes.scatter([r["virial"] for r in some], [r["ratio"] for r in some], size, color=colour, alpha=0.7, label=name)
    axes.axhline(1, color="black", lw=0.8)
    axes.axvspan(0.9, 1.1, color="#F2F2F2", zorder=0)
    axes.set(xlim=(0.3, 1.8), ylim=(0.4, 1.8), xlabel="virial, E (w - w*) . grad U / d  (1 at equilibrium)")
    axes.set_ylabel("estimate / exact")
    axes.legend(frameon=False, fontsize=9, loc="upper left", title="larger dots: more localisation", title_fontsize=9)
    axes.set_title("The virial shows the step and slow chains, not localisation", fontsize=11, loc="left")
