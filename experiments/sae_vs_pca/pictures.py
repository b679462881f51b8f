"""The study's pictures. Nothing is worked out here but what an axis needs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.sae_vs_pca.analysis import HORIZONS, Site, seeds_of, shares, sweep
from experiments.sae_vs_pca.bare import FILE as BARE
from experiments.sae_vs_pca.ladder import ENCODER
from experiments.sae_vs_pca.models import MAIN_SITE, OTHER_SAMPLES
from mdl.task import DEFAULT_FIDELITIES, HEADLINE_FIDELITY

NUMBER_OF_TOKENS = np.logspace(3, 9, 241)
# Okabe and Ito 2008.
COLOURS = {
    "nothing": ("#000000", "PCA transform coding alone"),
    "PCA": ("#888888", "PCA of rank r + coder"),
    "table": ("#E69F00", "token table + coder"),
    "pair table": ("#D55E00", "pair table + coder"),
    "predictor": ("#56B4E9", "linear predictor + coder"),
    "clusters": ("#F0E442", "clusters + coder"),
    "dictionary learning": ("#009E73", "dictionary learning + coder"),
    "block-sparse": ("#7A5195", "block-sparse features + coder"),
    "SAE": ("#0072B2", "SAE + coder"),
    "token-table + SAE": ("#CC79A7", "token table + SAE + coder"),
}
SHARES = ("support", "values", "residual", "dictionary", "other static")
SHARE_COLOURS = ("#0072B2", "#56B4E9", "#E69F00", "#009E73", "#BBBBBB")


def _figure(width: float, height: float, columns: int) -> tuple[Figure, list[Axes]]:
    figure = Figure((width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(1, columns, i + 1) for i in range(columns)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#EEEEEE")
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial)
    partial.replace(path)


def draw_all(sites: Sequence[Site], cells: Path, out: Path) -> None:
    """headline.png, sites.png and anatomy.png into a folder."""
    main = next(s for s in sites if (s.model, s.name) == ("embedded", MAIN_SITE))
    figure, (left, right) = _figure(15, 6.2, 2)
    totals(left, main)
    rates(right, main, cells / main.model / main.name / BARE)
    _save(figure, out / "headline.png")
    figure, axes = _figure(15, 5.5, 1)
    everywhere(axes[0], sites)
    _save(figure, out / "sites.png")
    figure, (left, right) = _figure(15, 5.5, 2)
    widths(left, main)
    anatomy(right, main)
    _save(figure, out / "anatomy.png")


def totals(ax: Axes, site: Site) -> None:
    """total(N) / N of the best of each family at each N, at 1 %; the band is what training seeds make of the SAE."""
    for family, (colour, label) in COLOURS.items():
        keys = site.of(family)
        if not keys:
            continue
        lines = np.stack([np.asarray(site.score(k).total(NUMBER_OF_TOKENS)) / NUMBER_OF_TOKENS for k in keys])
        ax.plot(NUMBER_OF_TOKENS, lines.min(0), color=colour, label=label, lw=2)
        if family == ENCODER:
            seeds = seeds_of(site, site.best(keys, 1e6))
            band = np.stack([np.asarray(site.score(k).total(NUMBER_OF_TOKENS)) / NUMBER_OF_TOKENS for k in seeds])
            ax.fill_between(NUMBER_OF_TOKENS, band.min(0), band.max(0), color=colour, alpha=0.25, lw=0)
    top = 1.3 * site.total("nothing", 1e6)
    ax.set(xscale="log", ylim=(0, top), xlim=(NUMBER_OF_TOKENS[0], NUMBER_OF_TOKENS[-1]))
    ax.set(xlabel="N, tokens for which the explanation is used", ylabel="total(N) / N, bits a token")
    ax.set_title(f"Shortest of each family at {HEADLINE_FIDELITY:.0%} of the null's KL, {site.name}", loc="left")
    ax.legend(frameon=False, fontsize=9)


def rates(ax: Axes, site: Site, bare: Path) -> None:
    """Rate against KL: behind every explanation the same coder; dashed, PCA and SAEs as people use them, without it."""
    null = site.task["null_kl_bits"]
    for family, (colour, label) in COLOURS.items():
        keys = site.of(family)
        if keys:
            best = [site.best(keys, 1e6, f) for f in DEFAULT_FIDELITIES]
            points = [
                (site.score(k, f).kl_bits / null, site.score(k, f).rate)
                for k, f in zip(best, DEFAULT_FIDELITIES, strict=True)
            ]
            ax.plot(*zip(*points, strict=True), "o-", color=colour, label=label, lw=2, ms=4)
    for prefix, colour, label in (("pca", "#888888", "PCA alone, no coder"), ("", "#0072B2", "SAEs alone, no coder")):
        hull = _hull(bare, prefix)
        if hull:
            ax.plot([k / null for k, _ in hull], [r for _, r in hull], "--", color=colour, label=label, lw=1.5)
    ax.set(xscale="log", xlim=(1.3, 5e-4), xlabel="KL of what was decoded, as a share of the null's")
    ax.set(ylabel="state + residual, bits a token")
    ax.set_title("What a token costs once static bits are paid", loc="left")
    ax.legend(frameon=False, fontsize=9)


def _hull(folder: Path, prefix: str) -> list[tuple[float, float]]:
    """The points of least rate at their KL, over all explanations of a kind; PCA's files begin with pca."""
    paths = [p for p in folder.glob("*.json") if p.name.startswith("pca") == (prefix == "pca")]
    points = sorted((p["kl"], p["rate"]) for path in paths for p in json.loads(path.read_text()))
    kept: list[tuple[float, float]] = []
    for kl, rate in points:  # from the most faithful on, only what is cheaper than everything more faithful
        if not kept or rate < kept[-1][1]:
            kept.append((kl, rate))
    return kept


