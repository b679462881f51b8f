"""Entries, totals, and the record on disk."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from mdl.errors import MDLError
from mdl.ledger import (
    SCHEMA_VERSION,
    Comparison,
    Entry,
    Interval,
    Published,
    Score,
    Scorecard,
    StaticCurve,
    ratio_stderr,
    read_scorecard,
    weakest,
)

CURVE = StaticCurve((1.0, 10.0, 100.0, 1000.0), (50.0, 200.0, 400.0, 500.0), 20.0, 500.0)


def entry(column: str, bits: float, obtained: str = "codelength", stderr: float = 0.5) -> Entry:
    return Entry(f"{column} entry", column, bits, stderr, obtained, "some code", "Somebody 1985")


def score(
    name: str = "sae", state: float = 60.0, fidelity: float | None = 0.01, phenomenon: str = "activations"
) -> Score:
    return Score(
        explanation=name,
        phenomenon=phenomenon,
        fidelity=fidelity,
        horizon=1e6,
        entries=(entry("static", 500.0, "coded", 0.0), entry("state", state), entry("residual", 40.25)),
        static=CURVE,
        kl_bits=0.06,
        kl_stderr=0.001,
        sequence_bits=(1000.0, 2000.0, 1500.0),
        sequence_tokens=(10, 19, 16),
        evaluations=7,
        curve=((0.05, 110.0), (0.07, 95.0)),
        settings={"step": 0.25, "metric": "fisher"},
        beside={"l0": 8.0},
        message_file="messages/sae.mdl",
        notes=("a note",),
        published={"theirs": Published(250.0, "L0 (B + log2 D)", "Somebody 2024")},
    )


def card() -> Scorecard:
    crossing = Interval(1e5, 9e4, 1.1e5)
    pairs = (
        Comparison("nothing", "sae", "activations", 0.01, Interval(50.0, 45.0, 55.0), crossing, "sae"),
        Comparison("nothing", "pca", "activations", 0.01, Interval(0.1, -0.1, 0.3), None, None),
    )
    scores = (score("nothing", 110.0), score("sae"), score("sae", 3.0, None, "behaviour"))
    return Scorecard({"model": "tiny", "seed": 0, "null_kl": 5.6}, scores, pairs, {"jax": "1"}, 12.5)


def test_totals_are_static_and_n_times_the_rate() -> None:
    found = score()
    assert found.rate == pytest.approx(100.25)
    assert found.column("static") == 500.0
    assert found.total(1.0) == pytest.approx(50 + 100.25)
    assert np.allclose(found.total(np.array([1.0, 10.0, 1e6])), [150.25, 1202.5, 500 + 1e6 * 100.25])


def test_entries_of_a_column_add_up_with_their_errors() -> None:
    found = score()
    assert found.column_stderr("state") == 0.5
    two = Score(**{**found.__dict__, "entries": (entry("state", 1.0), entry("state", 2.0), entry("residual", 4.0))})
    assert two.column("state") == 3.0
    assert two.column_stderr("state") == 1.0


def test_small_bits_are_not_lost_among_large_ones() -> None:
    entries = tuple(entry("state", bits) for bits in [1e9, *[1e-7] * 1000])
    found = Score(**{**score().__dict__, "entries": entries})
    assert found.column("state") == math.fsum([1e9, *[1e-7] * 1000])


def test_static_is_linear_in_log_n_and_flat_outside() -> None:
    assert CURVE.at(math.sqrt(10.0)) == pytest.approx(125.0)
    assert CURVE.at(0.5) == 50.0
    assert CURVE.at(1e12) == 500.0
    assert np.allclose(CURVE.at(np.array(CURVE.tokens)), CURVE.bits)


def test_a_sum_carries_the_weakest_of_its_parts() -> None:
    assert weakest([]) == "coded"
    assert weakest(["coded", "codelength"]) == "codelength"
    assert weakest(["estimate", "coded"]) == "estimate"
    assert score().obtained == "codelength"


@pytest.mark.parametrize("bits", [math.nan, math.inf, -1.0])
def test_what_is_no_length_is_refused(bits: float) -> None:
    with pytest.raises(MDLError, match="is no length"):
        entry("state", bits)


def test_unknown_columns_and_origins_are_refused() -> None:
    with pytest.raises(MDLError, match="column 'profit'"):
        entry("profit", 1.0)
    with pytest.raises(MDLError, match="obtained 'guessed' unknown"):
        entry("state", 1.0, "guessed")


def test_saved_is_against_nothing_at_the_same_setting() -> None:
    found = card()
    n = 1e6
    expected = 1 - (500 + n * 100.25) / (500 + n * 150.25)
    assert found.saved(found.scores[1], n) == pytest.approx(expected)
    assert found.saved(found.scores[0], n) == 0.0


def test_only_comparable_scores_are_selected() -> None:
    found = card()
    assert found.settings == [("activations", 0.01), ("behaviour", None)]
    assert [s.explanation for s in found.select("activations", 0.01)] == ["nothing", "sae"]
    assert [s.rate for s in found.select("behaviour", None)] == [43.25]


def test_a_scorecard_comes_back_from_disk(tmp_path: Path) -> None:
    path = tmp_path / "scorecard.json"
    card().save(path)
    assert read_scorecard(path) == card()
    assert json.loads(path.read_text())["schema"] == SCHEMA_VERSION
    assert [p.name for p in tmp_path.iterdir()] == ["scorecard.json"]


def test_what_others_say_enters_no_total() -> None:
    without = Score(**{**score().__dict__, "published": {}})
    assert score().total(1e6) == without.total(1e6)
    assert score().rate == without.rate
    assert score().obtained == without.obtained == "codelength"
    assert score().published["theirs"].obtained == "estimate"


def test_infinite_errors_survive_the_disk(tmp_path: Path) -> None:
    """One sequence has no standard error; JSON knows no infinity, Python's dialect of it does."""
    single = Score(**{**score().__dict__, "kl_stderr": math.inf})
    Scorecard({}, (single,)).save(tmp_path / "card.json")
    assert read_scorecard(tmp_path / "card.json").scores[0].kl_stderr == math.inf


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"scores": []}', "not json", "7"])
def test_what_is_no_scorecard_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(MDLError, match="is not a scorecard"):
        read_scorecard(tmp_path / "x.json")


