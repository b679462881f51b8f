"""Two explanations added: one section, two decoders, and what the receiver makes of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from decompositions.baselines import Affine, Nothing, TokenTable
from decompositions.clusters import Clusters
from decompositions.pca import PCA
from decompositions.random_dictionary import RandomDictionary
from decompositions.sums import KINDS, LAYOUT, Sum, SumDecoder, SumExplanation, joined_section, left_by, split_section
from decompositions.token_pairs import TokenPairs
from estimators.fidelity import Bench, Coding, encoded
from mdl.errors import ExplanationError, MessageError
from mdl.message import QuantisedArray, Section, decode_message, encode_message
from mdl.plugins import make_decomposition
from mdl.protocols import Decoder, Decomposition, Explanation, Inputs, Sample, Settings
from mdl.receiver import decoder_of, predicted
from mdl.state import NoState
from mdl.task import Task

PAIRS = {
    "table + clusters": (TokenTable(), Clusters(k=12, rounds=2)),
    "pairs + pca": (TokenPairs(), PCA(rank=4)),
    "affine + dictionary": (Affine(), RandomDictionary(features=32, k=3)),
    "table + nothing": (TokenTable(), Nothing()),
}


def settings_of(explanation: Explanation, horizon: float = 1e6, step: float = 0.05) -> Settings:
    """The middle of every grid."""
    return Settings(horizon, step, np.eye(16), {k: grid[len(grid) // 2] for k, grid in explanation.knobs.items()})


@pytest.fixture(scope="module", params=sorted(PAIRS))
def fitted(request: pytest.FixtureRequest, tiny_task: Task) -> SumExplanation:
    return Sum(*PAIRS[request.param]).fit(tiny_task.for_fitting())


def test_the_receiver_adds_what_both_decode_to(fitted: SumExplanation, tiny_task: Task) -> None:
    """Against the two children sent by themselves: the same integers, the same predictions, touched parts in order."""
    settings, sample = settings_of(fitted), tiny_task.held_out.sample()
    section = fitted.section(settings)
    decoder = decoder_of(decode_message(encode_message([section]).data)[0])
    assert isinstance(decoder, SumDecoder)
    assert isinstance(decoder, Decoder)
    assert isinstance(fitted, Explanation)
    state = encoded(fitted, section, sample, settings)
    mine, other = fitted.children(settings)
    first, second = fitted.first.section(mine), fitted.second.section(other)
    table = predicted(decoder_of(first), sample.inputs, NoState(sample.inputs.n_tokens))
    left = Sample(sample.inputs, sample.outputs - table)
    alone = encoded(fitted.second, second, left, other)
    assert state.bits() == alone.bits()
    expected = table + predicted(decoder_of(second), sample.inputs, alone)
    assert np.array_equal(predicted(decoder, sample.inputs, state), expected)
    uses = [
        decoder_of(s).touched(sample.inputs, x) for s, x in ((second, alone), (first, NoState(sample.inputs.n_tokens)))
    ]
    expected_uses = [u.toarray() for u in uses if u is not None]
    touched = decoder.touched(sample.inputs, state)
    assert (touched is None) == (not expected_uses)
    if touched is not None:
        assert np.array_equal(touched.toarray() != 0, np.hstack(expected_uses) != 0)
    flops = decoder_of(first).flops_per_token(sample.inputs, NoState(1))
    assert decoder.flops_per_token(sample.inputs, state) >= flops


def test_little_more_travels_than_the_two(fitted: SumExplanation) -> None:
    """Structure, and a few bits a row to say whose it is."""
    settings = settings_of(fitted)
    sections = [c.section(s) for c, s in zip((fitted.first, fitted.second), fitted.children(settings), strict=True)]
    both = sum(encode_message([s]).information_bits for s in sections)
    together = encode_message([joined_section(*sections)])
    assert together.information_bits < both + 600 + 6 * joined_section(*sections).n_parts
    assert sum(s.n_parts for s in sections) == len(together.part_bits[0])


@pytest.mark.parametrize("name", ["table + clusters", "affine + dictionary"])
def test_features_are_numbered_by_first_use_and_the_first_keeps_its_rows(
    name: str, tiny_bench: Bench, tiny_task: Task
) -> None:
    explanation = Sum(*PAIRS[name]).fit(tiny_task.for_fitting())
    metric = tiny_bench.metrics[1]
    settings = replace(settings_of(explanation), root=metric.root)
    coding = Coding.prepare(tiny_bench, explanation, metric, settings, 0.05, (tiny_bench.probe.sample,))
    attempt = coding.attempt(tiny_bench, tiny_bench.held_out)
    first, second = split_section(decode_message(attempt.message.data)[1])
    stated = split_section(coding.section)
    assert [a.symbols.tolist() for a in first.parts] == [a.symbols.tolist() for a in stated[0].parts]
    seen = np.unique(attempt.state.touched().indices, return_index=True)[1]
    assert (np.diff(seen) > 0).all()
    assert second.n_parts == stated[1].n_parts
    outputs = tiny_bench.held_out.sample.outputs
    left = np.square(outputs - attempt.received.prediction).mean()
    assert np.square(outputs - attempt.received.values).mean() < left < outputs.var()


def test_what_is_left_is_outputs_minus_the_table(tiny_task: Task) -> None:
    task = tiny_task.for_fitting()
    table = TokenTable().fit(task)
    left = left_by(table, task.tune_activations)
    sample = task.tune_activations.sample()
    rows = dict(zip(table.ids.tolist(), table.rows, strict=True))
    expected = [table.mean + rows.get(int(t), 0.0) for t in sample.inputs.scored_tokens()]
    spread = sample.outputs.std()
    assert np.allclose(left.sample().outputs, sample.outputs - np.array(expected), atol=1e-3 * spread)
    assert np.array_equal(left.outputs[~left.scored], task.tune_activations.outputs[~left.scored])


def test_the_second_is_fitted_on_what_the_first_leaves(tiny_task: Task) -> None:
    task = tiny_task.for_fitting()
    found = Sum(TokenTable(), PCA(rank=2)).fit(task)
    left = left_by(found.first, task.fit_activations).sample().outputs
    assert np.allclose(found.second.covariance, np.cov(left.T, bias=True), rtol=1e-3, atol=1e-3)
    assert found.name == "token-table + pca-2"
    assert Sum(TokenTable(), PCA(rank=2), name="both").fit(task).name == "both"
    assert set(found.knobs) == {"first.static", "second.value"}


def test_options_nest(tiny_task: Task) -> None:
    made = make_decomposition("sum:first=token-table,second='clusters:k=5,rounds=1',name=two")
    assert isinstance(made, Decomposition)
    found = made.fit(tiny_task.for_fitting())
    assert (found.name, found.second.name) == ("two", "clusters-5")
    missing = make_decomposition("sum:second='sae:path=/nowhere'")
    with pytest.raises(ExplanationError, match="not a sae-lens SAE"):
        missing.check("blocks.1.hook_resid_pre", 16, "model")


def test_a_first_with_a_state_is_refused(tiny_task: Task) -> None:
    with pytest.raises(ExplanationError, match=r"pca-2 needs a state.*Put it second"):
        Sum(PCA(rank=2), TokenTable()).fit(tiny_task.for_fitting())
    clusters = Clusters(k=3, rounds=1).fit(tiny_task.for_fitting())
    section = clusters.section(settings_of(clusters))
    with pytest.raises(MessageError, match="a sum's first explanation is a function of the inputs"):
        SumDecoder.from_section(joined_section(section, section))


def test_what_a_sum_cannot_hold_is_refused() -> None:
    foreign = Section("foreign")
    with pytest.raises(ExplanationError, match="'foreign' is none of them"):
        joined_section(foreign, foreign)
    with pytest.raises(MessageError, match="begins with its layout"):
        split_section(Section("sum"))


@pytest.mark.parametrize(
    ("layout", "fault"),
    [
        ([0, 1, 0, 0, 0, 2, 0, 0], "does not fit"),
        ([0, 0, 0, 1, 0, 1, 1, 0], "does not fit"),
        ([99, 0, 0, 0, 0, 1, 1, 1], "this version knows 0 to"),
        ([-1, 0, 0, 0, 0, 1, 1, 1], "lie in"),
    ],
)
def test_layouts_that_lie_are_refused(layout: list[int], fault: str) -> None:
    counts = QuantisedArray.from_integers(np.array(layout).reshape(1, LAYOUT))
    one = QuantisedArray.from_integers(np.array([[1, 2]]))
    with pytest.raises(MessageError, match=fault):
        split_section(Section("sum", (counts, one), (one,)))


def test_predictions_of_two_widths_do_not_add_up() -> None:
    wide, narrow = (Section("constant", (QuantisedArray.from_values(np.ones(d), 0.1),)) for d in (3, 2))
    decoder = SumDecoder.from_section(joined_section(wide, narrow))
    inputs = Inputs(np.zeros((1, 4), np.int64), np.ones((1, 4), bool))
    with pytest.raises(MessageError, match=r"\(4, 3\) and \(4, 2\)"):
        decoder.predict(inputs, NoState(4))


def test_kinds_keep_their_places() -> None:
    """A message names a kind by its place."""
    assert KINDS[:8] == (
        *("constant", "table", "affine", "token-pairs", "components", "clusters", "dictionary", "random-dictionary"),
    )
