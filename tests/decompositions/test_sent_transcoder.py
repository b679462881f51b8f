"""Transcoders that the receiver runs: what is sent, what a receiver makes of it, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import sae_lens
import torch

from decompositions.sae import SAE
from decompositions.sae_origin import TRANSCODERS
from decompositions.sae_reading import candidates
from decompositions.sent_transcoder import Encoder, SentTranscoderExplanation, TranscoderDecoder
from estimators.conduct import check_decoder
from mdl.data import Dataset
from mdl.errors import ExplanationError, MessageError
from mdl.message import QuantisedArray, Section, decode_message, encode_message
from mdl.models.model import Model
from mdl.plugins import make_decomposition
from mdl.protocols import Explanation, Inputs, Settings
from mdl.receiver import decoder_of
from mdl.score import default_explanations, embedded_model, embedded_transcoders, score
from mdl.state import NoState
from mdl.task import Task, build_task
from tests.conftest import no_progress
from tests.decompositions.sae_cases import D_IN, D_SAE, forward, make, through_message

OUT, NORMALIZED, BEHIND = "blocks.1.hook_mlp_out", "blocks.1.ln2.hook_normalized", "blocks.1.mlp.hook_in"


@pytest.fixture(scope="module")
def mlp_task(tiny_model: Model, tiny_data: Dataset) -> Task:
    return build_task(tiny_model, "blocks.1.mlp", tiny_data, no_progress).for_fitting()


def transcoder(architecture: str, read: str = NORMALIZED, **options: Any) -> Any:
    metadata = {"hook_name": read, "hook_name_out": OUT}
    return make(architecture, metadata=metadata, d_out=D_IN, apply_b_dec_to_input=False, **options)


def fitted(task: Task, architecture: str = "jumprelu_skip_transcoder", **options: Any) -> SentTranscoderExplanation:
    explanation = SAE(object=transcoder(architecture, **options), encoder="sent").fit(task)
    assert isinstance(explanation, SentTranscoderExplanation)
    return explanation


def settings(step: float, **knobs: float) -> Settings:
    return Settings(1e3, step, np.eye(D_IN), knobs)


def assert_alike(predicted: np.ndarray, expected: np.ndarray) -> None:
    """Up to a thousandth of the spread, but for the odd token with a feature at its very threshold."""
    off = np.abs(predicted - expected).max(1) > 1e-3 * expected.std()
    assert off.sum() <= len(expected) // 500


@pytest.mark.parametrize("architecture", TRANSCODERS)
@pytest.mark.parametrize("normalisation", ["none", "layer_norm", "constant_norm_rescale"])
def test_at_fine_steps_the_receiver_predicts_what_sae_lens_does(
    architecture: str, normalisation: str, mlp_task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("decompositions.sae.candidates", lambda *given: candidates(*given)[:1])  # the plain meaning
    sae = transcoder(architecture, normalize_activations=normalisation)
    explanation = SAE(object=sae, encoder="sent").fit(mlp_task)
    assert isinstance(explanation, Explanation)
    predicted, state = through_message(explanation, mlp_task, 1e-6)
    assert state == NoState(mlp_task.fit.inputs.n_tokens)
    expected = forward(sae, mlp_task.fit.inputs.scored_values())
    assert_alike(predicted, expected)


def test_what_lies_between_the_input_and_the_encoder_is_folded_in(
    mlp_task: Task, tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    norm, x = tiny_model.params["blocks"][1]["ln2"], mlp_task.fit.inputs.scored_values()
    behind = np.asarray(x * np.asarray(norm["w"]) + np.asarray(norm["b"]), np.float32)
    sae = transcoder("skip_transcoder", BEHIND)
    solved = np.linalg.lstsq(np.c_[behind, np.ones(len(x))], mlp_task.fit.outputs, rcond=1e-4)[0]
    with torch.no_grad():  # of what the name may mean, that under which it predicts best is taken
        sae.W_skip.copy_(torch.from_numpy(solved[:-1].T.copy()))
        sae.b_dec.copy_(torch.from_numpy(solved[-1].copy()))
        sae.W_dec.mul_(0.1)
    explanation = SAE(object=sae, encoder="sent").fit(mlp_task)
    predicted, _ = through_message(explanation, mlp_task, 1e-6)
    expected = forward(sae, behind)
    assert_alike(predicted, expected)
    normalised = transcoder("transcoder", BEHIND, normalize_activations="layer_norm")
    monkeypatch.setattr("decompositions.sae.candidates", lambda *given: candidates(*given)[:1])
    with pytest.raises(ExplanationError, match=r"layer_norm.* behind the scale and bias .*Take encoder=own"):
        SAE(object=normalised, encoder="sent").fit(mlp_task)


def test_a_token_touches_the_atoms_of_features_that_are_on(mlp_task: Task) -> None:
    sae = transcoder("jumprelu_transcoder")
    explanation = SAE(object=sae, encoder="sent").fit(mlp_task)
    inputs, state = mlp_task.fit.inputs, NoState(mlp_task.fit.inputs.n_tokens)
    decoder = decoder_of(explanation.section(settings(1e-5)))
    with torch.no_grad():
        on = sae.encode(torch.from_numpy(inputs.scored_values())).numpy() != 0
    touched = decoder.touched(inputs, state).toarray()
    assert touched.shape == (inputs.n_tokens, D_SAE)
    assert (touched != on).mean() < 1e-4
    active = on.sum(1).mean()
    assert decoder.flops_per_token(inputs, state) == pytest.approx(2 * (D_SAE * (D_IN + 1) + active * D_IN), rel=1e-3)


def test_features_that_are_never_on_are_not_sent(mlp_task: Task) -> None:
    sae = transcoder("jumprelu_transcoder")
    with torch.no_grad():
        sae.threshold[:20] = 1e3
    section = SAE(object=sae, encoder="sent").fit(mlp_task).section(settings(1e-3))
    assert section.n_parts == D_SAE - 20
    assert [len(a.symbols) for a in section.header] == [1, 1, D_SAE - 20, D_SAE - 20]


@pytest.mark.parametrize("architecture", ["transcoder", "jumprelu_skip_transcoder"])
def test_bytes_give_back_what_was_stated(architecture: str, mlp_task: Task) -> None:
    section = fitted(mlp_task, architecture).section(settings(0.05, static=2.0, encoder=0.5))
    (found,) = decode_message(encode_message([section]).data)
    for sent, received in zip((*section.header, *section.parts), (*found.header, *found.parts), strict=True):
        for ours, theirs in zip(sent.integer_arrays(), received.integer_arrays(), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert len(section.header[3].symbols) == (D_SAE if architecture.startswith("jumprelu") else 1)


def test_one_threshold_for_all_is_sent_once(mlp_task: Task) -> None:
    sae = transcoder("jumprelu_transcoder")
    with torch.no_grad():
        sae.threshold.copy_(0.3 / sae.W_dec.norm(dim=1))  # one, where rows are of length 1
    explanation = SAE(object=sae, encoder="sent").fit(mlp_task)
    assert explanation.section(settings(0.01)).header[3].symbols.shape == (1, 1)
    predicted, _ = through_message(explanation, mlp_task, 1e-6)
    expected = forward(sae, mlp_task.fit.inputs.scored_values())
    assert_alike(predicted, expected)


def test_the_knobs_trade_bits_for_precision(mlp_task: Task) -> None:
    explanation, sample = fitted(mlp_task), mlp_task.fit
    errors, bits = {}, {}
    for knobs in ((1.0, 1.0), (8.0, 1.0), (1.0, 8.0)):
        section = explanation.section(settings(0.3, static=knobs[0], encoder=knobs[1]))
        predicted = decoder_of(section).predict(sample.inputs, NoState(sample.inputs.n_tokens))
        exact = decoder_of(explanation.section(settings(1e-5))).predict(sample.inputs, NoState(sample.inputs.n_tokens))
        errors[knobs] = np.square(predicted - exact).mean()
        bits[knobs] = encode_message([section]).whole_bits
    assert errors[1.0, 1.0] < min(errors[8.0, 1.0], errors[1.0, 8.0])
    assert bits[1.0, 1.0] > max(bits[8.0, 1.0], bits[1.0, 8.0])


def test_units_of_the_features_do_not_matter(mlp_task: Task) -> None:
    """Encoder rows and thresholds times a power of two, atoms over it: the same explanation."""
    sae = transcoder("jumprelu_transcoder")
    explanation = SAE(object=sae, encoder="sent").fit(mlp_task)
    factor = torch.from_numpy(np.exp2(np.random.default_rng(3).integers(-6, 7, D_SAE)).astype(np.float32))
    with torch.no_grad():
        sae.W_enc.mul_(factor)
        sae.b_enc.mul_(factor)
        sae.threshold.mul_(factor)
        sae.W_dec.div_(factor[:, None])
    other = SAE(object=sae, encoder="sent").fit(mlp_task)
    bits = [encode_message([e.section(settings(0.1))]).whole_bits for e in (explanation, other)]
    assert bits[1] == pytest.approx(bits[0], rel=0.01)
    found = [through_message(e, mlp_task, 0.1)[0] for e in (explanation, other)]
    np.testing.assert_allclose(found[1], found[0], atol=1e-4 * found[0].std())


@pytest.mark.parametrize("architecture", ["transcoder", "jumprelu_skip_transcoder"])
def test_its_decoder_is_a_function_of_the_past(architecture: str, mlp_task: Task) -> None:
    section = fitted(mlp_task, architecture).section(settings(0.05))
    inputs = mlp_task.fit.inputs
    check_decoder("transcoder", section, inputs, NoState(inputs.n_tokens))


def test_what_is_remembered_is_of_the_same_inputs(mlp_task: Task) -> None:
    decoder, inputs = decoder_of(fitted(mlp_task).section(settings(0.05))), mlp_task.fit.inputs
    first = decoder.predict(inputs, NoState(inputs.n_tokens))
    other = replace(inputs, values=-inputs.values)
    assert not np.allclose(decoder.predict(other, NoState(other.n_tokens)), first)
    np.testing.assert_array_equal(decoder.predict(inputs, NoState(inputs.n_tokens)), first)


def test_many_tokens_are_taken_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    encoder, x = Encoder(rng.normal(size=(7, 5)), rng.random(7)), rng.normal(size=(23, 4)).astype(np.float32)
    whole = encoder.activations(x).toarray()
    before = x.astype(np.float64) @ encoder.rows[:, :-1].T + encoder.rows[:, -1]
    np.testing.assert_allclose(whole, np.where(before > encoder.thresholds, np.maximum(before, 0), 0), atol=1e-12)
    monkeypatch.setattr("decompositions.sent_transcoder.CHUNK_ELEMENTS", 40)
    np.testing.assert_allclose(encoder.activations(x).toarray(), whole, atol=1e-12)
    assert encoder.activations(x[:0]).shape == (0, 7)


def test_what_the_receiver_cannot_run_is_refused(mlp_task: Task) -> None:
    plain = make("standard", metadata={"hook_name": OUT})
    with pytest.raises(ExplanationError, match=r"encoder=sent for an SAE \(standard\) whose encoder reads blocks\.1\."):
        SAE(object=plain, encoder="sent").fit(mlp_task)
    with pytest.raises(ExplanationError, match="just what the receiver is to be told"):
        SAE(object=plain, encoder="sent").check(OUT, D_IN, "tiny")
    stream = transcoder("transcoder", "blocks.1.hook_resid_mid")
    with pytest.raises(ExplanationError, match=r"reads blocks\.1\.hook_resid_mid, of which the receiver has no copy"):
        SAE(object=stream, encoder="sent").fit(mlp_task)
    with pytest.raises(ExplanationError, match="belongs to encoder=pursuit"):
        SAE(object=transcoder("transcoder"), encoder="sent", k=3).fit(mlp_task)
    silent = transcoder("jumprelu_transcoder")
    with torch.no_grad():
        silent.threshold.fill_(1e4)
    with pytest.raises(ExplanationError, match="none of 64 features is on"):
        SAE(object=silent, encoder="sent").fit(mlp_task)


def test_a_transcoder_is_spliced_where_it_writes(mlp_task: Task) -> None:
    def writing(site: str, **options: Any) -> SAE:
        metadata = {"hook_name": NORMALIZED, "hook_name_out": site}
        sae = make("transcoder", metadata=metadata, d_out=D_IN, apply_b_dec_to_input=False)
        return SAE(object=sae, encoder="sent", **options)

    with pytest.raises(ExplanationError, match=r"writes to blocks\.0\.hook_mlp_out.*Take the region 'blocks\.0\.mlp'"):
        writing("blocks.0.hook_mlp_out").fit(mlp_task)
    with pytest.raises(ExplanationError, match=r"writes to blocks\.1\.hook_resid_post.*'upstream of blocks\.1\.hook_r"):
        writing("blocks.1.hook_resid_post").check(OUT, D_IN, "tiny")
    with pytest.raises(ExplanationError, match=r"writes to blocks\.1\.mlp\.hook_out.*No region ends there; any_site"):
        writing("blocks.1.mlp.hook_out").fit(mlp_task)
    notes = writing("blocks.1.mlp.hook_out", any_site=True).fit(mlp_task).notes
    assert f"writes to blocks.1.mlp.hook_out, the region's output is {OUT}" in notes


def test_notes_and_name(mlp_task: Task) -> None:
    sae = make("transcoder", metadata={}, d_out=D_IN, apply_b_dec_to_input=False)
    explanation = SAE(object=sae, encoder="sent", name="").fit(mlp_task)
    assert explanation.name == "sae+encoder"
    assert any(n.endswith("the receiver finds out which") for n in explanation.notes)
    assert f"does not say at which site it writes; {OUT} is taken on trust" in explanation.notes
    assert copy.deepcopy(explanation).name == explanation.name
    assert make_decomposition("sae:path=somewhere,encoder=sent").encoder == "sent"


def test_the_embedded_transcoder_ships_and_is_scored_by_default() -> None:
    (folder,) = embedded_transcoders()
    assert sum(f.stat().st_size for f in folder.iterdir()) < 2e6
    sae = sae_lens.SAE.load_from_disk(folder, dtype="float32")
    assert sae.cfg.metadata.hook_name == NORMALIZED
    assert sae.cfg.metadata.hook_name_out == OUT
    names = default_explanations(embedded_model(), "blocks.1.mlp")
    assert names[-2:] == [f'sae:path="{folder}"', f'sae:path="{folder}",encoder=sent']
    assert [make_decomposition(n).encoder for n in names[-2:]] == ["own", "sent"]
    assert not any("transcoders" in n for n in default_explanations(embedded_model(), "blocks.2.mlp"))


def damaged(section: Section, place: int, array: QuantisedArray) -> Section:
    header = [*section.header]
    header[place] = array
    return replace(section, header=tuple(header))


def test_damaged_sections_are_refused(mlp_task: Task) -> None:
    section = fitted(mlp_task).section(settings(0.05))
    wide, one = QuantisedArray.from_values(np.ones((D_IN, 5)), 0.1), QuantisedArray.from_integers(np.array([[3]]))
    cases = [
        (replace(section, header=section.header[:3]), "has 4 or 5 header arrays and 1 part array; this one has 3"),
        (replace(section, parts=()), "5 header and 0 part arrays"),
        (damaged(section, 0, wide), "the bias .* is one vector, not 16 rows"),
        (damaged(section, 0, QuantisedArray.from_values(np.ones(3), 0.1)), "a bias of 3 .* do not fit together"),
        (damaged(section, 1, one), "values from 3 to 3; they lie in"),
        (damaged(section, 1, QuantisedArray.from_integers(np.zeros((2, 1)))), "2 normalisations do not fit"),
        (damaged(section, 2, wide), r"encoder rows \(16, 5\)"),
        (damaged(section, 3, wide), r"thresholds \(16, 5\) for 64 features: one, or one each"),
        (damaged(section, 4, wide), r"a skip path \(16, 5\) from 16 inputs to 16"),
    ]
    for broken, message in cases:
        with pytest.raises(MessageError, match=message):
            TranscoderDecoder.from_section(broken)
    inputs = mlp_task.fit.inputs
    narrow = Inputs(inputs.tokens, inputs.scored, inputs.values[:, :, :5])
    with pytest.raises(MessageError, match="a 'transcoder' of 16 inputs; 5 enter this region"):
        TranscoderDecoder.from_section(section).predict(narrow, NoState(narrow.n_tokens))


def test_an_explanation_too_coarse_to_have_a_feature_is_its_bias(mlp_task: Task) -> None:
    explanation, inputs = fitted(mlp_task, "transcoder"), mlp_task.fit.inputs
    section = explanation.section(settings(1e9))
    assert section.n_parts == 0
    (received,) = decode_message(encode_message([section]).data)
    predicted = decoder_of(received).predict(inputs, NoState(inputs.n_tokens))
    assert predicted.shape == (inputs.n_tokens, D_IN)
    assert (predicted == predicted[0]).all()


@pytest.mark.usefixtures("in_little_time")
def test_a_sent_transcoder_is_scored(tiny_model: Model, tiny_data: Dataset) -> None:
    task = build_task(tiny_model, "blocks.1.mlp", tiny_data, no_progress)
    x = task.fit.inputs.scored_values()
    sae = transcoder("jumprelu_skip_transcoder")
    solved = np.linalg.lstsq(np.c_[x, np.ones(len(x))], task.fit.outputs, rcond=1e-4)[0]
    with torch.no_grad():
        sae.W_skip.copy_(torch.from_numpy(solved[:-1].T.copy()))
        sae.b_dec.copy_(torch.from_numpy(solved[-1].copy()))
        sae.W_dec.mul_(1e-2)
    card, messages = score(task, [SAE(object=sae, encoder="sent")], fidelities=[0.1])
    activations, behaviour = card.scores
    assert activations.explanation == "sae+encoder"
    assert (activations.phenomenon, behaviour.phenomenon) == ("activations", "behaviour")
    assert not any(e.bits for s in card.scores for e in s.entries if e.column == "state")
    assert {"static", "encoder"} <= set(activations.settings)
    assert activations.beside["explained_variance"] > 0.1
    # The encoder is in the header: nearly all of it is paid for by the first token.
    assert activations.static.bits[0] > 0.5 * activations.static.bits[-1]
    assert not any(name.endswith(".state") for name in messages)
