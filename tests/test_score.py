"""compare() end to end on a tiny model, tokens on disk: what a scorecard has to satisfy whatever the figures are."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sae_lens
import torch

from mdl.data import Dataset
from mdl.errors import ExplanationError
from mdl.ledger import Score, Scorecard, read_scorecard
from mdl.message import decode_message, encode_message
from mdl.models.model import Model
from mdl.score import compare, stream_file
from mdl.task import ACTIVATIONS, BEHAVIOUR

SITE = "blocks.1.hook_resid_pre"
REGION = f"upstream of {SITE}"
HORIZON = 1e4
pytestmark = pytest.mark.usefixtures("in_little_time")

KINDS = {"nothing": "constant", "token-table": "table", "clusters-8": "clusters"}
FEATURES, ACTIVE = 40, 4


@pytest.fixture(scope="module")
def token_file(tiny_data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "markov.npy"
    np.save(path, np.concatenate([tiny_data.fit, tiny_data.tune, tiny_data.held_out]))
    return path


@pytest.fixture(scope="module")
def run(tiny_model: Model, token_file: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One comparison written to a folder."""
    out = tmp_path_factory.mktemp("run")
    wanted = ["token-table", "clusters:k=8"]
    card = compare(
        tiny_model,
        REGION,
        explanations=wanted,
        fidelities=[0.1, 0.03],
        tokens=token_file,
        horizon=HORIZON,
        out=out,
    )
    return SimpleNamespace(card=card, out=out)


@pytest.fixture(scope="module")
def run_in_another_order(tiny_model: Model, token_file: Path) -> Scorecard:
    wanted = ["clusters:k=8", "nothing", "token-table"]
    return compare(tiny_model, REGION, explanations=wanted, fidelities=[0.03, 0.1], tokens=token_file, horizon=HORIZON)


def by_setting(card: Scorecard) -> dict[tuple[str, str, float | None], Score]:
    return {(s.explanation, s.phenomenon, s.fidelity): s for s in card.scores}


def test_every_explanation_at_every_setting(run: SimpleNamespace):
    settings = [(ACTIVATIONS, 0.1), (ACTIVATIONS, 0.03), (BEHAVIOUR, None)]
    assert run.card.settings == settings
    expected = [(name, *setting) for name in KINDS for setting in settings]  # "nothing" is there unasked
    assert list(by_setting(run.card)) == expected


def test_columns_add_up(run: SimpleNamespace):
    n = run.card.task["held_out_tokens"]
    for score in run.card.scores:
        assert score.column("static") == pytest.approx(score.static.whole_bits, abs=1e-6)
        assert sum(score.sequence_tokens) == n
        assert len(score.sequence_tokens) == run.card.task["held_out_units"]
        assert all(e.stderr == 0 for e in score.entries if e.column == "static")
        assert {e.column for e in score.entries} == {"static", "state", "residual"}
        assert score.obtained == ("coded" if score.phenomenon == ACTIVATIONS else "codelength")
        header = next(e for e in score.entries if e.name == "header")
        assert header.bits == pytest.approx(score.static.header_bits)
        if score.phenomenon == BEHAVIOUR:
            assert score.column("residual") == pytest.approx(score.kl_bits)
            assert sum(score.sequence_bits) / n == pytest.approx(score.rate, abs=200 / n)
        else:
            # The bits of the sequences are corrected to a KL of exactly eps, which the solver meets to half a per cent.
            assert score.kl_bits == pytest.approx(score.fidelity * run.card.task["null_kl_bits"], rel=0.02)
            # The files of both streams have ends, which the codes' lengths have not.
            assert sum(score.sequence_bits) / n == pytest.approx(score.rate, rel=0.01, abs=200 / n)


def test_the_null_under_behaviour_is_the_null_kl(run: SimpleNamespace):
    null = by_setting(run.card)["nothing", BEHAVIOUR, None]
    assert null.column("state") == 0
    # The message's mean is rounded to a step fit for the horizon, which may cost or gain a little.
    assert null.kl_bits == pytest.approx(run.card.task["null_kl_bits"], rel=0.1)


def test_total_is_static_plus_n_times_the_rate(run: SimpleNamespace):
    for score in run.card.scores:
        for position in (0, 10, 40, -1):
            n, static = score.static.tokens[position], score.static.bits[position]
            per_token = math.fsum(e.bits for e in score.entries if e.column != "static")
            assert float(score.total(n)) == pytest.approx(static + n * per_token, rel=1e-12)


