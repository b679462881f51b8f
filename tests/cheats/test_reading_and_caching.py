"""Reading and caching: decoders that know what nobody sent."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cheating.senders import Fitted, Rows, clusters, means_by_key

from decompositions.baselines import Nothing, TokenTable
from decompositions.pca import PCA
from decompositions.random_dictionary import RandomDictionary
from estimators import conduct
from estimators.conduct import check_decoder
from estimators.fidelity import encoded
from mdl.errors import ExplanationError, MessageError
from mdl.message import QuantisedArray
from mdl.models.outside import load_outside, region_weights, save_outside
from mdl.program import Program
from mdl.protocols import Settings

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.cheat(
    12,
    "reading the model while decoding",
    "source that reads is refused; a receiver's process holds no region and opens no file",
    "refused",
)
def test_reading(judge, outcome, tiny_model, tmp_path):
    with pytest.raises(ExplanationError) as caught:
        judge(clusters("reading", kind="cheat-reading"))
    outcome.refused(caught.value, "the attribute .load", "reading files")

    hidden = region_weights(tiny_model, "tokens", "blocks.1.hook_resid_pre")
    save_outside(tiny_model, "tokens", "blocks.1.hook_resid_pre", tmp_path)
    outside = load_outside(tmp_path)
    assert "blocks.0.attn.W_Q" in hidden or any(name.startswith("blocks.0.attn.") for name in hidden)
    assert all(np.isnan(np.asarray(weight)).all() for weight in outside.params["blocks"][0]["attn"].values())


CONFINED = """
import sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
from estimators.verification.receiver import WITHHELD, confine
weights = next(WITHHELD.rglob("model.safetensors"))
if sys.argv[2] == "confined":
    confine([], Path(sys.argv[3]))
print(len(weights.read_bytes()))
"""


@pytest.mark.parametrize("confined", ["confined", "free"])
def test_the_receivers_process_cannot_read_the_weights(confined, tmp_path):
    ran = subprocess.run(
        [sys.executable, "-I", "-c", CONFINED, str(ROOT), confined, str(tmp_path)], capture_output=True, text=True
    )
    if confined == "free":
        assert int(ran.stdout) > 10**5
    else:
        assert ran.returncode != 0
        assert "a receiver may not read" in ran.stderr


@pytest.mark.cheat(
    13, "a leak through installed packages", "a decoder imports numpy, scipy and our nouns, nothing else", "refused"
)
def test_installed_packages(judge, outcome):
    with pytest.raises(ExplanationError) as caught:
        judge(clusters("installed", kind="cheat-installed"))
    outcome.refused(caught.value, "imports matplotlib", "installed packages")


@pytest.mark.cheat(
    14,
    "non-determinism hides a mismatch",
    "what is decoded twice is the same bytes, here and in `mdl verify`",
    "refused",
)
def test_noise(judge, outcome):
    with pytest.raises(ExplanationError) as caught:
        judge(clusters("noisy", kind="cheat-noisy"))
    outcome.refused(caught.value, "not repeatable", "random numbers")


def remembering(state, decoder, sample):
    """Leave the true outputs on the class, where the receiver's decoder will find them."""
    type(decoder).memory = (np.rint(4 * sample.outputs) / 4).astype(np.float32)
    return state


@pytest.mark.cheat(
    15,
    "outputs cached, state kept between calls",
    "sequences in other company decode alike; verified in a fresh process",
    "refused",
)
def test_memory(judge, honest, outcome, monkeypatch):
    from cheating.memory import MemoryDecoder

    cheat = clusters("memory", kind="cheat-memory", change_state=remembering)
    with monkeypatch.context() as patch:
        patch.setattr(MemoryDecoder, "memory", None)
        with pytest.raises(ExplanationError) as caught:
            judge(cheat)
    outcome.refused(caught.value, "keeps state between calls")

    with pytest.raises(ExplanationError, match=r"kept by `self\.answers.*a cache"):
        judge(clusters("counting", kind="cheat-counting"))

    with monkeypatch.context() as patch:
        patch.setattr(MemoryDecoder, "memory", None)
        patch.setattr(conduct, "check_decoder", lambda *arguments: None)
        with pytest.raises(ExplanationError, match="memory"):  # the class is not as its source has it
            judge(cheat)
        patch.setattr("mdl.receiver.check_source", lambda section, decoder: None)
        patch.setattr(MemoryDecoder, "memory", None)
        assert judge(cheat)["memory"].total(1e4) < 0.5 * honest["theirs"].total(1e4)


