"""Clocks: an algorithm for modular addition, and weights that are waves over the tokens."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from decompositions.fourier import Aligned, Fourier, FourierDecoder, clocks, sums
from decompositions.weights.fourier import FourierWeights, FourierWeightsDecoder, wave_power, waves
from experiments.small_circuits.examples import additions
from experiments.small_circuits.models import initial_weights
from mdl.data import Dataset
from mdl.errors import ExplanationError, MessageError
from mdl.message import QuantisedArray, Section, decode_message, encode_message
from mdl.models import Model, TransformerConfig
from mdl.models.model import fingerprint_of
from mdl.protocols import Inputs, Sample, Settings
from mdl.state import NoState
from mdl.task import Task, build_task

P = 7
CONFIG = TransformerConfig(
    n_layers=1,
    d_model=8,
    n_heads=2,
    d_head=4,
    d_vocab=P + 1,
    n_ctx=3,
    d_mlp=12,
    norm="none",
    activation="relu",
    d_vocab_out=P,
)


def settings(horizon: float, step: float = 0.1) -> Settings:
    return Settings(horizon, step, np.eye(P), corrected=False)


def inputs() -> Inputs:
    tokens = additions(P).tokens
    return Inputs(tokens, np.ones(tokens.shape, bool))


def ticking(frequencies: list[int], amplitudes: list[float]) -> Sample:
    """Logits that are clocks, in slow plain Python, with a shift for each position that no probability notices."""
    given = inputs()
    outputs = np.zeros((*given.tokens.shape, P))
    for n, (x, y, _) in enumerate(given.tokens.tolist()):
        for c in range(P):
            turns = [a * np.cos(2 * np.pi * k * (x + y - c) / P) for k, a in zip(frequencies, amplitudes, strict=True)]
            outputs[n, 2, c] = sum(turns) + 0.1 * n
    return Sample(given, outputs[given.scored].astype(np.float32))


def last(sample: Sample) -> np.ndarray:
    return np.tile([False, False, True], len(sample.inputs.tokens))


def test_sums_are_of_the_two_tokens_before():
    total, there = sums(inputs(), P)
    np.testing.assert_array_equal(there, np.tile([False, False, True], P * P))
    np.testing.assert_array_equal(total[there], additions(P).answers[:, 2])


def test_amplitudes_are_recovered():
    sample = ticking([1, 3], [2.0, -0.7])
    found = Aligned.of(sample, last(sample))
    assert found.share == pytest.approx(1 / 3)
    np.testing.assert_array_equal(found.by_power()[:2], [1, 3])
    np.testing.assert_allclose(found.fitted(np.array([1, 3])), [2.0, -0.7], atol=1e-4)
    assert found.kl(np.array([1, 3]), np.array([2.0, -0.7])) == pytest.approx(0.0, abs=1e-6)
    alone = found.fitted(np.array([1]))
    grid = np.linspace(0.5, 3.5, 3001)
    best = grid[np.argmin([found.kl(np.array([1]), np.array([a])) for a in grid])]
    assert alone[0] == pytest.approx(best, abs=2e-3)  # the minimum, by trying all
    assert set(found.by_kl(2).tolist()) == {1, 3}


def explained(sample: Sample, chosen: Settings, **options: int) -> FourierDecoder:
    explanation = _explanation(sample, **options)
    section = explanation.section(chosen)
    (again,) = decode_message(encode_message([section]).data)
    return FourierDecoder.from_section(again)


def _explanation(sample: Sample, frequencies: int = 0):
    from decompositions.fourier import FourierExplanation

    counts = (frequencies,) if frequencies else (1, 2, 3)
    aligned = Aligned.of(sample, last(sample))
    return FourierExplanation("clock", aligned, aligned.by_power(), counts)


def test_a_clock_comes_out_of_its_message():
    sample = ticking([1, 3], [2.0, -0.7])
    decoder = explained(sample, settings(1e9))
    np.testing.assert_array_equal(decoder.frequencies[:2], [1, 3][: len(decoder.frequencies)])
    state = NoState(sample.inputs.n_tokens)
    found, wanted = decoder.predict(sample.inputs, state), sample.outputs
    assert found.shape == (3 * P * P, P)
    assert found.dtype == np.float32
    assert not found[~last(sample)].any()
    centred = wanted - wanted.mean(1, keepdims=True)
    np.testing.assert_allclose((found - found.mean(1, keepdims=True))[last(sample)], centred[last(sample)], atol=5e-3)
    assert decoder.touched(sample.inputs, state) is None
    assert decoder.flops_per_token(sample.inputs, state) == 2 * len(decoder.frequencies) * P


def test_frequencies_are_sent_as_far_as_they_pay():
    """A clock of amplitude .05 is worth .05^2 / 4 nats of KL a position or so: nothing to 100 tokens, much to 10^8."""
    sample = ticking([1, 2], [2.0, 0.05])
    np.testing.assert_array_equal(explained(sample, settings(100.0)).frequencies, [1])
    np.testing.assert_array_equal(explained(sample, settings(1e8)).frequencies, [1, 2])
    assert len(explained(sample, settings(100.0), frequencies=3).frequencies) == 3


def test_sections_that_are_no_clocks_are_refused():
    def section(modulus: int, increments: list[int], amplitudes: int) -> Section:
        arrays = (np.array([[modulus]]), np.array([increments]), np.ones((1, amplitudes)))
        return Section("fourier", tuple(QuantisedArray.from_integers(a) for a in arrays))

    assert FourierDecoder.from_section(section(7, [1, 2], 2)).frequencies.tolist() == [1, 3]
    for bad, said in (
        (section(7, [1, 3], 2), "a frequency of 4 turns; modulo 7 there are 1 to 3"),
        (section(7, [1, 0], 2), "frequencies of a 'fourier' section has values"),
        (section(1, [1], 1), "modulus of a 'fourier' section has values"),
        (section(7, [1, 2], 1), "1 amplitudes for 2 frequencies"),
        (Section("fourier", section(7, [1], 1).header[:2]), "has no parts"),
    ):
        with pytest.raises(MessageError, match=said):
            FourierDecoder.from_section(bad)


@pytest.fixture(scope="module")
def task() -> Task:
    """All sums modulo 7, of an untrained model whose embedding and unembedding are waves of frequencies 1 and 3."""
    params = initial_weights(CONFIG, 0)
    basis = waves(P, np.array([1, 3]))
    project = jnp.asarray(basis @ basis.T, jnp.float32)
    table = params["embed"]["W_E"]
    params["embed"]["W_E"] = jnp.concatenate([project @ table[:P], table[P:]])
    params["unembed"]["W_U"] = params["unembed"]["W_U"] @ project
    model = Model(CONFIG, params, "sums", fingerprint_of(CONFIG, params))
    rows = np.random.default_rng(0).permutation(P * P)
    every = additions(P)
    parts, masks = (
        [np.ascontiguousarray(a[i]) for i in np.split(rows, [29, 39])] for a in (every.tokens, every.measured)
    )
    groups = tuple(np.arange(len(part)) for part in parts)
    data = Dataset(*parts, groups, (), {"data": "sums"}, tuple(masks))
    return build_task(model, "model", data, lambda *_: None)


def test_waves_are_orthonormal_and_power_is_found():
    for p in (7, 12):
        basis = waves(p, np.arange(1, (p + 1) // 2))
        np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-12)
    pure = np.outer(clocks(11, np.array([4]))[0], [1.0, 2.0]) + 3.0
    assert wave_power(pure)[3] == pytest.approx(1.0)
    noise = np.random.default_rng(0).normal(size=(12, 5))
    assert wave_power(noise).sum() == pytest.approx(1.0)


def test_weights_that_are_waves_come_out_of_their_message(task):
    explanation = FourierWeights(frequencies=2).fit(task.for_fitting())
    np.testing.assert_array_equal(explanation.frequencies, [1, 3])
    fine = settings(1e6, 1e-2)
    (section,) = decode_message(encode_message([explanation.section(fine)]).data)
    decoder = FourierWeightsDecoder.from_section(section)
    sample = task.fit
    found = decoder.predict(sample.inputs, NoState(sample.inputs.n_tokens))
    assert found.shape == sample.outputs.shape
    asked = task.fit_activations.asked[task.fit_activations.scored]
    spread = np.std(sample.outputs[asked])
    assert np.abs(found - sample.outputs)[asked].max() < 0.02 * spread
    own = explanation.curvature.weights
    decoded = decoder.weights(explanation.curvature.network)
    assert set(decoded) == set(own)
    assert all(decoded[name].shape == own[name].shape for name in own)


def test_one_frequency_is_shorter_and_worse(task):
    sample, chosen = task.fit, settings(1e6, 1e-2)
    sizes, errors = [], []
    for count in (1, 2):
        section = FourierWeights(frequencies=count).fit(task.for_fitting()).section(chosen)
        found = FourierWeightsDecoder.from_section(section).predict(sample.inputs, NoState(sample.inputs.n_tokens))
        sizes.append(encode_message([section]).whole_bits)
        errors.append(float(np.square(found - sample.outputs).mean()))
    assert sizes[0] < sizes[1]
    assert errors[0] > 10 * errors[1]


def test_waves_that_do_not_fit_are_refused(task):
    section = FourierWeights(frequencies=2).fit(task.for_fitting()).section(settings(1e4))
    network = task.fit.inputs.network
    short = replace(section, header=section.header[:-1])
    with pytest.raises(MessageError, match="arrays for"):
        FourierWeightsDecoder.from_section(short).weights(network)
    wrong = list(section.header)
    wrong[2] = wrong[2].rows(np.arange(4))
    with pytest.raises(MessageError, match=r"waves \(4, 8\)"):
        FourierWeightsDecoder.from_section(replace(section, header=tuple(wrong)))
    more = list(section.header)
    more[3] = QuantisedArray.from_integers(np.ones((2, 8)))
    with pytest.raises(MessageError, match=r"9 tokens or logits for embed\.W_E, \(8, 8\) here"):
        FourierWeightsDecoder.from_section(replace(section, header=tuple(more))).weights(network)


@pytest.mark.parametrize(
    ("decomposition", "said"),
    [
        (Fourier(frequencies=4), "4 frequencies; modulo 7 it has 3"),
        (FourierWeights(frequencies=0), "0 frequencies over 7 logits"),
        (FourierWeights(frequencies=4), "from 1 to 3 frequencies"),
    ],
)
def test_options_that_there_are_not(task, decomposition, said):
    with pytest.raises(ExplanationError, match=said):
        decomposition.fit(task.for_fitting())


def test_a_region_without_logits_is_refused(tiny_task):
    with pytest.raises(ExplanationError, match="does not go from tokens to logits"):
        Fourier().fit(tiny_task.for_fitting())
    with pytest.raises(ExplanationError, match="has not both"):
        FourierWeights().fit(tiny_task.for_fitting())