def test_static_bits_rise_from_the_header_to_the_whole_message(run: SimpleNamespace):
    for score in run.card.scores:
        bits = np.array(score.static.bits)
        assert (np.diff(bits) >= -1e-9).all()
        assert score.static.header_bits <= bits[0] <= bits[-1] <= score.static.whole_bits * (1 + 1e-12)
        assert bits[-1] == pytest.approx(score.static.whole_bits, rel=1e-6)
    clusters = [s for s in run.card.scores if s.explanation == "clusters-8" and s.phenomenon == ACTIVATIONS]
    for score in clusters:  # one of eight centroids at N = 1, seven to come
        assert score.static.bits[0] < score.static.whole_bits - 7 * 8


def test_saved_of_nothing_is_nothing(run: SimpleNamespace):
    for score in run.card.scores:
        for n in (1.0, 1e3, 1e10):
            saved = run.card.saved(score, n)
            none = by_setting(run.card)["nothing", score.phenomenon, score.fidelity]
            assert saved == pytest.approx(1 - float(score.total(n)) / float(none.total(n)))
            assert saved == 0 or score.explanation != "nothing"


def test_messages_on_disk_are_the_static_bits_and_decode(run: SimpleNamespace):
    files = {path.name: path.stat().st_size for path in (run.out / "messages").iterdir()}
    assert {f for f in files if f.endswith(".mdl")} == {s.message_file for s in run.card.scores}
    n = run.card.task["held_out_tokens"]
    for score in run.card.scores:
        streams = [files.get(stream_file(score.message_file, suffix), 0) for suffix in (".state", ".residual")]
        coded = {e.column: e.bits for e in score.entries if e.column != "static" and e.obtained == "coded"}
        assert coded["state"] == 8 * streams[0] / n
        assert coded.get("residual", 0) == 8 * streams[1] / n
        data = (run.out / "messages" / score.message_file).read_bytes()
        assert 8 * len(data) == pytest.approx(score.column("static"), abs=1e-6)
        sections = decode_message(data)
        residual = ["components"] if score.phenomenon == ACTIVATIONS else []
        assert [s.kind for s in sections] == ["special", KINDS[score.explanation], *residual]
        assert encode_message(sections).data == data
    assert not list(run.out.rglob("*.partial"))


def test_json_round_trip(run: SimpleNamespace):
    assert read_scorecard(run.out / "scorecard.json") == run.card
    raw = json.loads((run.out / "scorecard.json").read_text())
    assert raw["schema"] == 3
    assert len(raw["scores"]) == len(run.card.scores)
    assert raw["task"]["data_sha256"] == run.card.task["data_sha256"]
    assert set(raw["versions"]) >= {"mdl-interp", "jax", "sae-lens"}


def test_neither_order_nor_repetition_changes_a_figure(run: SimpleNamespace, run_in_another_order: Scorecard):
    assert run_in_another_order.task == run.card.task
    first, second = by_setting(run.card), by_setting(run_in_another_order)
    assert first.keys() == second.keys()
    assert list(first) != list(second)
    for setting, score in first.items():
        assert score == second[setting], setting


def test_comparisons_are_the_differences_of_rates_on_the_same_sequences(
    run: SimpleNamespace, run_in_another_order: Scorecard
):
    scores = by_setting(run.card)
    pairs = list(itertools.combinations(KINDS, 2))
    assert len(run.card.comparisons) == 3 * len(pairs)
    for c in run.card.comparisons:
        first, second = (scores[name, c.phenomenon, c.fidelity] for name in (c.first, c.second))
        assert c.difference.value == pytest.approx(first.rate - second.rate)
        assert c.difference.low <= c.difference.high
        # Paired on sequences, so no wider than the two intervals apart.
        assert c.difference.high - c.difference.low < 1.3 * 2 * 1.96 * (first.rate_stderr + second.rate_stderr)
    swapped = {(c.first, c.second, c.phenomenon, c.fidelity): c for c in run_in_another_order.comparisons}
    for c in run.card.comparisons:
        key = (c.first, c.second, c.phenomenon, c.fidelity)
        other = swapped.get(key) or swapped[c.second, c.first, c.phenomenon, c.fidelity]
        sign = 1 if key in swapped else -1
        assert other.difference.value == pytest.approx(sign * c.difference.value)
        assert other.overtaker == c.overtaker


