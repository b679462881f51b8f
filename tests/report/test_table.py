from __future__ import annotations

import dataclasses
import io
import re

import pytest
from rich.console import Console

from mdl.ledger import Scorecard, StaticCurve
from mdl.report.table import print_scorecard


def printed(scorecard: Scorecard, width: int, **options: object) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False, **options)
    print_scorecard(scorecard, console)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [100, 130, 140, 160])
def test_tables_fit_and_lose_nothing(scorecard, width):
    text = printed(scorecard, width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in text
    assert text.startswith("At 1 % of the null's KL and N = 1M tokens, table has the shortest total")
    row = next(line for line in lines if line.startswith("sae topk 16x"))
    for figure in ("655", "70.0 ±0.7", "29.9 ±0.3", "101", "35.9%", "from 9.72k [9.38k–10.1k]", "0.0562", "○"):
        assert figure in row
    assert ("98.9%" in row) == (width >= 150)  # narrow terminals have these in a table of their own
    assert "98.9%" in text


def test_names_are_text_and_not_markup(scorecard):
    renamed = tuple(
        dataclasses.replace(s, explanation="sae[bold]") if s.explanation == "affine" else s for s in scorecard.scores
    )
    text = printed(dataclasses.replace(scorecard, scores=renamed, comparisons=()), 100)
    assert text.count("sae[bold]") >= 9


def test_rows_are_sorted_and_the_headline_comes_first(scorecard):
    lines = printed(scorecard, 160).splitlines()
    titles = [line for line in lines if "tokens (" in line]
    assert [t.split(",")[0] for t in titles] == [
        "activations at 1 % of the null's KL",
        "activations at 10 % of the null's KL",
        "activations at 0.1 % of the null's KL",
        "behaviour",
    ]
    start = lines.index(titles[0])
    names = [line.split("  ")[0] for line in lines[start + 4 : start + 14]]
    assert names[:3] == ["table", "affine", "sae topk 16x"]
    assert names[-1] == "random(n=1024, k=8)"


def test_totals_mark_one_winner_for_each_n(scorecard):
    text = printed(scorecard, 160)
    block = text[text.index("total(N) in bits") :].split("\n\n")[0].splitlines()
    columns = block[1].split()
    assert columns == ["N", "1", "10", "100", "1k", "10k", "100k", "1M", "9.4M", "10M", "100M", "1G", "10G"]
    assert sum(line.count("*") for line in block[2:]) == 12
    assert "trained on 9.4M tokens" in block[0]
    winner = next(line for line in block if line.startswith("nothing"))
    assert winner.split()[1:4] == ["6.16k*", "7.59k*", "21.9k*"]
    coloured = printed(scorecard, 160, force_terminal=True, color_system="standard")
    assert re.search(r"\x1b\[1;32m *6\.16k\*", coloured)


def test_marks_and_legend_say_how_figures_were_obtained(scorecard):
    first = scorecard.scores[0]
    weaker = dataclasses.replace(first.entries[2], obtained="estimate")
    changed = dataclasses.replace(first, entries=(*first.entries[:2], weaker))
    text = printed(dataclasses.replace(scorecard, scores=(changed, *scorecard.scores[1:])), 160)
    assert "○ codelength: exact length of a named decodable code; ~ estimate: asymptotic" in text
    assert "● coded" not in text
    assert text.count("sae topk 16x: the first position's constant is charged") == 1


def test_always_never_and_until_are_told_apart(scorecard):
    setting = ("activations", 0.01)
    nothing, other = (next(s for s in scorecard.select(*setting) if s.explanation == n) for n in ("nothing", "table"))
    free = dataclasses.replace(other, static=StaticCurve((1.0, 1e10), (1.0, 1.0), 1.0, 1.0))
    card = dataclasses.replace(scorecard, scores=(nothing, free), comparisons=())
    assert "always" in printed(card, 160)
    dear = dataclasses.replace(other, static=StaticCurve((1.0, 1e10), (1e15, 1e15), 1.0, 1e15))
    assert "never" in printed(dataclasses.replace(card, scores=(nothing, dear)), 160)
    pair = next(c for c in scorecard.comparisons if (c.phenomenon, c.fidelity) == setting and c.first == "table")
    until = dataclasses.replace(pair, second="nothing", overtaker="nothing")
    assert "until 2.13k" in printed(dataclasses.replace(card, scores=(nothing, other), comparisons=(until,)), 160)


def test_a_scorecard_without_the_yardstick_still_prints(scorecard):
    rest = dataclasses.replace(scorecard, scores=tuple(s for s in scorecard.scores if s.explanation != "nothing"))
    assert "table has the shortest total: 91.1 bits a token; it overtakes" in printed(rest, 160)


def test_the_scorecard_is_the_same_after_json(scorecard, tmp_path):
    from mdl.ledger import read_scorecard

    scorecard.save(tmp_path / "scorecard.json")
    again = read_scorecard(tmp_path / "scorecard.json")
    assert again == scorecard
    assert printed(again, 120) == printed(scorecard, 120)
