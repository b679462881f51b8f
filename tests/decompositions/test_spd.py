"""Stochastic parameter decomposition: losses against plain numpy, where gradients flow, training, resuming."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decompositions.weights.batches import Rows, SparseUniform
from decompositions.weights.factors import Factors
from decompositions.weights.gating import gate_values, initial_gates, lower_leaky, straight_through, upper_leaky
from decompositions.weights.masking import LEFTOVER, Attack, ascend, draw_sources
from decompositions.weights.spd import SPDSettings, start_parameters, train_spd
from decompositions.weights.spd_losses import importance_at, losses
from mdl.errors import DataError, ExplanationError
from mdl.models.operators import multiply
from tests.decompositions.small_networks import Tied, TwoLayers, inputs, random_weights

NETWORK = TwoLayers((4, 6, 3))
SETTINGS = SPDSettings(
    (("A", 5), ("B", 7)), 10, gate_hidden=3, importance=0.1, faithfulness=2.0, layerwise=0.5, power=0.9, leftover=True
)
ROWS = Rows(*inputs(NETWORK, 6, 2), 4)


def gelu(x: float) -> float:
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


def slow_gate(gates, c, v):
    rows = zip(gates.weight_in[c], gates.bias_in[c], gates.weight_out[c], strict=True)
    return float(gates.bias_out[c]) + sum(float(o) * gelu(float(i) * v + float(b)) for i, b, o in rows)


def perturbed(seed=0):
    """Parameters whose sum is not the weights, with some gates shut and some beyond 1."""
    weights = random_weights(NETWORK, 1)
    parameters = start_parameters(NETWORK, {n: jnp.asarray(w) for n, w in weights.items()}, ROWS, SETTINGS, seed)
    keys = jax.random.split(jax.random.key(3), 40)
    leaves, tree = jax.tree.flatten(parameters)
    moved = [leaf + 0.3 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=False)]
    return weights, jax.tree.unflatten(tree, moved)


def of_one_step(parameters, weights, batch, settings=SETTINGS, network=NETWORK):
    own = {n: jnp.asarray(w) for n, w in weights.items()}
    return losses(parameters, own, batch, jax.random.key(5), jnp.asarray(4), None, network, settings)


def test_gates_match_a_slow_sum():
    gates = initial_gates(jax.random.key(0), 3, 4)._replace(bias_in=0.2 * jnp.ones((3, 4)), bias_out=jnp.arange(3.0))
    scalars = jnp.asarray([[0.3, -1.2, 2.0], [0.0, 0.7, -0.1]])
    slow = [[slow_gate(gates, c, float(v)) for c, v in enumerate(row)] for row in scalars]
    np.testing.assert_allclose(gate_values(gates, scalars), slow, atol=1e-5)


def test_derivatives_of_gates_are_those_of_the_plain_formula():
    gates = initial_gates(jax.random.key(0), 3, 4)
    scalars = jax.random.normal(jax.random.key(1), (5, 3))

    def plain(gates, v):
        x = v[..., None] * gates.weight_in + gates.bias_in
        return jnp.sum(jax.nn.gelu(x, approximate=False) * gates.weight_out, -1) + gates.bias_out

    wanted = jax.grad(lambda g, v: jnp.sum(jnp.sin(plain(g, v))), (0, 1))(gates, scalars)
    found = jax.grad(lambda g, v: jnp.sum(jnp.sin(gate_values(g, v))), (0, 1))(gates, scalars)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), wanted, found)


def test_hard_sigmoids_and_their_slopes():
    x = jnp.asarray([-1.0, 0.25, 3.0])
    np.testing.assert_allclose(lower_leaky(x), [-0.01, 0.25, 1.0])
    np.testing.assert_allclose(upper_leaky(x), [0.0, 0.25, 1.02])
    np.testing.assert_allclose(straight_through(x), [0.0, 0.25, 1.0])
    opening = jax.grad(lambda x: -jnp.sum(straight_through(x)))(x)
    closing = jax.grad(lambda x: jnp.sum(straight_through(x)))(x)
    np.testing.assert_allclose(opening, [-0.01, -1.0, 0.0])
    np.testing.assert_allclose(closing, [0.0, 1.0, 0.0])


def test_losses_match_plain_numpy():
    weights, parameters = perturbed()
    batch = inputs(NETWORK, 6, 2)
    _, terms = of_one_step(parameters, weights, batch)
    x = np.asarray(batch[0])[:, 0].astype(np.float64)
    a, b = (weights[n].astype(np.float64) for n in "AB")
    hidden = np.maximum(x @ a, 0)
    before = {}
    for name, entering in (("A", x), ("B", hidden)):
        scalars = entering @ np.asarray(parameters[name].inputs).T
        before[name] = np.array([[slow_gate(parameters[name].gates, c, v) for c, v in enumerate(r)] for r in scalars])
    gates = {n: np.clip(g, 0, 1) for n, g in before.items()}
    shapes = {n: jnp.asarray(g[:, None]) for n, g in gates.items()}
    keys = jax.random.split(jax.random.key(5), 3)

    def matrices(sources, row, names):
        found = {"A": a, "B": b}
        for n in names:
            r = np.asarray(sources[n])[row, 0]
            mask = gates[n][row] + (1 - gates[n][row]) * r
            v, u = (np.asarray(p, np.float64) for p in parameters[n][:2])
            found[n] = (v.T * mask) @ u
            if LEFTOVER + n in sources:
                found[n] = found[n] + np.asarray(sources[LEFTOVER + n])[row, 0] * (weights[n] - v.T @ u)
        return found

    def far(sources, names):
        errors = []
        for row in range(6):
            m = matrices(sources, row, names)
            errors.append(np.mean((np.maximum(x[row] @ m["A"], 0) @ m["B"] - hidden[row] @ b) ** 2))
        return np.mean(errors)

    left = [weights[n] - np.asarray(parameters[n].inputs).T @ np.asarray(parameters[n].outputs) for n in "AB"]
    wanted = {
        "faithfulness": sum(np.sum(d**2) for d in left) / sum(d.size for d in left),
        "stochastic": far(draw_sources(keys[0], shapes, True), "AB"),
        "layerwise": np.mean([far(draw_sources(keys[1], shapes, False), n) for n in "AB"]),
        "importance": sum(np.mean(np.sum(np.asarray(upper_leaky(jnp.asarray(g))) ** 0.9, -1)) for g in before.values()),
        "active": sum(np.mean(np.sum(g > 0, -1)) for g in before.values()),
    }
    for name, value in wanted.items():
        np.testing.assert_allclose(terms[name], value, rtol=2e-4, err_msg=name)
    weighted = 2.0 * wanted["faithfulness"] + wanted["stochastic"] + 0.5 * wanted["layerwise"]
    np.testing.assert_allclose(terms["total"], weighted + 0.1 * wanted["importance"], rtol=2e-4)


def slopes(**changes):
    weights, parameters = perturbed()
    off = {"faithfulness": 0.0, "stochastic": 0.0, "layerwise": 0.0, "importance": 0.0} | changes
    settings = replace(SETTINGS, **off)
    batch = inputs(NETWORK, 6, 2)
    return jax.grad(lambda p: of_one_step(p, weights, batch, settings)[0])(parameters)


def size(tree):
    return max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(tree))


def test_gradients_flow_where_they_should_and_nowhere_else():
    faithful = slopes(faithfulness=1.0)
    assert all(size(t.gates) == 0 < min(size(t.inputs), size(t.outputs)) for t in faithful.values())
    important = slopes(importance=1.0)
    assert all(size(t.outputs) == 0 < min(size(t.inputs), size(t.gates)) for t in important.values())
    for found in (slopes(stochastic=1.0), slopes(adversarial=1.0)):
        assert all(min(size(t.inputs), size(t.outputs), size(t.gates)) > 0 for t in found.values())
    assert size(slopes()) == 0


@pytest.mark.parametrize("rule", ["sign", "adam"])
def test_an_attack_is_never_below_its_start(rule):
    target = jnp.asarray([0.9, 0.1, 0.5])

    def objective(sources):
        return -jnp.sum(jnp.abs(sources["A"] - target))

    start = {"A": jnp.asarray([0.85, 0.15, 0.5])}
    coarse, _ = ascend(objective, start, Attack(4, 0.7, rule))  # oversteps at once
    assert float(coarse) >= float(objective(start))
    fine, sources = ascend(objective, {"A": jnp.zeros(3)}, Attack(60, 0.05, rule))
    assert float(fine) > -0.2
    assert np.all((np.asarray(sources["A"]) >= 0) & (np.asarray(sources["A"]) <= 1))
    with pytest.raises(ExplanationError, match="newton"):
        ascend(objective, start, Attack(1, 0.1, "newton"))


def test_annealed_settings_run_from_first_to_last():
    settings = replace(SETTINGS, steps=11, importance=1.0, final_importance=0.0, power=2.0, final_power=1.0)
    found = [[float(x) for x in importance_at(settings, jnp.asarray(s))] for s in (0, 5, 10)]
    np.testing.assert_allclose(found, [[1.0, 2.0], [0.5, 1.5], [0.0, 1.0]])


def planted():
    """Two orthogonal mechanisms: one feature each."""
    network = Tied(2, 3)
    weights = {"W": np.asarray([[1.0, 0.5, 0.0], [-0.5, 1.0, 0.2]], np.float32), "b": np.zeros(2, np.float32)}
    settings = SPDSettings((("W", 4),), 1200, 2e-2, 4, importance=1e-2, one_sided=True, chunk=300)
    return network, weights, SparseUniform(2, 128, 0.3), settings


def test_two_planted_components_are_recovered():
    network, weights, batches, settings = planted()
    result = train_spd(network, weights, batches, settings, seed=0)
    tensor = result.factors.tensors["W"]
    parts = tensor.matrices(result.factors.n_components)
    assert len(parts) == 2
    truth = [np.outer(e, row) for e, row in zip(np.eye(2), weights["W"], strict=True)]
    cosines = [max(np.sum(p * t) / np.linalg.norm(p) / np.linalg.norm(t) for p in parts) for t in truth]
    assert min(cosines) > 0.99
    np.testing.assert_allclose(tensor.total(), weights["W"], atol=0.1)  # the dead ones hold the rest
    assert result.history["faithfulness"][-1] < 1e-4
    assert result.active["W"] == pytest.approx(0.6, abs=0.15)  # two features of 0.3
    result.factors.check(network)


class StopError(Exception):
    pass


def test_a_resumed_training_is_the_uninterrupted_one(tmp_path):
    network, weights, batches, settings = planted()
    settings = replace(settings, steps=25, chunk=10, adversarial=0.5, alive=None)
    whole = train_spd(network, weights, batches, settings, seed=3)

    def stop(step, _):
        if step == 20:
            raise StopError

    with pytest.raises(StopError):
        train_spd(network, weights, batches, settings, seed=3, progress=stop, checkpoint=tmp_path / "state")
    seen = []
    path = tmp_path / "state"
    again = train_spd(
        network, weights, batches, settings, seed=3, progress=lambda s, _: seen.append(s), checkpoint=path
    )
    assert seen == [25]
    for name in whole.history:
        np.testing.assert_array_equal(whole.history[name], again.history[name])
    np.testing.assert_array_equal(whole.factors.tensors["W"].inputs, again.factors.tensors["W"].inputs)
    with pytest.raises(ExplanationError, match="other weights"):
        train_spd(network, weights, batches, settings, seed=4, checkpoint=path)
    path.write_bytes(b"no checkpoint")
    with pytest.raises(ExplanationError, match="not a readable checkpoint"):
        train_spd(network, weights, batches, settings, seed=3, checkpoint=path)


def test_what_was_trained_survives_the_file(tmp_path):
    network, weights, batches, settings = planted()
    factors = train_spd(network, weights, batches, replace(settings, steps=2), seed=0).factors
    factors.save(tmp_path / "f.safetensors")
    loaded = Factors.load(tmp_path / "f.safetensors")
    np.testing.assert_array_equal(loaded.tensors["W"].gates.weight_in, factors.tensors["W"].gates.weight_in)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"components": (("V", 4),)}, "no matrix 'V'"),
        ({"components": (("W", 0),)}, "0 components"),
        ({"components": ()}, "at least one"),
        ({"components": (("W", 2), ("W", 2))}, "each once"),
        ({"divergence": "metric"}, "no metric root"),
        ({"divergence": "l1"}, "'l1'"),
        ({"steps": 0}, "steps is 0"),
        ({"start": "zeros"}, "'zeros'"),
        ({"power": 0.0}, "above 0"),
        ({"rate": 1e30}, "not finite"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    network, weights, batches, settings = planted()
    with pytest.raises(ExplanationError, match=message):
        train_spd(network, weights, batches, replace(settings, **{"steps": 30} | changes), seed=0)


def test_bad_weights_and_data_are_refused():
    network, weights, batches, settings = planted()
    with pytest.raises(ExplanationError, match=r"\(3, 2\); the network needs"):
        train_spd(network, weights | {"W": weights["W"].T}, batches, settings, seed=0)
    with pytest.raises(DataError, match="none of 6 positions"):
        Rows.of_positions(np.zeros((2, 3, 4)), np.zeros((2, 3), int), np.zeros((2, 3), bool), 8)


def test_rows_are_scored_positions():
    values = np.arange(24.0).reshape(2, 3, 4)
    scored = np.asarray([[False, True, True], [False, False, True]])
    drawn, tokens = Rows.of_positions(values, np.arange(6).reshape(2, 3), scored, 64).draw(jax.random.key(0))
    assert drawn.shape == (64, 1, 4)
    assert set(np.asarray(tokens).ravel()) == {1, 2, 5}
    np.testing.assert_array_equal(drawn[:, 0, 0], 4 * tokens[:, 0])


@dataclass(frozen=True)
class Superposed:
    """relu((x W_in) W_out + b)."""

    features: int
    hidden: int

    @property
    def matrices(self):
        return {"W_in": (self.features, self.hidden), "W_out": (self.hidden, self.features)}

    @property
    def tables(self):
        return {}

    @property
    def vectors(self):
        return {"b": self.features}

    def run(self, weights, values, tokens):
        return jax.nn.relu(multiply(multiply(values, weights["W_in"]), weights["W_out"]) + weights["b"])


@pytest.mark.slow
def test_five_features_in_two_channels_are_five_components():
    """The pentagon that training finds: features at equal angles, of norm 1.13, with a bias of -0.245."""
    angles = 2 * np.pi * np.arange(5) / 5 + 0.3
    w = 1.13 * np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    weights = {"W_in": w, "W_out": np.ascontiguousarray(w.T), "b": np.full(5, -0.245, np.float32)}
    settings = SPDSettings(
        (("W_in", 20), ("W_out", 20)), 5000, 1e-2, 8, importance=3e-3, one_sided=True, start="inputs", chunk=1000
    )
    result = train_spd(Superposed(5, 2), weights, SparseUniform(5, 1024), settings, seed=1)
    tensor = result.factors.tensors["W_in"]
    rows = tensor.matrices(result.factors.n_components)[:5]
    cosines = np.einsum("cfo,fo->cf", rows, w) / np.maximum(np.linalg.norm(rows, axis=2), 1e-9) / 1.13
    assert len(tensor.component) == 5
    assert cosines.max(0).mean() > 0.98
    assert sorted(cosines.argmax(0)) == [0, 1, 2, 3, 4]
