"""Order, seeds, idle parts and scales: freedom of description that looks free."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import scipy.sparse
from cheating.senders import Fitted, clusters

from decompositions.dictionary import fit_dictionary
from decompositions.random_dictionary import RandomDictionary
from mdl.message import encode_message
from mdl.protocols import Settings


@pytest.mark.cheat(
    3,
    "the order of features carries log2 n! bits",
    "parts are numbered by first use: every order is sent as one",
    "charged",
)
def test_order(judge, honest, outcome):
    order = np.random.default_rng(5).permutation(8)  # the payload

    def permuted(section, settings):
        return section.reordered(order)

    cheat = judge(clusters("permuted", change_section=permuted))["permuted"]
    outcome.charged(honest["ours"].total(1e4), cheat.total(1e4))
    assert cheat.static.bits == honest["ours"].static.bits
    assert cheat.sequence_bits == honest["ours"].sequence_bits


@pytest.mark.cheat(4, "a seed picked out of 2^48", "the seed is an integer of the message", "charged")
def test_seed(tiny_task, outcome):
    explanation = RandomDictionary(features=32, k=2).fit(tiny_task.for_fitting())
    settings = Settings(1e4, 1.0, np.eye(tiny_task.width), {"static": 1.0, "value": 1.0})
    plain, lucky = (
        encode_message([dataclasses.replace(explanation, seed=seed).section(settings)]).whole_bits
        for seed in (0, 2**48 - 59)
    )
    outcome.charged(plain + 48, lucky, margin=0.001)


@pytest.mark.cheat(
    5, "dead features flatter the means", "every declared part is charged, once it may be used", "charged"
)
def test_dead_features(judge, honest, outcome):
    payload = np.random.default_rng(6).integers(-500, 500, (64, 16))

    def padded(section, settings):
        (own,) = section.parts
        symbols = np.concatenate([own.symbols, payload])
        exponents = np.concatenate([own.exponents, np.full(64, own.exponents[0])])
        return dataclasses.replace(section, parts=(dataclasses.replace(own, symbols=symbols, exponents=exponents),))

    cheat = judge(clusters("dead", change_section=padded))["dead"]
    fair = honest["ours"]
    outcome.charged(fair.total(1e4), cheat.total(1e4), margin=0.01)
    assert all(cheat.total(n) >= 0.98 * fair.total(n) for n in (1, 10, 1e3, 1e6, 1e9))
    assert cheat.static.whole_bits > fair.static.whole_bits + 64 * 16 * 9


@pytest.mark.cheat(
    27,
    "scales moved from rows to values, to fit the grid",
    "steps follow the error they cause, whatever the scale",
    "charged",
)
def test_gauge(judge, outcome):
    def made(name, scales):
        def fit(task):
            outputs = task.fit.outputs
            atoms = np.linalg.svd(outputs - outputs.mean(0), full_matrices=False)[2][:6]
            bias = outputs.mean(0)

            def activations(values):
                found = (values - bias) @ atoms.T
                return scipy.sparse.csr_array(np.where(np.abs(found) > 1.0, found, 0.0) / scales)

            return fit_dictionary(name, atoms * scales[:, None], bias, activations, outputs, signed=True)

        return Fitted(fit)

    scales = np.exp2(np.array([0.0, 1.3, -2.7, 0.6, 3.1, -1.9]))
    scores = judge(made("plain", np.ones(6)), made("rescaled", scales))
    outcome.charged(scores["plain"].total(1e4), scores["rescaled"].total(1e4), margin=0.02)
    assert scores["rescaled"].total(1e4) <= 1.02 * scores["plain"].total(1e4)
