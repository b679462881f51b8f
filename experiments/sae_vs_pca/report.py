"""Tables and pictures of the study, out of its cells.

    python -m experiments.sae_vs_pca.report [--cells CELLS] [--save]

Prints every figure of the README; with --save, writes results.json and the pictures beside this file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from experiments.sae_vs_pca import pictures
from experiments.sae_vs_pca.analysis import (
    HORIZONS,
    Site,
    crossings,
    kl_at_rate,
    leads,
    read_all,
    seeds_of,
    shares,
    sweep,
)
from experiments.sae_vs_pca.ladder import ENCODER, PURSUIT
from experiments.sae_vs_pca.models import MAIN_SITE, OTHER_SAMPLES
from experiments.sae_vs_pca.run import HORIZON, save_json
from mdl.task import DEFAULT_FIDELITIES

HERE = Path(__file__).parent
CONTROLLED = ("token-table", "pca-24", "clusters-256", "jumprelu-8x-0.15-brief-s0", "topk-8x-16-brief-s0")


def ladder_table(site: Site) -> Table:
    """Every rung: total(N) / N at N = 1e6 for each fidelity, static bits, rate, saved."""
    title = f"{site.model}, {site.name}: total(N) / N in bits a token at N = {HORIZON:g}"
    table = Table(title=title, title_justify="left")
    for name in ("rung", "family", *(f"{100 * f:g} %" for f in DEFAULT_FIDELITIES), "saved at 1 %", "static Mbit"):
        table.add_column(name, justify="left" if name in ("rung", "family") else "right")
    table.add_column("behaviour", justify="right")
    for key in sorted(site.scores, key=lambda k: site.total(k, HORIZON)):
        totals = [f"{site.total(key, HORIZON, f):.1f}" for f in DEFAULT_FIDELITIES]
        saved = 1 - site.total(key, HORIZON) / site.total("nothing", HORIZON)
        static = site.score(key).column("static") / 1e6
        behaviour = f"{site.total(key, HORIZON, None):.2f}"
        table.add_row(key, site.rungs[key].family, *totals, f"{saved:.1%}", f"{static:.3f}", behaviour)
    return table


def leads_table(sites: list[Site]) -> Table:
    """Who has the shortest total from which N on."""
    table = Table("model", "site", "fidelity", "shortest total, from N on", title="the lead", title_justify="left")
    for site in sites:
        for fidelity in (*DEFAULT_FIDELITIES, None):
            told = ", ".join(f"{lead.key} from {lead.tokens:,.0f}" for lead in leads(site, fidelity))
            table.add_row(site.model, site.name, "behaviour" if fidelity is None else f"{100 * fidelity:g} %", told)
    return table


def family_table(sites: list[Site], fidelity: float, n: float) -> Table:
    """The best of each family on every site, bits a token."""
    families = list(dict.fromkeys(f for site in sites for f in site.families))
    title = f"the best of each family at {100 * fidelity:g} % of the null's KL, total(N) / N at N = {n:g}"
    table = Table("model", "site", *families, title=title, title_justify="left")
    for site in sites:
        cells = []
        for family in families:
            keys = site.of(family)
            cells.append(f"{site.total(site.best(keys, n, fidelity), n, fidelity):.1f}" if keys else "")
        table.add_row(site.model, site.name, *cells)
    return table


def matched_table(site: Site, challenger: str, champions: list[str]) -> Table:
    """At equal KL whose bits; at equal bits whose KL."""
    title = f"{site.name}: {challenger} against others at matched KL and at matched bits (state + residual)"
    table = Table("against", "fidelity", "bits", "its bits", "difference [95 %]", "KL at equal bits: theirs / its")
    table.title, table.title_justify = title, "left"
    for champion in champions:
        for fidelity in DEFAULT_FIDELITIES:
            own, other = site.score(challenger, fidelity), site.score(champion, fidelity)
            difference = site.pair(challenger, champion, fidelity).difference
            kl = kl_at_rate(site, champion, own.rate)
            table.add_row(
                champion,
                f"{100 * fidelity:g} %",
                f"{other.rate:.1f}",
                f"{own.rate:.1f}",
                f"{difference.value:+.1f} [{difference.low:.1f}, {difference.high:.1f}]",
                "beyond what was measured" if kl is None else f"{kl / own.kl_bits:.2f}",
            )
    return table


def crossing_table(site: Site, challengers: list[str], champions: list[str]) -> Table:
    """From which N on each training seed is shorter than the champion, with intervals over documents."""
    title = f"{site.name}: N from which the autoencoder is shorter, by training seed [95 % over documents]"
    table = Table("fidelity", "autoencoder", "seed", *champions, title=title, title_justify="left")
    for fidelity in DEFAULT_FIDELITIES:
        rows = [crossings(site, challengers, champion, fidelity) for champion in champions]
        for index, key in enumerate(challengers):
            cells = []
            for found in (row[index] for row in rows):
                rate = f"{found.difference[0]:+.1f} bits"
                if found.tokens is None:
                    cells.append(f"never ({rate})")
                else:
                    cells.append(f"{found.tokens:,.0f} [{found.low:,.0f}, {found.high:,.0f}] ({rate})")
            table.add_row(f"{100 * fidelity:g} %", key, str(site.rungs[key].seed), *cells)
    return table


def sweep_table(site: Site, keys: list[str], what: str) -> Table:
    """Autoencoders of a sweep: rate, static bits and totals."""
    table = Table(what, "state", "residual", "static Mbit", *(f"N = {n:g}" for n in HORIZONS), "L0", "expl. var.")
    table.title, table.title_justify = f"{site.name}: {what} at 1 %, bits a token", "left"
    for key in keys:
        score = site.score(key)
        totals = [f"{site.total(key, n):.1f}" for n in HORIZONS]
        figures = [f"{score.column(c):.1f}" for c in ("state", "residual")]
        beside = [f"{score.beside['l0']:.1f}", f"{score.beside['explained_variance']:.3f}"]
        table.add_row(key, *figures, f"{score.column('static') / 1e6:.2f}", *totals, *beside)
    return table


def shares_table(site: Site, keys: list[str]) -> Table:
    """Where the bits go, and what codes that look at token ids save."""
    first = shares(site, keys[0], HORIZON)
    table = Table("rung", *first, title=f"{site.name}: where the bits go at 1 %, N = {HORIZON:g}", title_justify="left")
    for key in keys:
        table.add_row(key, *(f"{bits:.1f}" for bits in shares(site, key, HORIZON).values()))
    return table


def control_table(sites: list[Site]) -> Table:
    """What is saved on the trained model and on the controls, at the same site."""
    table = Table("rung", *(s.model for s in sites), title="saved at 1 %, N = 1e6: trained and controls")
    table.title_justify = "left"
    for key in CONTROLLED:
        cells = []
        for site in sites:
            known = key in site.scores
            cells.append(f"{1 - site.total(key, HORIZON) / site.total('nothing', HORIZON):.1%}" if known else "")
        table.add_row(key, *cells)
    table.add_row("nothing, bits a token", *(f"{s.total('nothing', HORIZON):.1f}" for s in sites))
    table.add_row("null's KL, bits a token", *(f"{s.task['null_kl_bits']:.3f}" for s in sites))
    return table


def tables(sites: list[Site]) -> Iterator[Table]:
    """Everything that the README quotes."""
    for site in sites:
        yield ladder_table(site)
    yield leads_table(sites)
    for fidelity in DEFAULT_FIDELITIES:
        yield family_table(sites, fidelity, HORIZON)
    main = next(s for s in sites if (s.model, s.name) == ("embedded", MAIN_SITE))
    yield from main_tables(main)
    yield control_table([s for s in sites if s.name == MAIN_SITE])


def main_tables(site: Site) -> Iterator[Table]:
    """Of the site that was looked at in depth."""
    best = site.best(site.of(ENCODER), HORIZON)
    rivals = [site.best(site.of(f), HORIZON) for f in ("nothing", "PCA", "table", "pair table") if site.of(f)]
    yield matched_table(site, best, rivals)
    for key in dict.fromkeys(("jumprelu-8x", "topk-16x")):
        if key in site.scores:
            yield crossing_table(site, seeds_of(site, key), rivals)
    yield sweep_table(site, list(sweep(site, "topk", OTHER_SAMPLES, 16, None)), "width (TopK, k = 16)")
    yield sweep_table(site, list(sweep(site, "topk", OTHER_SAMPLES, None, 8)), "sparsity (TopK, 8x)")
    wide = [k for k in site.of(ENCODER) if site.rungs[k].samples == OTHER_SAMPLES and site.rungs[k].factor == 8]
    yield sweep_table(site, wide, "architecture (8x)")
    if site.of(PURSUIT):
        yield sweep_table(site, site.of(PURSUIT), "re-encoded by matching pursuit")
    yield shares_table(
        site, [k for k in (best, "topk-16x", "topk-4x", "pca-24", "clusters-256", "nothing") if k in site.scores]
    )


def results(sites: list[Site]) -> dict[str, Any]:
    """What is kept beside the README: every total, the leads and the crossings' ingredients."""
    kept: dict[str, Any] = {"horizons": HORIZONS, "sites": []}
    for site in sites:
        told: dict[str, Any] = {"model": site.model, "site": site.name, "seconds": round(site.seconds), "rungs": {}}
        told["task"] = {k: site.task[k] for k in ("data_sha256", "null_kl_bits") if k in site.task}
        for key in site.scores:
            per = {}
            for score in site.scores[key]:
                name = "behaviour" if score.fidelity is None else f"{score.fidelity:g}"
                columns = {c: round(score.column(c), 4) for c in ("static", "state", "residual")}
                totals = [round(float(score.total(n)) / n, 4) for n in HORIZONS]
                per[name] = {**columns, "kl_bits": round(score.kl_bits, 6), "totals": totals}
            told["rungs"][key] = {"family": site.rungs[key].family, **per}
        told["leads"] = {str(f): [dataclasses.asdict(x) for x in leads(site, f)] for f in (*DEFAULT_FIDELITIES, None)}
        kept["sites"].append(told)
    return kept


@click.command()
@click.option("--cells", type=click.Path(exists=True, path_type=Path), default="runs/study/cells", show_default=True)
@click.option("--save", is_flag=True, help="Write results.json and the pictures beside this file.")
@click.option("--width", default=200, show_default=True, help="Columns of the tables.")
def main(cells: Path, save: bool, width: int) -> None:
    """Print the study's tables."""
    sites = read_all(cells)
    if not sites:
        raise SystemExit(f"{cells} has no cells yet: python -m experiments.sae_vs_pca.run writes them")
    console = Console(width=width)
    for table in tables(sites):
        console.print(table)
    seconds = sum(site.seconds for site in sites)
    console.print(f"{sum(len(s.scores) for s in sites)} rungs on {len(sites)} sites took {seconds / 60:.0f} minutes")
    if save:
        save_json(HERE / "results.json", results(sites))
        pictures.draw_all(sites, cells, HERE)


if __name__ == "__main__":
    main()
