"""Whole comparisons on a toy and on a tiny transformer's MLP: columns, first use, and what a verifier says."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from decompositions.weights.components import Components
from decompositions.weights.truths import gated_truth
from estimators.fidelity import Attempt, Bench, Coding
from estimators.first_use import static_curve
from estimators.solver import KL_PROMISE
from mdl.data import Dataset, from_rows
from mdl.ledger import Score
from mdl.message import decode_message
from mdl.models.model import Model
from mdl.protocols import Settings
from mdl.score import compare
from mdl.state import SparseState
from mdl.task import ACTIVATIONS, BEHAVIOUR, build_task
from mdl.verify import verify
from tests.decompositions.weights.cases import gated, no_progress

pytestmark = pytest.mark.usefixtures("in_little_time")
HORIZON = 200.0
NAMES = ("nothing", "truth", "weights", "low rank weights", "fewer neurons")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, in_little_time: None) -> SimpleNamespace:
    """Gated functions, from a folder."""
    folder, model = tmp_path_factory.mktemp("toy"), gated(240, 3, 4)
    model.save(folder / "model")
    assert model.weights is not None
    gated_truth(model.network, model.weights).factors.save(folder / "truth.safetensors")
    texts = [f'components:path="{folder / "truth.safetensors"}",exact=true', "weights", "low-rank", "neurons"]
    card = compare(str(folder / "model"), explanations=texts, fidelities=[0.01], horizon=HORIZON, out=folder / "run")
    return SimpleNamespace(card=card, out=folder / "run")


def score_of(run: SimpleNamespace, name: str, phenomenon: str) -> Score:
    (found,) = [s for s in run.card.scores if (s.explanation, s.phenomenon) == (name, phenomenon)]
    return found


def test_every_explanation_is_scored_under_both_phenomena(run: SimpleNamespace) -> None:
    settings = [(name, phenomenon) for name in NAMES for phenomenon in (ACTIVATIONS, BEHAVIOUR)]
    assert [(s.explanation, s.phenomenon) for s in run.card.scores] == settings
    for score in run.card.scores:
        if score.phenomenon == ACTIVATIONS:
            assert score.kl_bits < (1 + KL_PROMISE) * 0.01 * run.card.task["null_kl_bits"]
            assert score.obtained == "coded"


def test_what_was_sent_says_it_again(run: SimpleNamespace) -> None:
    found = verify(run.out)
    assert [f for f in found.findings if not f.agrees] == []
    assert {f.score for f in found.findings} >= {f"{name} @ 1 %" for name in NAMES}


def test_columns_are_those_of_the_family(run: SimpleNamespace) -> None:
    for phenomenon in (ACTIVATIONS, BEHAVIOUR):
        for name in ("weights", "low rank weights", "fewer neurons"):
            score = score_of(run, name, phenomenon)
            assert sum(e.bits for e in score.entries if e.column == "state") == 0  # nothing is told per token
            assert score.static.at(1.0) > 0.5 * score.static.at(1e9)  # a lump, but for the residual coder's axes
            if phenomenon == BEHAVIOUR:
                assert score.static.at(1.0) == pytest.approx(score.static.at(1e9))
        truth = score_of(run, "truth", phenomenon)
        assert sum(e.bits for e in truth.entries if e.column == "state") > 0
        assert truth.static.at(1.0) < 0.75 * truth.static.at(1e9)  # a third of the parts to begin with
    kinds = {
        s.explanation: decode_message((run.out / "messages" / s.message_file).read_bytes())[1].kind
        for s in run.card.scores
    }
    assert kinds == dict(zip(NAMES, ("constant", "parts", "weights", "weights", "weights"), strict=True))


def test_at_short_horizons_the_truth_is_shorter_than_the_lump(run: SimpleNamespace) -> None:
    """Under behaviour, of which the weights that are sent are all: index bits and a few parts, or everything."""
    truth, lump = (score_of(run, name, BEHAVIOUR) for name in ("truth", "weights"))
    assert truth.static.at(1.0) + truth.rate < lump.static.at(1.0) + lump.rate
    nothing = score_of(run, "nothing", BEHAVIOUR)
    assert min(s.static.at(1e6) / 1e6 + s.rate for s in (truth, lump)) < nothing.static.at(1e6) / 1e6 + nothing.rate


def attempt_of(bench: Bench, gates: str, factors: object) -> Attempt:
    explanation = Components(object=factors, gates=gates).fit(bench.task.for_fitting())
    knobs = {name: grid[0] for name, grid in explanation.knobs.items()}
    settings = Settings(bench.horizon, 0.2, bench.metrics[0].root, knobs)
    coding = Coding.prepare(bench, explanation, bench.metrics[0], settings, 0.2, None)
    return coding.attempt(bench, bench.held_out)


def test_paid_on_first_use() -> None:
    """static(1) is the header, and each part as often as a token has it on; static of all tokens, what any has."""
    model = gated(240, 3, 4)
    task = build_task(model, "vectors", from_rows(model.first_equal, None, 0, "gated"), no_progress)
    bench, factors = Bench(task, HORIZON), gated_truth(model.network, model.weights).factors
    attempt = attempt_of(bench, "indices", factors)
    assert isinstance(attempt.state, SparseState)
    message, n = attempt.message, attempt.state.n_tokens
    curve = static_curve(message, attempt.received.touched, n)
    on = attempt.state.matrix().toarray() > 0
    special, parts = message.part_bits
    assert not len(special)
    assert len(parts) == 3
    assert curve.at(1.0) == pytest.approx(
        message.header_bits + sum(p * f for p, f in zip(parts, on.mean(0), strict=True))
    )
    assert curve.at(float(n)) == pytest.approx(message.header_bits + parts[on.any(0)].sum())
    assert curve.at(1e10) == pytest.approx(8 * len(message.data))
    static = attempt_of(bench, "static", factors)
    lump = static_curve(static.message, static.received.touched, n)
    assert lump.at(1.0) == 8 * len(static.message.data)
    first = np.argmax(on, 0)  # parts are sent in the order of their first use
    assert (np.diff(first) >= 0).all()


def test_the_mlp_of_a_transformer(tiny_model: Model, tiny_data: Dataset, tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.concatenate([tiny_data.fit, tiny_data.tune, tiny_data.held_out]))
    card = compare(
        tiny_model,
        "blocks.0.mlp",
        explanations=["weights", "components:parts=singular,gates=static,exact=true"],
        phenomena=[ACTIVATIONS],
        fidelities=[0.1],
        tokens=tmp_path / "tokens.npy",
        horizon=1e5,
    )
    by_name = {s.explanation: s for s in card.scores}
    assert set(by_name) == {"nothing", "weights", "singular directions (static)"}
    for score in card.scores:
        assert score.kl_bits < (1 + KL_PROMISE) * 0.1 * card.task["null_kl_bits"]
    assert by_name["weights"].rate < 0.5 * by_name["nothing"].rate
    assert by_name["weights"].static.at(1.0) > by_name["nothing"].static.at(1.0)