def test_two_splits_agree_within_their_intervals(run: SimpleNamespace, tiny_model: Model, token_file: Path):
    other = compare(
        tiny_model,
        REGION,
        explanations=["token-table"],
        fidelities=[0.1],
        tokens=token_file,
        horizon=HORIZON,
        seed=1,
    )
    assert other.task["data_sha256"] != run.card.task["data_sha256"]
    ours = by_setting(run.card)
    for setting, score in by_setting(other).items():
        both = math.hypot(score.rate_stderr, ours[setting].rate_stderr)
        assert 0 < both < 0.3 * score.rate
        assert abs(score.rate - ours[setting].rate) < 4 * both, setting
        assert score.rate != ours[setting].rate


def dictionary(folder: Path, order: np.ndarray, dead: int = 0) -> str:
    """A TopK SAE of random directions, features in the given order, then dead ones, as sae-lens writes it."""
    generator = torch.Generator().manual_seed(8)
    rows = torch.randn((FEATURES, 16), generator=generator)
    rows = (rows / rows.norm(dim=1, keepdim=True))[torch.from_numpy(order)]
    extra = torch.randn((dead, 16), generator=generator)
    metadata = sae_lens.saes.sae.SAEMetadata(hook_name=SITE, model_name="tiny")
    sae = sae_lens.TopKSAE(sae_lens.TopKSAEConfig(d_in=16, d_sae=FEATURES + dead, k=ACTIVE, metadata=metadata))
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([rows, extra]))
        sae.W_enc.copy_(torch.cat([rows, 0 * extra]).T)
        sae.b_enc.copy_(torch.cat([torch.zeros(FEATURES), torch.full((dead,), -1e6)]))
        sae.b_dec.zero_()
    sae.save_model(folder)
    return f'sae:path="{folder}"'


@pytest.fixture(scope="module")
def dictionaries(tiny_model: Model, token_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Scorecard:
    """One SAE as it is, with its features permuted on disk, and with dead features added."""
    folder, order = tmp_path_factory.mktemp("saes"), np.arange(FEATURES)
    shuffled = np.random.default_rng(9).permutation(FEATURES)
    wanted = [
        dictionary(folder / "plain", order),
        dictionary(folder / "permuted", shuffled),
        dictionary(folder / "dead", order, dead=5),
    ]
    with pytest.MonkeyPatch.context() as patch:
        # Left to its own choice, the sender would silence so poor a dictionary, and there would be nothing to permute.
        patch.setattr("decompositions.dictionary.KNOBS", {"static": (1.0,), "value": (1.0,)})
        return compare(
            tiny_model,
            REGION,
            explanations=wanted,
            phenomena=[ACTIVATIONS],
            fidelities=[0.1],
            tokens=token_file,
            horizon=HORIZON,
        )


def figures(score: Score) -> dict[str, Any]:
    """Everything of a score but its name."""
    return {**dataclasses.asdict(score), "explanation": "", "message_file": "", "notes": ()}


def test_an_sae_scores_the_same_with_its_features_permuted(dictionaries: Scorecard):
    scores = by_setting(dictionaries)
    plain, permuted = (scores[name, ACTIVATIONS, 0.1] for name in ("plain", "permuted"))
    assert plain.column("state") > 0
    assert 0 < plain.beside["l0"] <= ACTIVE
    assert permuted.column("state") == pytest.approx(plain.column("state"), rel=1e-9)
    # Decoding adds features up in another order, in float32: a symbol in a million may round to its neighbour.
    assert permuted.column("residual") == pytest.approx(plain.column("residual"), rel=1e-5)
    assert permuted.static.whole_bits == pytest.approx(plain.static.whole_bits, abs=64)
    for n in (1.0, 1e2, HORIZON, 1e9):
        assert float(permuted.total(n)) == pytest.approx(float(plain.total(n)), rel=1e-5, abs=64)


def test_a_feature_that_is_never_on_moves_nothing(dictionaries: Scorecard):
    scores = by_setting(dictionaries)
    plain, dead = (scores[name, ACTIVATIONS, 0.1] for name in ("plain", "dead"))
    assert figures(dead) == figures(plain)


def test_names_have_to_be_distinct(tiny_model: Model, token_file: Path):
    with pytest.raises(ExplanationError, match="two explanations are called clusters-8"):
        compare(tiny_model, REGION, explanations=["clusters:k=8,rounds=1", "clusters:k=8"], tokens=token_file)
