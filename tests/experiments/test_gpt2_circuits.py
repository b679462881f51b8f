"""The scripts for GPT-2 on a small random GPT-2 on disk, with prompts of the published shape."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import transformers
from click.testing import CliRunner

from decompositions.circuits.formats import load_circuit
from experiments.gpt2_circuits.prompts import metric_of, read_pairs
from experiments.gpt2_circuits.run import main
from mdl.errors import DataError
from mdl.models import load_model
from mdl.models.circuits.graph import Graph
from tests.conftest import gpt2

YEARS = [f"{year:02d}" for year in range(100)]
WORDS = ["the", "war", "lasted", "from", "to", "ada", "bob", "gave", "it", "and", "then"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2 of two layers, with a tokenizer to which words and years are single tokens."""
    folder = tmp_path_factory.mktemp("gpt2")
    words = ["<|endoftext|>", "[UNK]", *WORDS, *YEARS]
    vocabulary = {word: i for i, word in enumerate(words)}
    found = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    found.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model = gpt2(vocab_size=len(words))
    model.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=found).save_pretrained(folder)
    return folder


def write(path: Path, rows: list[dict[str, str | int]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def greater_than(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows: list[dict[str, str | int]] = []
    for year in range(10, 90, 8):
        more = "then " if year % 16 == 10 else ""  # two lengths
        texts = (f"{more}the war lasted from {year:02d} to", f"{more}the war lasted from 01 to")
        rows.append({"clean": texts[0], "corrupted": texts[1], "correct_idx": year})
    return write(tmp_path_factory.mktemp("data") / "greater_than.csv", rows)


@pytest.fixture(scope="module")
def ioi(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = load_model(checkpoint)
    ada, bob = (model.tokenizer.token_to_id(name) for name in ("ada", "bob"))  # type: ignore[union-attr]
    rows: list[dict[str, str | int]] = []
    for first, second, right, wrong in (("ada", "bob", bob, ada), ("bob", "ada", ada, bob)):
        texts = (f"{first} and {second} then {first} gave it to", f"{first} and {second} then war gave it to")
        rows.append({"clean": texts[0], "corrupted": texts[1], "correct_idx": right, "incorrect_idx": wrong})
    return write(tmp_path_factory.mktemp("data") / "ioi.csv", rows)


@pytest.mark.parametrize(("task", "method"), [("greater-than", "eap-ig-inputs"), ("ioi", "acdc"), ("ioi", "eap")])
def test_the_script(task: str, method: str, checkpoint: Path, greater_than: Path, ioi: Path, tmp_path: Path) -> None:
    prompts = greater_than if task == "greater-than" else ioi
    arguments = ["--model", str(checkpoint), "--prompts", str(prompts), "--task", task, "--method", method]
    result = CliRunner().invoke(main, [*arguments, "--threshold", "0.01", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "rows.json").read_text())
    graph = Graph.of(load_model(checkpoint).config)  # type: ignore[union-attr]
    assert load_circuit(tmp_path / "edges.json", graph).chosen().any()
    if method == "acdc":
        assert len(rows) == 1
        assert 0 < rows[0]["edges"] < graph.n_edges
        return
    assert [r["share"] for r in rows][-1] == 1.0
    assert rows[-1]["faithfulness"] == pytest.approx(1.0, abs=1e-4)
    assert rows[-1]["kl_bits"] < 1e-4
    assert rows[0]["kl_bits"] > rows[-1]["kl_bits"]
    assert "fixed axis" in result.output
    assert "self-normalised" in result.output


def test_metrics_by_hand(checkpoint: Path, greater_than: Path, ioi: Path) -> None:
    tokenizer = load_model(checkpoint).tokenizer  # type: ignore[union-attr]
    (pairs,) = read_pairs(ioi, "ioi", tokenizer)
    logits = np.random.default_rng(0).standard_normal((2, 1, 113)).astype(np.float32)
    by_hand = np.mean([logits[i, 0, pairs.labels[i, 0]] - logits[i, 0, pairs.labels[i, 1]] for i in range(2)])
    assert float(metric_of("ioi", pairs, tokenizer)(logits, logits)) == pytest.approx(-by_hand, rel=1e-5)
    short, long = sorted(read_pairs(greater_than, "greater-than", tokenizer), key=lambda p: p.clean.shape[1])
    assert long.clean.shape[1] == short.clean.shape[1] + 1
    logits = np.random.default_rng(1).standard_normal((len(short.clean), 1, 113)).astype(np.float32)
    p = np.exp(logits[:, 0]) / np.exp(logits[:, 0]).sum(1, keepdims=True)
    years = [tokenizer.token_to_id(y) for y in YEARS]
    by_hand = np.mean(
        [sum(p[i, t] * (1 if y > short.labels[i, 0] else -1) for y, t in enumerate(years)) for i in range(len(p))]
    )
    assert float(metric_of("greater-than", short, tokenizer)(logits, logits)) == pytest.approx(-by_hand, rel=1e-4)


def test_bad_prompts_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = load_model(checkpoint).tokenizer  # type: ignore[union-attr]
    fits: dict[str, str | int] = {"clean": "the war", "corrupted": "the war", "correct_idx": 3}
    for row, message in (
        ({**fits, "corrupted": "the"}, "line 2: 2 tokens and 1 of the corrupted prompt"),
        ({**fits, "correct_idx": "x"}, "a label is no number"),
        ({"clean": "the war", "corrupted": "the war"}, "takes the columns clean, corrupted, correct_idx"),
    ):
        with pytest.raises(DataError, match=message):
            read_pairs(write(tmp_path / "x.csv", [row]), "greater-than", tokenizer)
    with pytest.raises(DataError, match="cannot be read as a csv"):
        read_pairs(tmp_path / "absent.csv", "ioi", tokenizer)
