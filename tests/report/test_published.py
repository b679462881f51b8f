"""The table of others' formulas, and the line of training compute."""

from __future__ import annotations

import dataclasses
import io

import pytest
from rich.console import Console

from mdl.ledger import Published, Scorecard
from mdl.report.published import published_table
from mdl.report.table import PUBLISHED_TITLE, print_scorecard, training_line

NAMES = {
    "MDL-SAE bound": 206.0,
    "MDL-SAE bound, unordered": 178.0,
    "MDL-SAE entropy": 99.8,
    "SAEBench mdl": 78.3,
    "SAEBench mdl, mended": 91.5,
    "block-sparse": 194.0,
    "block-sparse, smooth": 250.0,
}


def with_published(scorecard: Scorecard) -> Scorecard:
    figures = {name: Published(value, "a formula", "Somebody 2024") for name, value in NAMES.items()}
    scores = [
        dataclasses.replace(
            s,
            published=figures if s.explanation.startswith("sae") else {},
            beside={
                **s.beside,
                "compute_recovered": 0.818,
                **({"compute_recovered_corrected": 0.929} if s.curve else {}),
            },
        )
        for s in scorecard.scores
    ]
    return dataclasses.replace(scorecard, scores=tuple(scores))


def printed(scorecard: Scorecard, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    print_scorecard(scorecard, console)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [100, 120, 160])
def test_every_formula_stands_beside_ours(scorecard: Scorecard, width: int) -> None:
    text = printed(with_published(scorecard), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert text.count(PUBLISHED_TITLE[:40]) == 1  # of the headline's setting
    block = text[text.index(PUBLISHED_TITLE[:40]) :]
    row = next(line for line in block.splitlines() if line.startswith("sae topk 16x"))
    assert row.split()[-9:] == ["70.0", "29.9", "206", "178", "99.8", "78.3", "91.5", "194", "250"]
    assert "nothing" not in block.split("\n\n")[0]


def test_there_is_no_table_where_no_formula_applies(scorecard: Scorecard) -> None:
    assert published_table(scorecard.scores) is None
    assert PUBLISHED_TITLE[:40] not in printed(scorecard, 160)


def test_training_compute_is_a_line_where_it_is_known(scorecard: Scorecard) -> None:
    assert training_line(scorecard.scores) == ""
    assert "share of its training compute" not in printed(scorecard, 160)
    card = with_published(scorecard)
    line = training_line(card.select("activations", 0.01)[:2])
    assert line == (
        "share of its training compute at which the model was as good as explained (with the residual coder): "
        "nothing 81.8% (92.9%), table 81.8% (92.9%)"
    )
    assert training_line(card.select("behaviour", None)[:1]).endswith("as good as explained: nothing 81.8%")
    assert printed(card, 160).count("share of its training compute") == 4
