"""Toy models whose parts are known, and what competes with the truth about each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import jax
import numpy as np

from decompositions.weights import parts
from decompositions.weights.factors import Factors
from decompositions.weights.truths import (
    Truth,
    gated_truth,
    modular_truth,
    residual_truth,
    superposition_truth,
)
from estimators.published.matching import Match, joined, matrix_match
from mdl.models.toys.gated import GatedFunctions, gated_functions, gated_inputs
from mdl.models.toys.modular import ModularAddition, modular_inputs, train_modular
from mdl.models.toys.residual import ResidualMLP, residual_inputs, train_residual
from mdl.models.toys.superposition import (
    Superposition,
    random_rotation,
    rotated,
    superposition_inputs,
    train_superposition,
)
from mdl.models.vectors import Vectors

ROWS = 1000  # inputs: 600 to fit on, 150 to tune on, 250 to score
TOLERANCE = 0.001  # of the outputs' variance: saying the mean leaves 721 bits an input
SAME = 0.999  # one-to-one cosine above which a competitor is the truth


@dataclass(frozen=True)
class Case:
    """A trained toy: what is explained, the truth, and its rivals by name. `gates`: as of `Components`."""

    model: Vectors
    truth: Truth
    rivals: Mapping[str, Factors]
    gates: Literal["indices", "static"] = "indices"


def superposition(features: int, hidden: int, seed: int, rotate: bool = False, identity: bool = False) -> Case:
    """TMS; with rotated inputs no input channel is a feature."""
    trained = train_superposition(seed, Superposition(features, hidden, identity))
    rotation = random_rotation(features, seed) if rotate else None
    inputs = superposition_inputs(trained.network, ROWS, seed + 1, rotation=rotation)
    found = trained if rotation is None else rotated(trained, rotation)
    model = Vectors.computed(found.network, found.weights, inputs, "superposition").tolerating(TOLERANCE)
    return _case(model, superposition_truth(found.network, found.weights, rotation), seed)


def control(features: int, hidden: int, seed: int, shuffled: bool) -> Case:
    """The same architecture, the trained weights in another order or untrained; "the truth" is one part a feature."""
    network = Superposition(features, hidden)
    weights = {n: np.asarray(w) for n, w in network.init(jax.random.key(seed)).items()}
    if shuffled:
        weights = {n: np.array(w) for n, w in train_superposition(seed, network).weights.items()}
        flat = np.random.default_rng([seed, 3]).permutation(weights["W"].ravel())
        weights["W"] = flat.reshape(weights["W"].shape)
    inputs = superposition_inputs(network, ROWS, seed + 1)
    model = Vectors.computed(network, weights, inputs, "superposition").tolerating(TOLERANCE)
    return _case(model, superposition_truth(network, weights), seed)


def gated(functions: int, seed: int) -> Case:
    """Hand-coded functions, switched on by control bits."""
    made = gated_functions(seed, GatedFunctions(functions))
    inputs = gated_inputs(made.network, ROWS, seed + 1)
    model = Vectors.computed(made.network, made.weights, inputs, "gated functions").tolerating(TOLERANCE)
    return _case(model, gated_truth(made.network, made.weights), seed)


def residual(neurons: tuple[int, ...], features: int, seed: int) -> Case:
    """y = x + relu(x), spread over layers."""
    trained = train_residual(seed, ResidualMLP(features, 32, neurons))
    inputs = residual_inputs(trained.network, ROWS, seed + 1)
    model = Vectors.computed(trained.network, trained.weights, inputs, "residual MLP").tolerating(TOLERANCE)
    return _case(model, residual_truth(trained.network, trained.weights), seed)


def modular(p: int, seed: int) -> Case:
    """Addition modulo p; the phenomenon is the label's distribution."""
    trained = train_modular(seed, ModularAddition(p))
    inputs = modular_inputs(trained.network)
    model = Vectors.computed(trained.network, trained.weights, inputs, "modular addition", "categorical")
    # Every input needs every frequency: there is nothing to list.
    return replace(_case(model, modular_truth(trained.network, trained.weights), seed), gates="static")


CONTROLS: Mapping[str, Callable[[int], Case]] = {
    "superposition 40-10, shuffled weights": lambda seed: control(40, 10, seed, shuffled=True),
    "superposition 40-10, untrained": lambda seed: control(40, 10, seed, shuffled=False),
}
CASES: Mapping[str, Callable[[int], Case]] = {
    "superposition 5-2": lambda seed: superposition(5, 2, seed),
    "superposition 5-2, identity": lambda seed: superposition(5, 2, seed, identity=True),
    "superposition 5-2, rotated": lambda seed: superposition(5, 2, seed, rotate=True),
    "superposition 40-10": lambda seed: superposition(40, 10, seed),
    "superposition 40-10, identity": lambda seed: superposition(40, 10, seed, identity=True),
    "superposition 40-10, rotated": lambda seed: superposition(40, 10, seed, rotate=True),
    "gated functions 4": lambda seed: gated(4, seed),
    "gated functions 10": lambda seed: gated(10, seed),
    "residual MLP, 1 layer": lambda seed: residual((20,), 20, seed),
    "residual MLP, 2 layers": lambda seed: residual((10, 10), 20, seed),
    "residual MLP, 3 layers": lambda seed: residual((7, 7, 7), 21, seed),
    "modular addition 31": lambda seed: modular(31, seed),
}


def _case(model: Vectors, truth: Truth, seed: int) -> Case:
    """All rivals but those that are the truth itself."""
    network, weights, factors = model.network, model.weights, truth.factors
    assert network is not None
    assert weights is not None
    found = {
        "singular directions": parts.singular(network, weights),
        "input columns": parts.input_columns(network, weights),
        "neurons": parts.neurons(network, weights),
        "random parts": parts.random_parts(network, weights, seed),
    }
    first, second = np.random.default_rng([seed, 7]).choice(_gated(truth), 2, replace=False)
    found["two merged"] = parts.merged(factors, int(first), int(second))
    found["one split"] = parts.split(factors, int(first), seed)
    return Case(model, truth, {name: f for name, f in found.items() if not same_parts(f, factors)})


def _gated(truth: Truth) -> np.ndarray:
    """Components that are not always on; all, where all are."""
    some = np.flatnonzero(~truth.always)
    return some if len(some) > 1 else np.arange(len(truth.always))


def whole_components(factors: Factors) -> np.ndarray:
    """Each component's matrices laid end to end, [C, numbers]."""
    return joined([t.matrices(factors.n_components) for t in factors.tensors.values()])


def match(factors: Factors, truth: Factors) -> Match:
    """One to one, over all matrices at once."""
    return matrix_match(whole_components(factors), whole_components(truth))


def same_parts(factors: Factors, truth: Factors) -> bool:
    """Whether a rival is the truth by another name."""
    return factors.n_components == truth.n_components and match(factors, truth).cosines.min() > SAME
