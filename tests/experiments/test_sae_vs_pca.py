"""The study's arithmetic on cells whose answers are known."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file

from experiments.sae_vs_pca import pictures
from experiments.sae_vs_pca.analysis import (
    Site,
    crossings,
    kl_at_rate,
    leads,
    read_all,
    read_site,
    seeds_of,
    shares,
    sweep,
)
from experiments.sae_vs_pca.ladder import ENCODER, Rung, ladder
from experiments.sae_vs_pca.models import MAIN_SITE, sites, write_control
from experiments.sae_vs_pca.report import main_tables, results
from experiments.sae_vs_pca.run import RUNGS_FILE
from experiments.sae_vs_pca.train import missing, recipes
from mdl.ledger import Entry, Score, Scorecard, StaticCurve
from mdl.score import EMBEDDED, EMBEDDED_NAME

SEQUENCES, TOKENS = 20, 100
GRID = tuple(np.logspace(0, 10, 401).tolist())
RUNGS = (
    Rung("nothing", "nothing", "nothing"),
    Rung("pca-24", "PCA", "pca:rank=24"),
    Rung("token-table", "table", "token-table"),
    Rung("jumprelu-8x", ENCODER, "sae", "jumprelu", 8, 0.15, 1_500_000, 0),
    Rung("jumprelu-s1", ENCODER, "sae", "jumprelu", 8, 0.15, 1_500_000, 1),
    Rung("narrow", ENCODER, "sae", "topk", 4, 16, 500_000, 0),
    Rung("wide", ENCODER, "sae", "topk", 8, 16, 500_000, 0),
)
# rate at 10, 1 and 0.1 %, and static bits
COSTS = {
    "nothing": ((60.0, 100.0, 140.0), 1e4),
    "pca-24": ((62.0, 101.0, 140.0), 2e4),
    "token-table": ((30.0, 70.0, 120.0), 4e5),
    "jumprelu-8x": ((20.0, 60.0, 110.0), 2.4e6),
    "jumprelu-s1": ((21.0, 61.0, 110.0), 2.4e6),
    "narrow": ((25.0, 66.0, 115.0), 8e5),
    "wide": ((24.0, 62.0, 114.0), 1.6e6),
}


def score(key: str, fidelity: float | None) -> Score:
    rates, static = COSTS[key]
    level = 0 if fidelity is None else (0.1, 0.01, 0.001).index(fidelity)
    state = 5.0 if key.startswith(("jump", "narrow", "wide")) else 0.0
    entries = (
        Entry("parts of the explanation", "static", static, 0.0, "coded", "message"),
        Entry("state", "state", state, 0.0, "coded", "code"),
        Entry("residual", "residual", rates[level] - state, 0.0, "coded", "code"),
    )
    return Score(
        explanation=key,
        phenomenon="behaviour" if fidelity is None else "activations",
        fidelity=fidelity,
        horizon=1e6,
        entries=entries,
        static=StaticCurve(GRID, (static,) * len(GRID), static, static),
        kl_bits=7.0 * (fidelity or 1.0),
        kl_stderr=0.0,
        sequence_bits=(rates[level] * TOKENS,) * SEQUENCES,
        sequence_tokens=(TOKENS,) * SEQUENCES,
        evaluations=3,
        beside={
            **{"l0": 11.0, "explained_variance": 0.9, "support_bits": 0.6 * state, "value_bits": 0.4 * state},
            **{"state_bits_alone": 2.0 * state, "residual_bits_alone": 150.0},
        },
    )


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    folder = tmp_path / "cells" / "embedded" / MAIN_SITE
    folder.mkdir(parents=True)
    (folder / RUNGS_FILE).write_text(json.dumps({r.key: asdict(r) for r in RUNGS}))
    for rung in RUNGS:
        found = tuple(score(rung.key, f) for f in (0.1, 0.01, 0.001, None))
        card = Scorecard({"null_kl_bits": 7.0, "data_sha256": "x"}, found, seconds=60.0)
        card.save(folder / f"{rung.key}.json")
    return tmp_path / "cells"


@pytest.fixture
def site(cells: Path) -> Site:
    return read_site(cells / "embedded" / MAIN_SITE)


def test_the_lead_changes_where_totals_cross(site: Site) -> None:
    found = leads(site, 0.01)
    assert [lead.key for lead in found] == ["nothing", "token-table", "narrow", "wide", "jumprelu-8x"]
    exact = (4e5 - 1e4) / (100 - 70), (8e5 - 4e5) / 4, (1.6e6 - 8e5) / 4, (2.4e6 - 1.6e6) / 2
    assert [lead.tokens for lead in found[1:]] == pytest.approx(exact, rel=0.02)


def test_each_seed_has_its_own_crossing(site: Site) -> None:
    seeds = seeds_of(site, "jumprelu-8x")
    assert seeds == ["jumprelu-8x", "jumprelu-s1"]
    first, second = crossings(site, seeds, "token-table", 0.01)
    assert (first.seed, second.seed) == (0, 1)
    assert first.tokens == pytest.approx(2e6 / 10, rel=0.05)
    assert second.tokens == pytest.approx(2e6 / 9, rel=0.05)
    assert first.low is not None
    assert first.low <= first.tokens <= first.high
    assert first.difference == pytest.approx((-10.0, -10.0, -10.0))
    (never,) = crossings(site, ["pca-24"], "nothing", 0.01)
    assert never.tokens is None


def test_kl_at_equal_bits_is_read_off_a_line_in_its_logarithm(site: Site) -> None:
    assert kl_at_rate(site, "nothing", 80.0) == pytest.approx(7.0 * np.sqrt(0.1 * 0.01))
    assert kl_at_rate(site, "nothing", 20.0) is None
    assert kl_at_rate(site, "nothing", 100.0) == pytest.approx(0.07)


def test_shares_add_up_to_the_total(site: Site) -> None:
    found = shares(site, "jumprelu-8x", 1e6)
    parts = ("support", "values", "residual", "dictionary", "other static")
    assert sum(found[p] for p in parts) == pytest.approx(site.total("jumprelu-8x", 1e6))
    assert found["dictionary"] == pytest.approx(2.4)


def test_a_sweep_holds_all_but_one_thing_fixed(site: Site) -> None:
    assert list(sweep(site, "topk", 500_000, 16, None)) == ["narrow", "wide"]
    assert list(sweep(site, "jumprelu", 1_500_000, None, 8)) == ["jumprelu-8x"]


def test_tables_pictures_and_results_are_made_of_it(cells: Path, tmp_path: Path) -> None:
    (site,) = read_all(cells)
    console = Console(width=200, record=True, file=(tmp_path / "out").open("w"))
    for table in main_tables(site):
        console.print(table)
    text = console.export_text()
    assert "N from which the autoencoder is shorter" in text
    assert "-10.0 bits" in text
    pictures.draw_all([site], cells, tmp_path)
    for name in ("headline", "sites", "anatomy"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    kept = results([site])["sites"][0]["rungs"]["token-table"]["0.01"]
    assert kept["totals"][2] == pytest.approx(70.4)


def test_cells_of_two_tasks_do_not_mix(cells: Path) -> None:
    path = cells / "embedded" / MAIN_SITE / "token-table.json"
    card = Scorecard({"null_kl_bits": 8.0, "data_sha256": "y"}, (score("token-table", 0.01),))
    replace(card).save(path)
    with pytest.raises(SystemExit, match="another task"):
        read_site(path.parent)


def test_controls_keep_shapes_and_spread(tmp_path: Path) -> None:
    original = load_file(EMBEDDED / EMBEDDED_NAME / "model.safetensors")
    shuffled = load_file(write_control("shuffled", tmp_path / "shuffled") / "model.safetensors")
    untrained = load_file(write_control("untrained", tmp_path / "untrained") / "model.safetensors")
    moved = 0
    for name, value in original.items():
        assert shuffled[name].shape == untrained[name].shape == value.shape
        assert shuffled[name].dtype == untrained[name].dtype == value.dtype
        np.testing.assert_array_equal(np.sort(shuffled[name].ravel()), np.sort(value.ravel()))
        if value.ndim == 2:
            moved += not np.array_equal(shuffled[name], value)
            assert np.std(untrained[name].astype(np.float64)) == pytest.approx(0.02, rel=0.05)
    assert moved > 5


def test_the_ladder_names_every_site_and_finds_what_was_trained(tmp_path: Path) -> None:
    found = list(sites(4))
    assert len(found) == 9
    assert found[4] == ("upstream of blocks.3.hook_resid_post", "blocks.3.hook_resid_post")
    folder = tmp_path / MAIN_SITE / "jumprelu-8x-0.15-s1"
    folder.mkdir(parents=True)
    told = {"architecture": "jumprelu", "factor": 8, "sparsity": 0.15, "training_tokens": 1_500_000, "seed": 1}
    (folder / "metrics.json").write_text(json.dumps(told))
    rungs = {r.key: r for r in ladder("embedded", "upstream of " + MAIN_SITE, MAIN_SITE, 192, tmp_path)}
    assert rungs[folder.name].seed == 1
    assert rungs["jumprelu-8x"].samples == rungs[folder.name].samples == 1_500_000
    todo = [(recipe.name, seed) for recipe, seed, _ in missing("embedded", MAIN_SITE, tmp_path)]
    assert len(todo) == sum(len(r.seeds) for r in recipes("embedded", MAIN_SITE)) - 1
    assert ("jumprelu-8x-0.15", 1) not in todo
