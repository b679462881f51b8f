from __future__ import annotations

import dataclasses
import itertools
import struct

import matplotlib as mpl
import numpy as np
import pytest

from mdl.report.picture import _short, assign_styles, draw, rate_frontier, spread


def png_size(path):
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


def test_the_picture_is_a_png_of_the_stated_size(scorecard, tmp_path):
    before = dict(mpl.rcParams)
    draw(scorecard, tmp_path / "compare.png")
    assert png_size(tmp_path / "compare.png") == (2000, 1125)
    assert [p.name for p in tmp_path.iterdir()] == ["compare.png"]
    assert dict(mpl.rcParams) == before
    decoded = mpl.image.imread(tmp_path / "compare.png")
    assert decoded[..., :3].std() > 0.05


def test_nothing_of_the_picture_is_cut_at_the_edges(scorecard, tmp_path):
    draw(scorecard, tmp_path / "compare.png")
    pixels = mpl.image.imread(tmp_path / "compare.png")[..., :3]
    for edge in (pixels[:4], pixels[-4:], pixels[:, :4], pixels[:, -4:]):
        assert edge.min() == 1.0


@pytest.mark.parametrize("keep", ["behaviour", "one explanation", "no curves", "exact"])
def test_sparse_scorecards_draw_too(scorecard, tmp_path, keep):
    scores = scorecard.scores
    if keep == "behaviour":
        scores = tuple(s for s in scores if s.phenomenon == "behaviour")
    elif keep == "one explanation":
        scores = tuple(s for s in scores if s.explanation == "nothing" and s.fidelity == 0.01)
    elif keep == "no curves":
        scores = tuple(dataclasses.replace(s, curve=()) for s in scores)
    else:
        scores = tuple(dataclasses.replace(s, kl_bits=0.0, curve=()) if s.explanation == "table" else s for s in scores)
    draw(dataclasses.replace(scorecard, scores=scores), tmp_path / "p.png")
    assert png_size(tmp_path / "p.png") == (2000, 1125)


def test_a_failed_drawing_leaves_the_old_picture(scorecard, tmp_path):
    (tmp_path / "p.png").write_bytes(b"old")
    with pytest.raises(Exception, match="no scores"):
        draw(dataclasses.replace(scorecard, scores=()), tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes() == b"old"


def test_styles_tell_28_explanations_apart():
    styles = assign_styles(["nothing", *map(str, range(28))])
    assert len({(s.colour, s.dash) for s in styles.values()}) == 29


@pytest.mark.parametrize("seed", range(5))
def test_spread_keeps_order_distance_and_bounds(seed):
    heights = list(np.random.default_rng(seed).uniform(0, 1, 12) ** 3)
    placed = spread(heights, 0.06)
    assert np.array_equal(np.argsort(heights), np.argsort(placed))
    assert np.diff(np.sort(placed)).min() >= 0.06 - 1e-12
    assert min(placed) >= 0
    assert max(placed) <= 1


def test_spread_against_an_exhaustive_oracle():
    heights, apart = [0.3, 0.34, 0.36], 0.1
    grid = np.linspace(0, 1, 201)
    feasible = [p for p in itertools.combinations(grid, 3) if min(np.diff(p)) >= apart - 1e-9]
    best = min(feasible, key=lambda p: sum((a - b) ** 2 for a, b in zip(p, heights, strict=True)))
    assert np.allclose(spread(heights, apart), best, atol=0.005)
    assert spread([0.1, 0.9], apart) == [0.1, 0.9]
    assert spread([], apart) == []


def test_long_names_keep_both_ends():
    assert _short("quantised weights step 0.0312 sd") == "quantised … 0.0312 sd"
    assert _short("sae topk 16x") == "sae topk 16x"


def test_the_frontier_drops_what_another_point_beats(scorecard):
    score = dataclasses.replace(scorecard.scores[0], curve=((0.1, 50.0), (0.2, 60.0), (0.3, 40.0), (0.0, 1.0)))
    score = dataclasses.replace(score, kl_bits=0.4)
    assert score.rate == 93.5
    assert rate_frontier([score]) == [(0.1, 50.0), (0.3, 40.0)]
