"""Lengths and units: figures that are not what the files weigh. One saved run, verified once, with every lie in it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from cheating.senders import clusters
from click.testing import CliRunner

from decompositions.clusters import ClustersDecoder
from mdl import cli
from mdl.ledger import Entry, read_scorecard
from mdl.score import compare, stream_file
from mdl.units import bits_to_nats
from mdl.verify import verify


def remember_on_our_class(state, decoder, sample):
    """Replace what our own decoder does, in this process."""
    truth = (np.rint(4 * sample.outputs) / 4).astype(np.float32)
    honest = ClustersDecoder.predict
    type(decoder).predict = lambda self, inputs, state: (
        truth if len(truth) == state.n_tokens else honest(self, inputs, state)
    )
    return state


def lied(score, **changes):
    return dataclasses.replace(score, **changes)


def entry(score, name, bits):
    return lied(score, entries=tuple(dataclasses.replace(e, bits=bits) if e.name == name else e for e in score.entries))


@pytest.fixture(scope="module")
def run(tiny_model, tiny_data, tmp_path_factory):
    """A comparison with an explanation that changes our decoder's class while it is encoded, written to a folder."""
    folder = tmp_path_factory.mktemp("run")
    np.save(folder / "tokens.npy", np.concatenate([tiny_data.fit, tiny_data.tune, tiny_data.held_out]))
    predict = ClustersDecoder.predict
    try:
        compare(
            tiny_model,
            "upstream of blocks.1.hook_resid_pre",
            explanations=["nothing", "token-table", clusters("patched", change_state=remember_on_our_class)],
            phenomena=["activations"],
            fidelities=[0.1],
            tokens=folder / "tokens.npy",
            horizon=1e4,
            out=folder / "run",
        )
    finally:
        ClustersDecoder.predict = predict
    return folder / "run"


@pytest.fixture(scope="module")
def honest_card(run):
    return read_scorecard(run / "scorecard.json")


@pytest.fixture(scope="module")
def verified(run: Path, honest_card, tiny_model):
    """The run verified, after its scorecard was doctored in four ways."""
    nothing, table, patched = honest_card.scores
    state_free = entry(nothing, "residual", nothing.column("residual") * 0.97)  # an ideal, fractional length
    in_nats = lied(
        entry(table, "residual", table.column("residual") * 1000 / 1024), kl_bits=float(bits_to_nats(table.kl_bits))
    )
    static = dataclasses.replace(in_nats.static, bits=tuple(b * 0.9 for b in in_nats.static.bits))
    in_nats = lied(in_nats, static=static)
    crossing = tuple(
        dataclasses.replace(
            c, crossing=None if c.crossing else c.difference, overtaker=None if c.overtaker else c.first
        )
        for c in honest_card.comparisons
    )
    doctored = dataclasses.replace(honest_card, scores=(state_free, in_nats, patched), comparisons=crossing)
    doctored.save(run / "scorecard.json")
    return verify(run, tiny_model)


def wrong(verified, score):
    return {f.figure for f in verified.findings if not f.agrees and f.score.startswith(score)}


@pytest.mark.cheat(
    18, "ideal lengths in place of files", "the figure is 8 x the file's size; `mdl verify` weighs it again", "refused"
)
def test_ideal_lengths(run, honest_card, verified, outcome):
    for score in honest_card.scores:
        file = run / "messages" / score.message_file
        residual = (run / "messages" / stream_file(score.message_file, ".residual")).stat().st_size
        n = sum(score.sequence_tokens)
        assert math.isclose(score.column("residual") * n, 8 * residual, rel_tol=1e-9)
        assert math.isclose(score.column("static"), 8 * file.stat().st_size, rel_tol=1e-9)
    assert "entries.residual.bits" in wrong(verified, "nothing")
    found = next(f for f in verified.findings if f.figure == "entries.residual.bits" and f.score.startswith("nothing"))
    outcome.refused(f"claimed {found.claimed:.2f} bits, found {found.found:.2f}: DISAGREES", "DISAGREES", "claimed")


@pytest.mark.cheat(
    20, "nats for bits, 1,000 for 1,024", "every figure is worked out again from what was decoded", "refused"
)
def test_units(verified, outcome, run, monkeypatch):
    assert {"kl_bits", "entries.residual.bits"} <= wrong(verified, "token-table")
    assert any(figure.startswith("static.bits") for figure in wrong(verified, "token-table"))
    assert any(f.figure.startswith(("crossing", "overtaker")) for f in verified.findings if not f.agrees)
    monkeypatch.setattr("mdl.verify.verify", lambda run, model, progress: verified)
    ran = CliRunner().invoke(cli.main, ["verify", str(run)])
    assert ran.exit_code == 1
    outcome.refused(" ".join(ran.output.split()[-12:]), "DISAGREE", "figures recomputed from decoded messages")


def test_a_decoder_class_changed_in_the_senders_process_is_found(honest_card, verified):
    nothing, _, patched = honest_card.scores
    assert patched.rate < 0.5 * nothing.rate  # what it gained in the sender's process
    assert {"kl_bits", "beside.explained_variance"} <= wrong(verified, "patched")


def test_no_length_is_infinite_or_negative():
    for bits in (math.inf, math.nan, -1.0):
        with pytest.raises(Exception, match="is no length"):
            Entry("state", "state", bits, 0.0, "coded", "none")
