"""Tables and pictures of a sweep, from its cells; no arithmetic but means over seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from experiments.mdl_sae_digits.shapes import KINDS

Cell = Mapping[str, Any]
HERE = Path(__file__).parent
SHOWN = 16  # features a row of the picture
FLOAT_BITS = 7.0  # of a value: what the figures of MDL-SAE for GPT-2 decode to
UNEXPLAINED = (0.4, 0.3, 0.2, 0.1)  # shares of the variance


def report(described: dict[str, Any], cells: Sequence[Cell], folder: Path, side: int) -> None:
    """Print every table, write results.json (results_DATA.json for other data than digits) and the two pictures."""
    suffix = "" if described["data"] == "digits" else f"_{described['data']}"
    console = Console(width=150)
    images = described["images"]
    console.print(
        f"{described['data']}: {images['fit']:,} images fitted on, {images['held_out']:,} scored; every explanation at "
        f"a mean squared error of {described['mse']:.3g} a pixel, {described['fidelity']:.0%} of the variance (grey "
        f"values 0 to {described['levels']}); a feature is a digit from a cosine of {described['threshold']:.3f} on"
    )
    tables = [grid_table(cells, n) for n in horizons(cells)]
    for table in (*tables, optimum_table(described, cells), formula_table(cells), shapes_table(cells)):
        console.print(f"\n{table.title}")  # as the table's own title it would be folded to the table's width
        table.title = None
        console.print(table)
    result = {**described, "cells": list(cells)}
    (HERE / f"results{suffix}.json").write_text(json.dumps(result, indent=1) + "\n")
    draw_totals(described, cells, HERE / f"totals{suffix}.png")
    draw_features(described, cells, folder, side, HERE / f"features{suffix}.png")


def horizons(cells: Sequence[Cell]) -> list[str]:
    """Every N of the cells' totals, as a key."""
    return list(cells[0]["totals"])


def grid(cells: Sequence[Cell]) -> dict[tuple[int, int], Cell]:
    """Autoencoders of seed 0 by width and k."""
    return {(c["width"], c["k"]): c for c in cells if "k" in c and c["seed"] == 0}


def baselines(cells: Sequence[Cell]) -> list[Cell]:
    return [c for c in cells if "k" not in c]


def grid_table(cells: Sequence[Cell], n: str) -> Table:
    """total(N) / N of each width and k, the shortest marked; what is no autoencoder stands in the title."""
    found = grid(cells)
    beside = ", ".join(f"{c['name']} {c['totals'][n]:.1f}" for c in baselines(cells))
    table = Table(title=f"total(N) / N, bits an image, N = {int(n):,} ({beside})")
    widths, sparsities = (sorted({key[i] for key in found}) for i in (0, 1))
    best = min(found, key=lambda key: found[key]["totals"][n])
    table.add_column("features", justify="right")
    for k in sparsities:
        table.add_column(f"k = {k}", justify="right")
    for width in widths:
        cell = [(f"{found[width, k]['totals'][n]:.1f}" if (width, k) in found else "") for k in sparsities]
        table.add_row(
            str(width), *(f"*{x}" if (width, k) == best else x for x, k in zip(cell, sparsities, strict=True))
        )
    return table


def optimum_table(described: Mapping[str, Any], cells: Sequence[Cell]) -> Table:
    """The optimum of each N, with its seeds, and the runner-up of seed 0; state and residual are the largest N's.

    `alone`: variance that the autoencoder explains with nothing rounded, nothing behind it.
    """
    table = Table(title="The optimum of each N: mean and standard deviation over training seeds")
    for header in ("N", "features", "k", "total / N", "seeds", "state", "residual", "alone", "second", "nothing"):
        table.add_column(header, justify="right")
    (nothing,) = [c for c in cells if c["name"] == "nothing"]
    for best in described["optima"]:
        n = f"{best['N']:.0f}"
        seeds = [c["totals"][n] for c in cells if c["name"] == best["name"]]
        spread = f"{np.mean(seeds):.1f} ± {np.std(seeds, ddof=1):.1f}" if len(seeds) > 1 else f"{seeds[0]:.1f}"
        second = sorted(grid(cells).values(), key=lambda c: c["totals"][n])[1]
        table.add_row(
            *(f"{int(n):,}", str(best["width"]), str(best["k"]), spread, str(len(seeds))),
            *(f"{best['state']:.1f}", f"{best['residual']:.1f}", f"{best['unrounded_variance']:.1%}"),
            *(f"{second['name']}: {second['totals'][n]:.1f}", f"{nothing['totals'][n]:.1f}"),
        )
    return table


def formula_bits(cell: Cell) -> float:
    """MDL-SAE's k (B + log2 D), an estimate: no dictionary, no error, no statistics of which features are on."""
    return float(cell["k"] * (FLOAT_BITS + np.log2(cell["width"])))


