"""What is known of the toy models' parts: components as `Factors`, and which of them an input needs.

A truth is what the model was made or trained to do, read off the weights without looking at any score:

superposition       component c: the row of W that feature c has, used both ways; with rotated inputs, its direction in
                    them and its output. They sum to the weights exactly. With an identity layer, that is one more
                    component, of full rank and always on. What the model answers for features that are off
                    (interference) is no component's, so that even the truth leaves a remainder.
residual MLPs       with a neuron for each feature, component c: the neurons that serve feature c, in every layer; they
                    sum to the weights exactly. That holds where training ended so, which is checked neuron by neuron.
                    With neurons shared by features, only W_in's part (the direction of feature c, and what W_in makes
                    of it) is known, and W_out is one component: how it computes many features is an open question.
modular addition    component k: a key frequency, its cosine and sine planes in W_in and W_out. All are always on, so
                    that nothing is saved by parts. What lies outside of the key frequencies is a leftover.
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
from mdl.models.toys.modular import ModularAddition
from mdl.models.toys.residual import ResidualMLP
from mdl.models.toys.superposition import Superposition

THRESHOLD = 1e-4  # of a feature's size; inputs of rotated features are known to float32 alone
SERVED = 0.9  # of a neuron's squared weights: what makes it one feature's
KEY_SHARE = 0.01  # of W_in's squared weights: what makes a frequency a key


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


def residual_truth(network: ResidualMLP, weights: Mapping[str, np.ndarray]) -> Truth:
    """One component a feature; see the module for what of it is established.

    A neuron serves one feature if at least 90 % of its squared input weights, and of its squared output weights, are
    that feature's. Where all do, a feature's component is its neurons: columns of W_in and rows of W_out, all layers.
    Otherwise component c is what W_in of every layer makes of feature c alone, and all W_out are one further component,
    always on.
    """
    embed = network.embed.astype(np.float64)
    dual = np.linalg.pinv(embed)  # [d_resid, features]: reads a feature off the stream
    c, layers = network.features, range(len(network.neurons))
    own = [neurons_served(network, weights, layer) for layer in layers]
    certain = all((served >= 0).all() for served in own) and set(np.concatenate(own)) == set(range(c))
    tensors: dict[str, TensorFactors] = {}
    for layer, served in zip(layers, own, strict=True):
        name_in, name_out = f"layers.{layer}.W_in", f"layers.{layer}.W_out"
        w_in, w_out = (weights[name].astype(np.float64) for name in (name_in, name_out))
        units = np.eye(len(served))
        if certain:
            tensors[name_in] = TensorFactors(w_in.T, units, served)
            tensors[name_out] = TensorFactors(units, w_out, served)
        else:
            tensors[name_in] = TensorFactors(dual.T, embed @ w_in, np.arange(c))
            tensors[name_out] = TensorFactors(units, w_out, np.full(len(served), c))
    note = "every neuron serves one feature" if certain else "neurons are shared: only W_in's part is established"
    always = np.arange(c + (not certain)) == c
    probe = np.concatenate([dual, np.zeros((network.d_resid, int(not certain)))], 1)
    return Truth(Factors(tensors, "truth", (note,)), probe, always)


def neurons_served(network: ResidualMLP, weights: Mapping[str, np.ndarray], layer: int) -> np.ndarray:
    """For each neuron of a layer the one feature that it serves, -1 where there is no such, [neurons]."""
    embed = network.embed.astype(np.float64)
    reads = np.square(embed @ weights[f"layers.{layer}.W_in"]).T
    writes = np.square(weights[f"layers.{layer}.W_out"] @ embed.T)
    best, rows = reads.argmax(1), np.arange(len(reads))
    enough = [a[rows, best] >= SERVED * a.sum(1) for a in (reads, writes)]
    return np.where(enough[0] & enough[1] & (reads.sum(1) > 0), best, -1)


def key_frequencies(network: ModularAddition, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    """Frequencies k of 1 to (p - 1) / 2 that hold at least 1 % of W_in's squared weights, by Fourier's transform of its
    rows over a and over b (Nanda et al. 2023)."""
    w = weights["W_in"].astype(np.float64).reshape(2, network.p, -1)
    power = np.square(np.abs(np.fft.rfft(w, axis=1))).sum((0, 2))
    power[1:] *= 2.0  # k and p - k
    return np.flatnonzero(power[1:] >= KEY_SHARE * power.sum()) + 1


def modular_truth(network: ModularAddition, weights: Mapping[str, np.ndarray]) -> Truth:
    """One component a key frequency: what W_in makes of its cosine and sine of a and of b (rank four), and what W_out
    writes on its cosine and sine of the label (rank two). All are always on."""
    keys, angle = key_frequencies(network, weights), 2.0 * np.pi * np.arange(network.p) / network.p
    waves = np.concatenate([np.stack([np.cos(k * angle), np.sin(k * angle)]) for k in keys])
    waves /= np.linalg.norm(waves, axis=1, keepdims=True)  # [2 keys, p], orthonormal for odd p
    zeros, ids = np.zeros_like(waves), np.repeat(np.arange(len(keys)), 2)
    read = np.concatenate([np.concatenate([waves, zeros], 1), np.concatenate([zeros, waves], 1)])
    w_in, w_out = (weights[name].astype(np.float64) for name in ("W_in", "W_out"))
    first = TensorFactors(read, read @ w_in, np.concatenate([ids, ids]))
    second = TensorFactors((w_out @ waves.T).T, waves, ids)
    notes = (f"key frequencies {', '.join(map(str, keys))} of 1 to {network.p // 2}",)
    factors = Factors({"W_in": first, "W_out": second}, "truth", notes)
    return Truth(factors, np.zeros((2 * network.p, len(keys))), np.ones(len(keys), bool))


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
