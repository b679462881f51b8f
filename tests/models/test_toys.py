"""The toy models compute what they say, from weights or whatever stands in their place; and can be written and read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdl.data import from_rows
from mdl.errors import ModelError
from mdl.models import Vectors, load_model
from mdl.models.networks import Network, network_flops
from mdl.models.operators import Chain, Masked
from mdl.models.toys.description import described, from_description
from mdl.models.toys.gated import RANGE, GatedFunctions, function_values, gated_functions, gated_inputs
from mdl.models.toys.modular import ModularAddition, modular_inputs, pairs
from mdl.models.toys.residual import ResidualMLP, residual_inputs
from mdl.models.toys.superposition import Superposition, random_rotation, rotated, superposition_inputs
from mdl.models.toys.training import Trained

EVERY = [
    Superposition(),
    Superposition(6, 3, identity=True),
    Superposition(6, 3, tied=False),
    ResidualMLP(4, 8, (3, 2)),
    ResidualMLP(4, 6, (5,), "unit"),
    ModularAddition(7, 5),
    ModularAddition(5, 6, "relu"),
    GatedFunctions(3, 4),
]


def random_weights(network: Network, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    vectors = {name: (size,) for name, size in network.vectors.items()}
    return {n: rng.normal(size=s).astype(np.float32) for n, s in {**network.matrices, **vectors}.items()}


def outputs(network: Network, weights: dict, inputs: np.ndarray) -> np.ndarray:
    """Of inputs [n, d_in]."""
    own = {n: jnp.asarray(w) if isinstance(w, np.ndarray) else w for n, w in weights.items()}
    values = jnp.asarray(inputs, jnp.float32)[:, None]
    return np.asarray(network.run(own, values, jnp.zeros(values.shape[:2], jnp.int32)))[:, 0]


def width(network: Network) -> int:
    return next(iter(network.matrices.values()))[0]


def pentagon(bias: float = -0.3) -> Trained:
    """Five features at the corners of a pentagon, as training finds them."""
    angle = 2 * np.pi * np.arange(5) / 5
    weights = {"W": 1.1 * np.stack([np.cos(angle), np.sin(angle)], 1), "b": np.full(5, bias)}
    return Trained(Superposition(), {n: w.astype(np.float32) for n, w in weights.items()}, 0.0)


def test_a_pentagon_answers_a_feature_by_itself_and_its_neighbours() -> None:
    found = outputs(Superposition(), dict(pentagon().weights), 0.8 * np.eye(5))
    angle = 2 * np.pi * np.arange(5) / 5
    wanted = np.maximum(0.8 * 1.21 * np.cos(angle[:, None] - angle) - 0.3, 0.0)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert (found > 0).sum(1).tolist() == [1] * 5  # 1.21 x 0.8 x cos 72 degrees lies below the bias


@pytest.mark.parametrize("network", EVERY, ids=str)
def test_operators_take_the_place_of_matrices(network: Network) -> None:
    weights, inputs = random_weights(network), np.random.default_rng(1).normal(size=(9, width(network)))
    plain = outputs(network, weights, inputs)
    chained = {n: Chain(jnp.asarray(weights[n]), jnp.eye(s[1])) for n, s in network.matrices.items()}
    masked = {
        n: Masked(jnp.asarray(weights[n].T), jnp.eye(s[1]), jnp.ones((9, 1, s[1]))) for n, s in network.matrices.items()
    }
    for operators in (chained, masked):
        np.testing.assert_allclose(outputs(network, {**weights, **operators}, inputs), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("network", EVERY, ids=str)
def test_a_missing_weight_is_named(network: Network) -> None:
    weights = random_weights(network)
    for name in weights:
        rest = {n: w for n, w in weights.items() if n != name}
        with pytest.raises(ModelError, match=f"no weight '{name}'"):
            outputs(network, rest, np.zeros((1, width(network))))


def test_rotated_inputs_change_the_weights_and_not_the_answers() -> None:
    trained, rotation = pentagon(), random_rotation(5, 3)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(5), atol=1e-12)
    turned = rotated(trained, rotation)
    plain, other = (superposition_inputs(trained.network, 50, 1, 0.3, r) for r in (None, rotation))
    found = outputs(turned.network, dict(turned.weights), other)
    np.testing.assert_allclose(found, outputs(trained.network, dict(trained.weights), plain), atol=1e-5)
    assert not np.allclose(plain, other)
    with pytest.raises(ModelError, match="only once"):
        rotated(turned, rotation)


def test_an_identity_layer_is_a_weight_of_its_own() -> None:
    trained = pentagon()
    inputs = superposition_inputs(trained.network, 20, 0)
    with_layer = Superposition(identity=True)
    weights = {**trained.weights, "identity": np.eye(2, dtype=np.float32)}
    np.testing.assert_array_equal(
        outputs(with_layer, weights, inputs), outputs(trained.network, dict(trained.weights), inputs)
    )
    without = {**weights, "identity": np.zeros((2, 2), np.float32)}
    assert not outputs(with_layer, without, inputs).any()  # biases are negative


@pytest.mark.parametrize(("p", "symmetric"), [(0.05, False), (0.2, True)])
def test_every_input_has_a_feature_on(p: float, symmetric: bool) -> None:
    network = ResidualMLP(10, 16)
    x = (
        residual_inputs(network, 4000, 0, p) @ network.embed.T
        if symmetric
        else superposition_inputs(Superposition(10, 3), 4000, 0, p)
    )
    on = np.abs(x) > 1e-5
    assert on.any(1).all()
    expected = p / (1 - (1 - p) ** 10)  # given that at least one is on
    assert abs(on.mean() - expected) < 5 * np.sqrt(expected / x.size)
    assert abs(x[on].mean() - (0.0 if symmetric else 0.5)) < 0.05


@pytest.mark.parametrize("seed", range(3))
def test_gated_functions_add_up_and_are_zero_without_their_bit(seed: int) -> None:
    made = gated_functions(seed)
    x = np.random.default_rng(seed).uniform(0, RANGE, 40)
    bits = np.random.default_rng(seed).integers(0, 2, (40, 4)).astype(np.float64)
    alone = [
        outputs(made.network, dict(made.weights), np.concatenate([x[:, None], np.tile(row, (40, 1))], 1))[:, 0]
        for row in np.eye(4)
    ]
    found = outputs(made.network, dict(made.weights), np.concatenate([x[:, None], bits], 1))[:, 0]
    np.testing.assert_allclose(found, (bits * np.stack(alone, 1)).sum(1), atol=1e-4)
    assert np.array_equal(found[~bits.any(1)], np.zeros((~bits.any(1)).sum()))


def test_gated_functions_meet_their_cosines_at_the_knots() -> None:
    made = gated_functions(5)
    w_in, bias = made.weights["W_in"], made.weights["b_in"]
    for i in range(4):
        own = slice(10 * i, 10 * (i + 1))
        knots = -bias[own] / w_in[0, own] - 10.0
        inputs = np.concatenate([knots[:, None], np.tile(np.eye(4)[i], (10, 1))], 1)
        found = outputs(made.network, dict(made.weights), inputs)[:, 0]
        np.testing.assert_allclose(found, function_values(5, knots, 4)[:, i], atol=2e-4)
    assert 0 < made.figures["interpolation_error"] < 0.6


def test_gated_inputs_have_a_bit_on() -> None:
    inputs = gated_inputs(GatedFunctions(6), 3000, 0)
    assert inputs.shape == (3000, 7)
    assert set(np.unique(inputs[:, 1:])) == {0.0, 1.0}
    assert inputs[:, 1:].any(1).all()
    assert 0 <= inputs[:, 0].min() < 0.1 < RANGE - 0.1 < inputs[:, 0].max() <= RANGE
    assert abs(inputs[:, 1:].mean() - (1 / 6) / (1 - (5 / 6) ** 6)) < 0.02


def test_embeddings_have_unit_norm_and_are_the_same_everywhere() -> None:
    orthogonal, unit = ResidualMLP(20, 32, seed=4).embed, ResidualMLP(100, 64, (50,), "unit", seed=4).embed
    np.testing.assert_allclose(orthogonal @ orthogonal.T, np.eye(20), atol=1e-6)
    gram = unit @ unit.T
    np.testing.assert_allclose(np.diagonal(gram), 1.0, atol=1e-6)
    off = gram[~np.eye(100, dtype=bool)]
    assert 0.9 / 8 < off.std() < 1.1 / 8  # 1 / sqrt(d_resid)
    digest = hashlib.sha256(orthogonal.tobytes() + unit.tobytes()).hexdigest()
    assert digest[:16] == "ecb581ae9fa9d9c4"
    assert not np.array_equal(orthogonal, ResidualMLP(20, 32, seed=5).embed)
    with pytest.raises(ValueError, match="read-only"):
        orthogonal[0, 0] = 0


def test_a_neuron_a_feature_computes_x_plus_relu_x() -> None:
    network = ResidualMLP(4, 8, (2, 2))
    embed = network.embed
    weights = {}
    for layer, own in enumerate((embed[:2], embed[2:])):
        weights |= {f"layers.{layer}.W_in": own.T.copy(), f"layers.{layer}.W_out": own.copy()}
    x = np.random.default_rng(0).uniform(-1, 1, (30, 4)).astype(np.float32)
    np.testing.assert_allclose(outputs(network, weights, x @ embed), x + np.maximum(x, 0), atol=1e-5)


def test_modular_addition_has_every_pair_once() -> None:
    network = ModularAddition(7, 5)
    inputs = modular_inputs(network)
    assert inputs.shape == (49, 14)
    a, b = pairs(7)
    assert np.array_equal(inputs[:, :7].argmax(1), a)
    assert np.array_equal(inputs[:, 7:].argmax(1), b)
    vectors = Vectors.computed(network, random_weights(network), inputs, "sums", "categorical")
    data = from_rows(vectors.first_equal, None, 0, "sums")
    every = np.concatenate([split for _, split, _, _ in data.splits()])
    assert sorted(every[:, 0].tolist()) == list(range(49))
    assert data.description["duplicates_dropped"] == 0


def test_waves_of_one_frequency_add_modulo_five() -> None:
    """Quadratic neurons of one frequency give cos(k(a + b - c)), times a factor that depends on a - b alone."""
    p, k = 5, 1
    w = 2 * np.pi * k / p
    residues = np.arange(p)
    phases = 2 * np.pi * np.arange(5) / 5
    w_in = np.concatenate([np.cos(w * residues[:, None] + phases)] * 2)
    w_out = np.cos(w * residues + 2 * phases[:, None])
    network = ModularAddition(p, 5)
    weights = {"W_in": w_in.astype(np.float32), "W_out": w_out.astype(np.float32)}
    found = outputs(network, weights, modular_inputs(network))
    a, b = pairs(p)
    spread = found - found.mean(1, keepdims=True)
    half = (1 + np.cos(w * (a - b))) / 2
    wanted = 5 * half[:, None] * np.cos(w * (a + b)[:, None] - w * residues)
    np.testing.assert_allclose(spread, wanted, atol=1e-4)


@pytest.mark.parametrize("network", EVERY, ids=str)
def test_architectures_travel_as_json(network: Network) -> None:
    again = from_description(json.loads(json.dumps(described(network))))
    assert again == network
    assert hash(again) == hash(network)


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"class": "Superpositon"}, "Did you mean 'Superposition'"),
        ({}, "Known are"),
        ({"class": "GatedFunctions", "gates": 3}, "does not take the fields gates"),
        ({"class": "ModularAddition", "p": 6}, "p is odd"),
        ({"class": "ResidualMLP", "d_resid": 20}, "power of two"),
        ({"class": "ResidualMLP", "embedding": "learnt"}, "no embedding 'learnt'"),
    ],
)
def test_other_descriptions_are_refused(description: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        from_description(description)


def test_a_saved_network_is_the_same_model(tmp_path: Path) -> None:
    trained = pentagon()
    inputs = superposition_inputs(trained.network, 40, 0)
    model = Vectors.computed(trained.network, trained.weights, inputs, "pentagon")
    model.save(tmp_path / "toy")
    again = load_model(tmp_path / "toy")
    assert isinstance(again, Vectors)
    assert (again.name, again.network, again.fingerprint) == ("pentagon", trained.network, model.fingerprint)
    np.testing.assert_array_equal(again.rows, model.rows)
    other = Vectors.computed(trained.network, {**trained.weights, "b": np.zeros(5, np.float32)}, inputs, "pentagon")
    assert other.fingerprint != model.fingerprint
    (tmp_path / "toy" / "weights.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="holds no network"):
        load_model(tmp_path / "toy")
    with pytest.raises(ModelError, match=r"saved by numpy\.save"):
        Vectors.of(np.zeros((3, 2))).save(tmp_path / "rows")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"W": np.zeros((2, 5), np.float32)}, r"W: expected \(5, 2\), found \(2, 5\)"),
        ({"c": np.zeros(2, np.float32)}, r"c: expected None, found \(2,\)"),
        ({"b": np.full(5, np.nan, np.float32)}, "NaN or infinite: b"),
    ],
)
def test_weights_that_are_not_the_networks_are_refused(change: dict, message: str) -> None:
    trained = pentagon()
    with pytest.raises(ModelError, match=message):
        Vectors.computed(trained.network, {**trained.weights, **change}, np.eye(5), "wrong")


@pytest.mark.parametrize(
    ("network", "flops"),
    [
        (Superposition(40, 10, identity=True), 2 * (2 * 400 + 100)),  # one matrix, used twice
        (ResidualMLP(4, 8, (3, 2)), 2 * 2 * (8 * 3 + 8 * 2)),
        (ModularAddition(7, 5), 2 * (14 * 5 + 5 * 7)),
    ],
)
def test_flops_count_every_use_of_a_matrix(network: Network, flops: int) -> None:
    assert network_flops(network, width(network)) == flops


def test_initial_weights_have_the_networks_shapes() -> None:
    for network in (Superposition(6, 3, identity=True), ResidualMLP(), ModularAddition()):
        shapes = {name: tuple(w.shape) for name, w in network.init(jax.random.key(0)).items()}
        assert shapes == {**network.matrices, **{n: (s,) for n, s in network.vectors.items()}}
    with pytest.raises(ModelError, match="train a tied one"):
        Superposition(tied=False).init(jax.random.key(0))
