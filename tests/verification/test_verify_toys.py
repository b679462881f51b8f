"""Toy models go through compare and verify: receivers are told inputs and architecture, and no weight."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from estimators.verification.job import Job
from mdl.models import Vectors
from mdl.models.networks import Network
from mdl.models.toys.gated import gated_functions, gated_inputs
from mdl.models.toys.modular import ModularAddition, modular_inputs
from mdl.receiver import Streams
from mdl.score import compare
from mdl.task import collect, parse_region
from mdl.verify import verify


def gated() -> Vectors:
    made = gated_functions(0)
    return Vectors.computed(made.network, made.weights, gated_inputs(made.network, 400, 1), "gated")


def sums() -> Vectors:
    network, rng = ModularAddition(11, 16), np.random.default_rng(0)
    weights = {name: (0.6 * rng.normal(size=shape)).astype(np.float32) for name, shape in network.matrices.items()}
    return Vectors.computed(network, weights, modular_inputs(network), "sums", "categorical")


@pytest.mark.parametrize("make", [gated, sums])
def test_compared_from_a_folder_and_verified(tmp_path: Path, in_little_time: None, make) -> None:
    make().save(tmp_path / "toy")
    chosen = {"explanations": ["affine"], "fidelities": [0.1], "phenomena": ["activations"]}
    card = compare(str(tmp_path / "toy"), **chosen, out=tmp_path / "run")
    assert {s.explanation for s in card.scores} == {"nothing", "affine"}
    assert all(s.obtained == "coded" for s in card.scores)
    assert all("outputs of a network" in note for s in card.scores for note in s.notes[:1])
    assert all("flops_ratio" in s.beside for s in card.scores)
    found = verify(tmp_path / "run")
    assert [f for f in found.findings if not f.agrees] == []
    assert {f.score for f in found.findings} >= {"nothing @ 10 %", "affine @ 10 %"}
    certified = [f for f in found.findings if "samples of each" in f.figure]
    assert len(certified) == (2 if make is sums else 0)


def test_a_job_holds_inputs_and_architecture_and_no_weight(tmp_path: Path) -> None:
    model = gated()
    region = parse_region("vectors", model)
    numbers = np.arange(30, 70, dtype=np.int32)[:, None]
    held_out = collect(model, region, numbers, np.ones((40, 1), bool), np.arange(40))
    Job.write(tmp_path, model, region, held_out, (), {"0000": (b"", Streams(b"", b""))})
    job = Job.read(tmp_path)
    outside = job.model()
    assert isinstance(outside, Vectors)
    assert isinstance(outside.network, Network)
    assert (outside.weights, outside.rows.shape, outside.likelihood) == (None, (0, 1), "gaussian")
    activations = job.activations(outside)
    np.testing.assert_array_equal(activations.inputs, held_out.inputs)
    assert activations.network == model.network
    assert not activations.outputs.any()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["inputs.npz", "job.json", "messages"]