@pytest.mark.cheat(
    17,
    "free computing: a decoder that trains or searches",
    "operations of a program are bounded, and the time of a source",
    "refused",
)
def test_computing(judge, outcome, monkeypatch):
    program = Program()
    wide = program.header(QuantisedArray.from_integers(np.ones((1, 1 << 14))))
    tall = program.transpose(wide)
    with pytest.raises(MessageError) as caught:
        program.section(program.matmul(program.inputs(1 << 14), program.matmul(tall, wide)))
    outcome.refused(caught.value, "Computing is not charged in bits", "trains, searches")
    monkeypatch.setattr(conduct, "SECONDS", (0.02, 1e-6))
    with pytest.raises(ExplanationError, match="a decoder that trains or searches is refused"):
        judge(clusters("heavy", kind="cheat-heavy"))


def next_tokens(task, strength):
    """What pushes the logits to the token that comes: rows of the unembedding, by the next token's id."""
    rows = np.asarray(task.model.params["embed"]["W_E"])
    mean = task.fit.outputs.mean(0)
    return Rows("future", "cheat-future", mean, np.arange(len(rows)), strength * rows, step=0.25)


@pytest.mark.cheat(
    28,
    "a bidirectional gate leaks the future",
    "predictions before a cut stay what they are, whatever comes behind it",
    "refused",
)
def test_future(judge, outcome, no_conduct, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(conduct, "check_decoder", check_decoder)
        with pytest.raises(ExplanationError) as caught:
            judge(Fitted(lambda task: next_tokens(task, 4.0)))
    outcome.refused(caught.value, "leaks the future")
    undefended = judge(Nothing(), Fitted(lambda task: next_tokens(task, 4.0)))
    # It would predict the text better than M itself does.
    assert undefended["future"].beside["loss_increase_bits"] < min(
        0, undefended["nothing"].beside["loss_increase_bits"] - 1
    )


def test_a_decoder_that_lies_about_what_it_touches(judge, honest, no_conduct, monkeypatch):
    def tokens(task):
        return Rows("lying", "cheat-untouched", *means_by_key(task.fit.inputs.scored_tokens(), task.fit.outputs))

    with monkeypatch.context() as patch:
        patch.setattr(conduct, "check_decoder", check_decoder)
        with pytest.raises(ExplanationError, match="lies about what it touches"):
            judge(Fitted(tokens))
    undefended = judge(Fitted(tokens))["lying"]
    fair = honest["tokens"]
    assert undefended.rate == pytest.approx(fair.rate)
    assert undefended.static.at(500) < 0.7 * fair.static.at(500)


def test_a_decoder_whose_account_depends_on_the_batch(judge):
    """Alone it tells the truth; for all held-out tokens it says that the last one needs everything."""

    def tokens(task):
        return Rows("late", "cheat-late", *means_by_key(task.fit.inputs.scored_tokens(), task.fit.outputs))

    with pytest.raises(ExplanationError, match="says one thing in one batch, another in another"):
        judge(Fitted(tokens))


def test_a_class_that_says_it_is_ours_is_not(tiny_task):
    from cheating.erasing import ErasingDecoder

    from mdl.receiver import predicted
    from mdl.state import IndexState

    class Disguised(ErasingDecoder):
        pass

    for module, name in (("decompositions.clusters", "ClustersDecoder"), ("decompositions.clusters", "Disguised")):
        Disguised.__module__, Disguised.__qualname__ = module, name
        state = IndexState(np.ones(tiny_task.fit.inputs.n_tokens, np.int64), 8)
        predicted(Disguised(np.zeros((8, 16), np.float32)), tiny_task.fit.inputs, state)
        assert state.indices.all()


@pytest.mark.parametrize(
    "decomposition",
    [Nothing(), TokenTable(), PCA(rank=4), clusters("clusters"), RandomDictionary(features=32, k=2)],
    ids=lambda d: type(d).__name__,
)
def test_our_own_decoders_behave(decomposition, tiny_task, tiny_bench, monkeypatch):
    """They are not checked while they are scored: here they are."""
    explanation = decomposition.fit(tiny_task.for_fitting())
    metric, sample = tiny_bench.metrics[1], tiny_bench.probe.sample
    knobs = {name: grid[len(grid) // 2] for name, grid in explanation.knobs.items()}
    settings = Settings(1e4, 0.5, metric.root, knobs)
    section = explanation.section(settings)
    if section.kind in ("table", "random-dictionary"):  # zeros are no token ids, nor distinct rows of a stream
        monkeypatch.setattr(conduct, "_check_touched", lambda *arguments: None)
    check_decoder("ours", section, sample.inputs, encoded(explanation, section, sample, settings))