def everywhere(ax: Axes, sites: Sequence[Site]) -> None:
    """Saved at 1 % and N = 1e6 by the best of each family, on every site of every model."""
    families = [f for f in COLOURS if f != "nothing" and any(s.of(f) for s in sites)]
    place = np.arange(len(sites))
    width = 0.8 / len(families)
    for index, family in enumerate(families):
        saved = [_saved(site, family) for site in sites]
        colour, label = COLOURS[family]
        ax.bar(place + (index - len(families) / 2 + 0.5) * width, saved, width, color=colour, label=label)
    names = [f"{s.model}\n{s.name.replace('blocks.', '').replace('hook_', '')}" for s in sites]
    ax.set_xticks(place, names, fontsize=8)
    ax.axhline(0, color="#000000", lw=1)
    ax.set(ylabel="saved against the coder alone, 1 %, N = 1e6", ylim=(-0.3, None))
    ax.legend(frameon=False, fontsize=9, ncols=3)


def _saved(site: Site, family: str) -> float:
    keys = site.of(family)
    return 1 - site.total(site.best(keys, 1e6), 1e6) / site.total("nothing", 1e6) if keys else float("nan")


def widths(ax: Axes, site: Site) -> None:
    """total(N) / N against the dictionary's width."""
    keys = sorted(sweep(site, "topk", OTHER_SAMPLES, 16, None), key=lambda k: site.rungs[k].factor)
    factors = [site.rungs[k].factor for k in keys]
    for n, shade in zip(HORIZONS, np.linspace(0.8, 0.0, len(HORIZONS)), strict=True):
        line = [site.total(k, n) for k in keys]
        colour: Any = (shade, 0.45 * (1 - shade) + 0.3 * shade, 0.7 * (1 - shade))
        ax.plot(factors, line, "o-", color=colour, label=f"N = {n:g}", ms=4)
        ax.plot(factors[int(np.argmin(line))], min(line), "o", color=colour, ms=11, mfc="none")
    ax.axhline(site.total("nothing", 1e6), color="#000000", lw=1, ls=":")
    ax.set(xscale="log", xlabel="width of the dictionary over that of the activations (TopK, k = 16)")
    ax.set(ylabel="total(N) / N at 1 %, bits a token", ylim=(0, 2.2 * site.total("nothing", 1e6)))
    ax.set_xticks(factors, [f"{f}x" for f in factors], minor=False)
    ax.set_title("The MDL-optimal width (circled) grows with N", loc="left")
    ax.legend(frameon=False, fontsize=9)


def anatomy(ax: Axes, site: Site) -> None:
    """Where the bits go at 1 % and N = 1e6."""
    families = [f for f in COLOURS if site.of(f)]
    keys = [site.best(site.of(f), 1e6) for f in families]
    found = [shares(site, k, 1e6) for k in keys]
    left = np.zeros(len(keys))
    for name, colour in zip(SHARES, SHARE_COLOURS, strict=True):
        bits = np.array([f[name] for f in found])
        ax.barh(keys, bits, left=left, color=colour, label=name)
        left += bits
    ax.invert_yaxis()
    ax.set(xlabel="bits a token at 1 %, N = 1e6")
    ax.set_title("Where the bits go", loc="left")
    ax.legend(frameon=False, fontsize=9)