def test_missing_and_newer_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MDLError, match="is not a scorecard"):
        read_scorecard(tmp_path / "absent.json")
    newer = json.loads(card().to_json()) | {"schema": SCHEMA_VERSION + 1}
    (tmp_path / "newer.json").write_text(json.dumps(newer))
    with pytest.raises(MDLError, match=f"schema {SCHEMA_VERSION + 1}, this program reads {SCHEMA_VERSION}"):
        read_scorecard(tmp_path / "newer.json")


def test_an_older_file_is_shown_and_not_verified(tmp_path: Path) -> None:
    raw = json.loads(card().to_json()) | {"schema": 2}
    for old in raw["scores"]:
        del old["published"]
    path = tmp_path / "older.json"
    path.write_text(json.dumps(raw))
    found = read_scorecard(path)
    assert [s.published for s in found.scores] == [{}, {}, {}]
    assert found.comparisons == card().comparisons
    with pytest.raises(MDLError, match=r"schema 2, this program reads 3 \(and shows 2\)"):
        read_scorecard(path, older=False)


@pytest.mark.parametrize("change", ["no task", "unknown entry", "no static"])
def test_damaged_scorecards_are_refused(tmp_path: Path, change: str) -> None:
    raw = json.loads(card().to_json())
    if change == "no task":
        del raw["task"]
    elif change == "unknown entry":
        raw["scores"][0]["entries"][0]["colour"] = "red"
    else:
        del raw["scores"][0]["static"]
    (tmp_path / "damaged.json").write_text(json.dumps(raw))
    with pytest.raises(MDLError, match="is not a scorecard"):
        read_scorecard(tmp_path / "damaged.json")


def test_ratio_stderr_by_hand() -> None:
    values, sizes = np.array([10.0, 30.0, 20.0]), np.array([1.0, 2.0, 3.0])
    residuals = values - 10.0 * sizes  # the ratio is 60 / 6
    assert ratio_stderr(values, sizes) == pytest.approx(math.sqrt(3 * np.var(residuals, ddof=1)) / 6)
