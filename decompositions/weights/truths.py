"""What is known of the toy models' parts: components as `Factors`, and which of them an input needs.

A truth is what the model was made or trained to do, read off the weights without looking at any score:

superposition       component c: the row of W that feature c has, used both ways; with rotated inputs, its direction in
                    them and its output. They sum to the weights exactly. With an identity layer, that is one more
                    component, of full rank and always on. What the model answers for features that are off
                    (interference) is no component's, so that even the truth leaves a remainder.
gated functions     component i: the rows of x and of control bit i towards the neurons of function i, and what these
                    write. They sum to the weights exactly, and no other is needed: hand-coded, hence certain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from decompositions.weights.factors import Factors, TensorFactors
from mdl.models.networks import Network
from mdl.models.operators import Masked, Weight
from mdl.models.toys.gated import GatedFunctions
from mdl.models.toys.superposition import Superposition

THRESHOLD = 1e-4  # of a feature's size; inputs of rotated features are known to float32 alone


@dataclass(frozen=True)
class Truth:
    """Components, and when they are on.

    **Arguments:** `probe` [d_in, C]: component c is on where |x . probe_c| > 1e-4; `always` [C]: those that always are.
    """

    factors: Factors
    probe: np.ndarray
    always: np.ndarray

    def active(self, inputs: np.ndarray) -> np.ndarray:
        """Which components each input [n, d_in] needs, bool [n, C]."""
        return np.asarray((np.abs(inputs.astype(np.float64) @ self.probe) > THRESHOLD) | self.always)

    def explained(self, weights: Mapping[str, np.ndarray]) -> dict[str, float]:
        """The share of each decomposed matrix's squared weights that the components account for."""
        left = self.factors.leftover(weights)
        return {name: 1.0 - float(np.square(r).sum() / np.square(weights[name]).sum()) for name, r in left.items()}

    def outputs(self, network: Network, weights: Mapping[str, np.ndarray], inputs: np.ndarray) -> np.ndarray:
        """What the network answers, [n, d], with the active components in the place of its matrices and no leftover."""
        active = self.active(inputs)[:, None].astype(np.float32)
        own: dict[str, Weight] = {name: jnp.asarray(w) for name, w in weights.items()}
        for name, t in self.factors.tensors.items():
            parts = (jnp.asarray(a, jnp.float32) for a in (t.inputs, t.outputs, active[..., t.component]))
            own[name] = Masked(*parts)
        values = jnp.asarray(inputs)[:, None]
        return np.asarray(network.run(own, values, jnp.zeros(values.shape[:2], jnp.int32)))[:, 0]


def superposition_truth(
    network: Superposition, weights: Mapping[str, np.ndarray], rotation: np.ndarray | None = None
) -> Truth:
    """One component a feature; the identity, if there is one, is the last and always on.

    **Arguments:** `rotation`: R of rotated inputs x R, [features, features]; needed where the network is not tied.
    **Raises:** `ValueError` if a network that is not tied comes without.
    """
    if not network.tied and rotation is None:
        raise ValueError("inputs of an untied network are rotated: the truth needs to know how")
    features, middle = np.arange(network.features), network.identity
    directions = np.eye(network.features) if rotation is None else np.asarray(rotation, np.float64)
    if network.tied:
        tensors = {"W": TensorFactors(directions, weights["W"].astype(np.float64), features)}
    else:
        rows = directions @ weights["W_in"].astype(np.float64)
        out = weights["W_out"].astype(np.float64).T
        tensors = {"W_in": TensorFactors(directions, rows, features)}
        tensors["W_out"] = TensorFactors(out, np.eye(network.features), features)
    if middle:
        last = np.full(network.hidden, network.features)
        tensors["identity"] = TensorFactors(np.eye(network.hidden), weights["identity"].astype(np.float64), last)
    always = np.arange(network.features + middle) == network.features
    probe = np.concatenate([directions.T, np.zeros((network.features, int(middle)))], 1)
    return Truth(Factors(tensors, "truth"), probe, always)


def gated_truth(network: GatedFunctions, weights: Mapping[str, np.ndarray]) -> Truth:
    """One component a function: rank two in W_in (x and its control bit), rank one in W_out."""
    k, m = network.functions, network.neurons
    own = np.repeat(np.arange(k), m) == np.arange(k)[:, None]  # [K, neurons]: whose they are
    w_in, w_out = (weights[name].astype(np.float64) for name in ("W_in", "W_out"))
    x, bits = np.tile(np.eye(1 + k)[0], (k, 1)), np.eye(1 + k)[1:]
    ids = np.arange(k)
    first = TensorFactors(
        np.concatenate([x, bits]), np.concatenate([own * w_in[0], own * w_in[1:]]), np.concatenate([ids, ids])
    )
    second = TensorFactors(own * w_out[:, 0], np.ones((k, 1)), ids)
    return Truth(Factors({"W_in": first, "W_out": second}, "truth"), bits.T, np.zeros(k, bool))