def formula_table(cells: Sequence[Cell]) -> Table:
    """The optimum as MDL-SAE defines it: least k (B + log2 D) among autoencoders that explain enough by themselves."""
    title = f"Least k ({FLOAT_BITS:g} + log2 features) among autoencoders that alone explain enough (estimate)"
    table = Table(title=title)
    for header in ("unexplained at most", "features", "k", "formula", "unexplained", "total / N here", *KINDS):
        table.add_column(header, justify="right")
    last = horizons(cells)[-1]
    for limit in UNEXPLAINED:
        enough = [c for c in grid(cells).values() if 1.0 - c["unrounded_variance"] <= limit]
        if not enough:
            table.add_row(f"{limit:.0%}", *["none"] * 2, *[""] * (3 + len(KINDS)))
            continue
        best = min(enough, key=formula_bits)
        table.add_row(
            *(f"{limit:.0%}", str(best["width"]), str(best["k"]), f"{formula_bits(best):.1f}"),
            *(f"{1 - best['unrounded_variance']:.1%}", f"{best['totals'][last]:.1f}"),
            *(f"{best['kinds'][kind]:.0%}" for kind in KINDS),
        )
    return table


def shapes_table(cells: Sequence[Cell]) -> Table:
    """What the features of each cell look like: shares of the kinds among features, and weighted by use."""
    table = Table(title="Features in use: share of each kind among features / weighted by use")
    for header in ("features", "k", "seed", "in use", *KINDS, "median cosine", "area", "elongation"):
        table.add_column(header, justify="right")
    for c in sorted((c for c in cells if "kinds" in c), key=lambda c: (c["width"], c["k"], c["seed"])):
        kinds = [f"{c['kinds'][kind]:.0%} / {c['kinds_by_use'][kind]:.0%}" for kind in KINDS]
        medians = [f"{c[f'median_{figure}']:.2f}" for figure in ("cosine", "area", "elongation")]
        table.add_row(str(c["width"]), str(c["k"]), str(c["seed"]), str(c["live"]), *kinds, *medians)
    return table


def draw_totals(described: Mapping[str, Any], cells: Sequence[Cell], path: Path) -> None:
    """total(N) / N against width, a line a k, a panel an N."""
    found, keys = grid(cells), horizons(cells)
    figure = Figure(figsize=(4.4 * len(keys), 4.2), layout="constrained")
    panels = figure.subplots(1, len(keys), squeeze=False)
    sparsities = sorted({k for _, k in found})
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(sparsities)))
    for panel, n in zip(panels[0], keys, strict=True):
        for k, colour in zip(sparsities, colours, strict=True):
            points = sorted((w, c["totals"][n]) for (w, other), c in found.items() if other == k)
            panel.plot(*zip(*points, strict=True), "o-", color=colour, label=f"k = {k}", markersize=4)
        for dash, c in zip(("-", ":", "--", "-.", (0, (1, 4))), baselines(cells), strict=False):
            panel.axhline(c["totals"][n], color="0.45", linestyle=dash, linewidth=1, label=c["name"])
        best = min(found.values(), key=lambda c: c["totals"][n])
        panel.plot([best["width"]], [best["totals"][n]], "o", markersize=12, fillstyle="none", color="crimson")
        panel.set(title=f"N = {int(n):,}", xscale="log", xlabel="features")
        low = min(c["totals"][n] for c in cells)
        panel.set_ylim(0.95 * low, 2.2 * low)
    panels[0][0].set_ylabel("total(N) / N, bits an image")
    panels[0][-1].legend(fontsize=7)
    figure.suptitle(f"{described['data']}: bits at {described['fidelity']:.0%} of the variance; the optimum is circled")
    figure.savefig(path, dpi=110)


def rows_to_draw(described: Mapping[str, Any], cells: Sequence[Cell]) -> dict[str, str]:
    """Cells to draw by the label of their row: optima, too narrow and too wide at an optimum's k, and k = 1."""
    found, rows = grid(cells), {}
    for best in described["optima"]:
        label = rows.get(best["name"], f"{best['width']} features, k = {best['k']}: optimum at N =")
        rows[best["name"]] = f"{label} {best['N']:,.0f}"
    last = described["optima"][-1]
    widths, sparsities = (sorted({key[i] for key in found}) for i in (0, 1))
    others = [(widths[0], last["k"], "too narrow"), (widths[-1], last["k"], "too wide")]
    others += [(widths[-1], 1, "one feature an image"), (last["width"], sparsities[-1], "too dense")]
    for width, k, why in others:
        if (width, k) in found:
            rows.setdefault(found[width, k]["name"], f"{width} features, k = {k}: {why}")
    return rows


def draw_features(described: Mapping[str, Any], cells: Sequence[Cell], folder: Path, side: int, path: Path) -> None:
    """The most used features of a few cells: red is ink, blue ink taken away."""
    rows = rows_to_draw(described, cells)
    figure = Figure(figsize=(0.75 * SHOWN, 0.95 * len(rows)))
    figure.subplots_adjust(0.01, 0.02, 0.99, 1.0 - 0.25 / len(rows), 0.1, 0.4)
    axes = figure.subplots(len(rows), SHOWN, squeeze=False)
    for line, (name, label) in zip(axes, rows.items(), strict=True):
        atoms = np.load(folder / f"{name}-0.npy").astype(np.float32)
        for place in line:
            place.set_axis_off()
        for place, atom in zip(line, atoms, strict=False):
            extent = max(float(np.abs(atom).max()), 1e-12)
            place.imshow(atom.reshape(side, side), cmap="RdBu_r", vmin=-extent, vmax=extent)
        line[0].set_title(label, fontsize=8, loc="left")
    figure.savefig(path, dpi=110)
