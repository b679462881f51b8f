"""Explanations with one decoder, sent as one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse

from decompositions.dictionary import DictionaryDecoder, fit_dictionary, quantise
from decompositions.shared import VIEW, shared_bits, shared_decoders, shared_sections
from mdl.errors import ExplanationError, MessageError
from mdl.message import decode_message, encode_message
from mdl.protocols import Inputs, Settings

FEATURES, WIDTH, TOKENS = 90, 24, 600


def top(atoms: np.ndarray, k: int) -> Callable[[np.ndarray], scipy.sparse.csr_array]:
    def encode(outputs: np.ndarray) -> scipy.sparse.csr_array:
        overlap = outputs @ atoms.T
        least = np.sort(overlap, 1)[:, -k][:, None]
        return scipy.sparse.csr_array(np.where((overlap >= least) & (overlap > 0), overlap, 0.0))

    return encode


@pytest.fixture(scope="module")
def pair() -> tuple:
    rng = np.random.default_rng(0)
    atoms = rng.normal(size=(FEATURES, WIDTH)).astype(np.float32)
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    outputs = rng.normal(size=(TOKENS, WIDTH)).astype(np.float32)
    bias = outputs.mean(0)
    return tuple(fit_dictionary(f"top-{k}", atoms, bias, top(atoms, k), outputs) for k in (2, 6)), outputs


SETTINGS = Settings(1e5, 0.2, np.eye(WIDTH))


def test_together_they_cost_little_more_than_one(pair: tuple) -> None:
    explanations, _ = pair
    bits = shared_bits(explanations, SETTINGS)
    assert max(bits.alone) < bits.together < 0.75 * sum(bits.alone)
    assert bits.saved == sum(bits.alone) - bits.together
    one = shared_bits(explanations[:1], SETTINGS)
    assert one.saved == pytest.approx(0, abs=1e-9)


def test_the_receiver_rebuilds_both_as_precisely(pair: tuple) -> None:
    explanations, outputs = pair
    inputs = Inputs(np.zeros((1, TOKENS), np.int64), np.ones((1, TOKENS), bool))
    sections = shared_sections(explanations, SETTINGS)
    decoders = shared_decoders(decode_message(encode_message(sections).data))
    for explanation, decoder in zip(explanations, decoders, strict=True):
        alone = DictionaryDecoder.from_section(explanation.section(SETTINGS))
        values = explanation.activations(outputs)
        errors = []
        for d in (decoder, alone):
            state = quantise(d, values, outputs)
            errors.append(np.square(d.predict(inputs, state) - values @ explanation.atoms - explanation.bias).mean())
        assert np.array_equal(decoder.value_steps, alone.value_steps)
        assert errors[0] <= 1.1 * errors[1]


def test_other_atoms_and_other_sections_are_refused(pair: tuple) -> None:
    (first, second), _ = pair
    with pytest.raises(ExplanationError, match="different atoms"):
        shared_sections((first, replace(second, atoms=second.atoms + 1)), SETTINGS)
    with pytest.raises(ExplanationError, match="no explanation"):
        shared_sections((), SETTINGS)
    sections = shared_sections((first, second), SETTINGS)
    assert sections[1].kind == VIEW
    with pytest.raises(MessageError, match="kinds"):
        shared_decoders(sections[::-1])
    with pytest.raises(MessageError, match="2 header"):
        shared_decoders([sections[0], replace(sections[1], parts=())])
