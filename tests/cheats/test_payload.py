"""Payloads: information that rides on a message, a state or a source, and is not counted."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from cheating.senders import clusters

from mdl.alphabets import DenseAlphabet
from mdl.errors import ExplanationError, MessageError
from mdl.message import CHECKSUM_BYTES, QuantisedArray, Section, encode_message, sealed
from mdl.protocols import Settings
from mdl.receiver import Receiver, decoder_of, predicted
from mdl.state import DenseState, IndexState, JoinedState


def with_mantissas(state, decoder, sample):
    """The index, and in the mantissa behind it a coordinate of the true output."""
    return IndexState(state.indices + np.abs(np.tanh(sample.outputs[:, 0])) / 2, state.n_parts)


@pytest.mark.cheat(
    1, "payload in the mantissas of floats", "symbols are integers, in a message and in a state", "refused"
)
def test_mantissas(judge, outcome):
    with pytest.raises(ExplanationError) as caught:
        judge(clusters("mantissas", change_state=with_mantissas))
    outcome.refused(caught.value, "state symbols are integers")
    floats = QuantisedArray(np.array([[0.1234567]]), np.zeros(1, np.int64))
    with pytest.raises(MessageError, match="no floats whose mantissas would be a payload"):
        encode_message([Section("constant", (floats,))])


def dense(state, decoder, sample):
    return DenseState(state.indices[:, None], parts=False)


def with_truth(state, decoder, sample):
    """The honest symbols, and on them an attribute that no stream carries."""
    state = dense(state, decoder, sample)
    object.__setattr__(state, "truth", (np.rint(4 * sample.outputs) / 4).astype(np.float32))
    return state


@pytest.mark.cheat(
    2,
    "attributes, buffers and constants beside the message",
    "the decoder gets a copy of what the code carries",
    "charged",
)
def test_attributes(judge, outcome, no_conduct, monkeypatch):
    hiding = clusters("attribute", kind="cheat-hidden", change_state=with_truth)
    scores = judge(clusters("none", kind="cheat-hidden", change_state=dense), hiding)
    outcome.charged(scores["none"].total(1e4), scores["attribute"].total(1e4), margin=0.001)
    monkeypatch.setattr(DenseAlphabet, "accept", lambda self, state, n_tokens: state)
    undefended = judge(hiding)["attribute"]
    assert undefended.beside["explained_variance"] > 0.99 > scores["attribute"].beside["explained_variance"]
    assert undefended.rate < 0.5 * scores["none"].rate


def test_a_decoder_cannot_erase_what_it_has_read_before_it_is_priced(tiny_task, judge, honest):
    cheat = judge(clusters("erasing", kind="cheat-erasing"))["erasing"]
    assert cheat.column("state") == pytest.approx(honest["theirs"].column("state"))
    _, section = message_of(tiny_task)
    decoder = decoder_of(dataclasses.replace(section, kind="cheat-erasing"))
    sample, told = tiny_task.fit, np.random.default_rng(0).integers(0, 8, tiny_task.fit.inputs.n_tokens)
    state = IndexState(told, 8)
    before = state.bits()
    predicted(decoder, sample.inputs, state)
    assert state.bits() == before
    decoder.predict(sample.inputs, state)  # as it would be without copies
    assert state.bits() < 0.02 * before


@pytest.mark.cheat(
    7,
    "an error node passes what the explanation misses",
    "a state of the decoder's own alphabet, and nothing beside it",
    "refused",
)
def test_error_node(judge, outcome):
    def with_error(state, decoder, sample):
        error = np.rint(64 * (sample.outputs - decoder.centroids[state.indices])).astype(np.int64)
        return JoinedState((state, DenseState(error)))

    with pytest.raises(ExplanationError) as caught:
        judge(clusters("error node", change_state=with_error))
    outcome.refused(caught.value, "no error term beside it")


@pytest.mark.cheat(
    11, "data in a decoder's source", "a third party's source travels in the message, compressed", "charged"
)
def test_source(judge, honest, outcome):
    fair, cheat = honest["theirs"], judge(clusters("payload", kind="cheat-payload"))["payload"]
    payload_bits = 1200 * 6  # 1,200 characters of 64
    outcome.charged(fair.static.whole_bits + payload_bits, cheat.static.whole_bits, margin=0.02)
    assert fair.static.whole_bits > honest["ours"].static.whole_bits + 1000
    assert fair.static.at(1.0) > honest["ours"].static.at(1.0) + 1000


def message_of(task, section_changes=lambda section: section):
    decoded = clusters("plain").fit(task.for_fitting())
    section = section_changes(decoded.section(Settings(1e4, 1.0, np.eye(task.width))))
    special = Section("special", (QuantisedArray.from_integers(np.zeros((1, task.width), np.int64)),))
    return [special, section]


@pytest.mark.cheat(
    16,
    "names, padding, further sections and trailing bytes",
    "a message is its named sections to the last bit",
    "refused",
)
def test_metadata(tiny_task, outcome):
    sections = message_of(tiny_task)
    data = encode_message(sections).data
    Receiver.of(data)
    with pytest.raises(MessageError) as caught:
        Receiver.of(sealed(data[:-CHECKSUM_BYTES] + b"a payload"))
    with pytest.raises(MessageError, match="checksum"):
        Receiver.of(data + b"a payload")
    outcome.refused(caught.value, "damaged", "bytes")
    with pytest.raises(MessageError, match="nothing else"):
        Receiver.of(encode_message([*sections, Section("special", sections[0].header)]).data)
    with pytest.raises(MessageError, match="up to 64 ASCII characters"):
        encode_message([dataclasses.replace(sections[0], kind="special" + 60 * "x")])
    with pytest.raises(MessageError, match="and no parts"):
        Receiver.of(encode_message([dataclasses.replace(sections[0], parts=sections[1].parts), sections[1]]).data)


@pytest.mark.cheat(
    26,
    "labels in natural language smuggle data",
    "a message has no labels, and a decoder takes its own arrays alone",
    "refused",
)
def test_labels(judge, outcome):
    text = np.frombuffer(b"feature 3: fires on the third token, whose output is ...", np.uint8).astype(np.int64)

    def labelled(section, settings):
        return dataclasses.replace(section, header=(QuantisedArray.from_integers(text),))

    with pytest.raises(ExplanationError) as caught:
        judge(clusters("labels", change_section=labelled))
    outcome.refused(caught.value, "no header array")
