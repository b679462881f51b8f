"""Data and tuning: what is learned from the very data that the score is measured on."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from cheating.senders import Altered, Fitted, Rows, means_by_key

from decompositions.baselines import TokenTable
from decompositions.clusters import Clusters
from decompositions.pca import PCA
from mdl import task as tasks
from mdl.alphabets import IndexAlphabet
from mdl.data import Sizes, from_tokens
from mdl.errors import DataError, ExplanationError
from mdl.state import IndexState
from mdl.task import build_task

REGION = "upstream of blocks.1.hook_resid_pre"


class Learner(Altered):
    """Clusters that move to the means of whatever they were last asked to encode."""

    def encode(self, decoder, sample, settings):
        state = super().encode(decoder, sample, settings)
        if sample.inputs.n_tokens == 48 * 15:  # the held-out sample, by its size
            means = [sample.outputs[state.indices == i].mean(0) for i in range(state.n_parts)]
            self.base = dataclasses.replace(self.base, centroids=np.nan_to_num(np.array(means)))
        return state


@pytest.mark.cheat(
    6,
    "tuning on the evaluation data",
    "fit sees no held-out data, and what is sent may not change once they were encoded",
    "refused",
)
def test_tuning(judge, outcome):
    def fit(task):
        assert task.held_out is None
        return Learner(Clusters(k=8).fit(task), "learner")

    with pytest.raises(ExplanationError) as caught:
        judge(Fitted(fit), fidelities=[0.3, 0.1])
    outcome.refused(caught.value, "tunes itself on held-out data")


def test_a_plugin_cannot_change_the_task(judge, tiny_task):
    def quiet(task):
        task.tune_activations.outputs[:] *= 0.5
        return TokenTable().fit(task)

    kept = tiny_task.tune_activations.outputs.copy()
    try:
        tiny_task.tune_activations.outputs.flags.writeable = True
        with pytest.raises(ExplanationError, match="changed the task under way: outputs of tune_activations"):
            judge(Fitted(quiet))
    finally:
        tiny_task.tune_activations.outputs[:] = kept

    norm = tiny_task.model.params["ln_final"]
    own = dict(norm)

    def silent(task):
        norm.update({name: 0 * weight for name, weight in own.items()})
        return TokenTable().fit(task)

    try:
        with pytest.raises(ExplanationError, match="changed the task under way: the model's weights"):
            judge(Fitted(silent))
    finally:
        norm.update(own)


@pytest.mark.cheat(
    8, "the encoder does the work", "what depends on the true activations is state, paid for each token", "charged"
)
def test_oracle_encoder(judge, honest, outcome):
    cheat = judge(PCA(rank=16))["pca-16"]  # codes of the true outputs, by an encoder that is not sent
    outcome.charged(honest["nothing"].total(1e4), cheat.total(1e4), margin=0.02)
    assert cheat.beside["explained_variance"] > 0.7
    assert cheat.column("state") > 0.8 * honest["nothing"].column("residual")


def contexts(fit):
    """A row for every prefix of a sequence."""
    inputs = fit.inputs
    keys = np.zeros(inputs.tokens.shape, np.int64)
    for position in range(inputs.tokens.shape[1]):
        before = keys[:, position - 1] if position else 0
        keys[:, position] = (before * 1000003 + inputs.tokens[:, position] + 1) % (2**31 - 1)
    return Rows("contexts", "cheat-contexts", *means_by_key(keys[inputs.scored], fit.outputs), step=0.5)


@pytest.mark.cheat(
    9,
    "a table of whole contexts",
    "every row is charged on first use, and no held-out context was fitted on",
    "charged",
)
def test_contexts(judge, honest, outcome):
    cheat = judge(Fitted(lambda task: contexts(task.fit)))["contexts"]
    outcome.charged(honest["tokens"].total(1e4), cheat.total(1e4))


@pytest.mark.cheat(
    25,
    "repeated evaluation sequences",
    "duplicates of other data are dropped or refused; start tokens are not scored",
    "refused",
)
def test_duplicates(tiny_model, tiny_data, judge_on, honest, outcome, tmp_path, monkeypatch):
    data = dataclasses.replace(tiny_data, held_out=tiny_data.fit[:48])
    repeated = np.concatenate([data.fit, data.tune, data.held_out])
    with pytest.raises(DataError) as caught:
        build_task(tiny_model, REGION, data, lambda *progress: None)
    outcome.refused(caught.value, "48 of 48 held-out sequences are duplicates")
    np.save(tmp_path / "tokens.npy", repeated)
    loaded = from_tokens(tmp_path / "tokens.npy", Sizes(), 0)
    assert loaded.description["duplicates_dropped"] > 0
    assert not {r.tobytes() for r in loaded.held_out} & {r.tobytes() for r in np.concatenate([loaded.fit, loaded.tune])}

    monkeypatch.setattr(tasks, "refuse_repeats", lambda data: None)
    undefended = judge_on(build_task(tiny_model, REGION, data, lambda *progress: None))(
        Fitted(lambda task: contexts(task.fit))
    )
    assert undefended["contexts"].rate < 0.5 * honest["tokens"].rate


@pytest.mark.cheat(
    10,
    "a prior that was fitted to the symbols",
    "codes are ours and fixed beforehand; what is fitted travels",
    "refused",
)
def test_own_prior(judge, outcome, no_conduct, monkeypatch):
    class Free:
        def __init__(self, values):
            self.values, self.n_tokens = values, len(values)

    def everything(state, decoder, sample):
        return Free((np.rint(4 * sample.outputs) / 4).astype(np.float32))

    def sent(task):
        return OwnPrior(Clusters(k=8).fit(task), "own prior", "cheat-priced", change_state=everything)

    with pytest.raises(ExplanationError) as caught:
        judge(Fitted(sent))
    outcome.refused(caught.value, "brings a code of its own, FreeAlphabet")

    for place in ("estimators.fidelity", "mdl.receiver"):
        monkeypatch.setattr(f"{place}.check_alphabet", lambda alphabet: alphabet)
    with pytest.raises(AssertionError):  # no stream carries such a state either
        judge(Fitted(sent))


class OwnPrior(Altered):
    def encode(self, decoder, sample, settings):
        return self.change_state(None, decoder, sample)


def with_own_entropy(state, decoder, sample):
    class Histogram(IndexState):
        def bits(self):
            share = np.bincount(self.indices) / len(self.indices)
            return float(-np.log2(share[self.indices]).sum())

    return Histogram(state.indices, state.n_parts)


@pytest.mark.cheat(
    19, "in-sample entropy, its histogram unsent", "a state is one of ours, no subclass; codes are adaptive", "refused"
)
def test_in_sample_entropy(judge, honest, outcome, monkeypatch):
    cheat = Fitted(lambda task: Altered(Clusters(k=8).fit(task), "entropy", change_state=with_own_entropy))
    with pytest.raises(ExplanationError) as caught:
        judge(cheat)
    outcome.refused(caught.value, "no subclass", "returned Histogram")
    n = sum(honest["ours"].sequence_tokens)
    state = IndexState(np.arange(n) % 8, 8)
    own = with_own_entropy(state, None, None)
    assert own.bits() < IndexAlphabet(8).accept(state, n).bits()  # what would be saved
