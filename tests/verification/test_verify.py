"""mdl verify: a run is decoded in fresh processes, and every figure that was tampered with is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from mdl.cli import main
from mdl.data import Dataset
from mdl.errors import DataError, MDLError, MessageError, TaskError
from mdl.ledger import Published
from mdl.models.model import Model
from mdl.score import compare
from mdl.verify import Verification, verify

EXPLANATIONS = ["token-table", "clusters:k=8", "pca:rank=3", "random-dictionary:features=24,k=2"]


@pytest.fixture(scope="module")
def token_file(tiny_data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "markov.npy"
    np.save(path, np.concatenate([tiny_data.fit, tiny_data.tune, tiny_data.held_out]))
    return path


@pytest.fixture(scope="module")
def run_of(
    tiny_model: Model, token_file: Path, tmp_path_factory: pytest.TempPathFactory, in_little_time: None
) -> Callable[..., Path]:
    """A run of a region, on disk."""

    def make(region: str, explanations: list[str]) -> Path:
        out = tmp_path_factory.mktemp("runs") / "run"
        compare(
            tiny_model,
            region,
            tokens=token_file,
            explanations=explanations,
            fidelities=[0.05],
            horizon=1e4,
            scaling_law=(1.0, 300.0, 0.2, 1e12),
            out=out,
        )
        return out

    return make


@pytest.fixture(scope="module")
def run(run_of: Callable[..., Path]) -> Path:
    return run_of("upstream of blocks.1.hook_resid_pre", EXPLANATIONS)


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A run to tamper with."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


def doctor(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = run / "scorecard.json"
    card = json.loads(path.read_text())
    change(card)
    path.write_text(json.dumps(card))


def wrong(verification: Verification) -> set[tuple[str, str]]:
    return {(f.score, f.figure) for f in verification.findings if not f.agrees}


def test_an_honest_run_agrees_in_every_figure(run: Path, tiny_model: Model) -> None:
    verification = verify(run, tiny_model)
    assert wrong(verification) == set()
    assert verification.agrees
    checked = {f.figure for f in verification.findings}
    wanted = {"entries.state.bits", "entries.residual.bits", "static.whole_bits", "kl_bits", "sequence_bits.0"}
    assert wanted | {"static.bits.3", "beside.l0", "beside.explained_variance", "difference.low"} <= checked
    assert {f"published.{name}.value" for name in ("MDL-SAE entropy", "SAEBench mdl", "block-sparse")} <= checked
    assert {"beside.compute_recovered", "beside.compute_recovered_corrected"} <= checked
    # Five explanations, each at one fidelity and under behaviour.
    assert sum(f.figure == "kl_bits" for f in verification.findings) == 10


@pytest.mark.parametrize("region", ["blocks.1.mlp", "blocks.0.attn", "model"])
def test_every_kind_of_region_is_received(region: str, run_of: Callable[..., Path], tiny_model: Model) -> None:
    explanations = ["token-table"] if region == "model" else ["affine"]
    assert wrong(verify(run_of(region, explanations), tiny_model)) == set()


def test_doctored_figures_are_found_and_no_others(copy: Path, tiny_model: Model) -> None:
    def change(card: dict[str, Any]) -> None:
        nothing, _, table, _, clusters, _, pca = card["scores"][:7]
        nothing["entries"][-1]["bits"] *= 0.999
        nothing["static"]["header_bits"] = 1.0
        table["static"]["bits"][0] = 8.0
        table["kl_bits"] *= 0.99
        clusters["sequence_bits"][5] = 0.0
        clusters["beside"]["explained_variance"] = 0.999
        dictionary = next(s for s in card["scores"] if s["explanation"].startswith("random") and s["fidelity"])
        dictionary["published"]["MDL-SAE entropy"]["value"] += 0.01
        del dictionary["published"]["block-sparse"]
        pca["fidelity"] = 0.01  # what was paid at 5 % is claimed at 1 %: its sequences' bits do not come out
        card["task"]["null_kl_bits"] *= 2

    doctor(copy, change)
    found = {(score, figure) for score, figure in wrong(verify(copy, tiny_model)) if " against " not in score}
    single = {(score, figure) for score, figure in found if not score.startswith("pca")}
    assert single == {
        ("task", "null_kl_bits"),
        ("comparisons", "number of pairs"),  # a setting that only one explanation has
        ("nothing @ 5 %", "entries.residual.bits"),
        ("nothing @ 5 %", "static.header_bits"),
        ("token-table @ 5 %", "static.bits.0"),
        ("token-table @ 5 %", "kl_bits"),
        ("clusters-8 @ 5 %", "sequence_bits.5"),
        ("clusters-8 @ 5 %", "beside.explained_variance"),
        ("random dictionary (24, k=2) @ 5 %", "published.MDL-SAE entropy.value"),
        *(("random dictionary (24, k=2) @ 5 %", f"published.block-sparse.{f.name}") for f in fields(Published)),
    }
    assert ("pca-3 @ 1 %", "sequence_bits.0") in found


def test_another_explanations_bytes_are_found(copy: Path, tiny_model: Model) -> None:
    shutil.copy(copy / "messages" / "nothing@0.05.mdl", copy / "messages" / "token-table@0.05.mdl")
    assert {"entries.header.bits", "kl_bits"} <= {figure for _, figure in wrong(verify(copy, tiny_model))}


def test_a_damaged_stream_is_named(copy: Path, tiny_model: Model) -> None:
    path = copy / "messages" / "clusters-8@0.05.residual"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(MDLError, match="damaged residual stream"):
        verify(copy, tiny_model)


def test_a_missing_message_is_named(copy: Path, tiny_model: Model) -> None:
    (copy / "messages" / "clusters-8@0.05.mdl").unlink()
    with pytest.raises(MessageError, match=r"clusters-8@0\.05\.mdl, the message of clusters-8, is missing"):
        verify(copy, tiny_model)


def test_other_data_or_another_model_are_refused(copy: Path, tiny_model: Model, tiny_data: Dataset) -> None:
    with pytest.raises(TaskError, match="made from a model object: say where the model is with --model"):
        verify(copy)
    with pytest.raises(TaskError, match="other weights, or another configuration"):
        verify(copy, Model(tiny_model.config, tiny_model.params, tiny_model.name, "0" * 64))
    tiny_data.save(copy / "data.npz")
    with pytest.raises(DataError, match="is not the data of this scorecard"):
        verify(copy, tiny_model)


def test_the_command_exits_with_1_where_a_figure_disagrees(copy: Path, tiny_model: Model, monkeypatch: Any) -> None:
    monkeypatch.setattr("mdl.verify.load_processed", lambda source, process: tiny_model)
    honest = CliRunner().invoke(main, ["verify", str(copy), "--model", "somewhere"])
    assert honest.exit_code == 0, honest.output
    assert "all agree" in honest.output
    doctor(copy, lambda card: card["scores"][0].update(kl_bits=0.0))
    doctored = CliRunner().invoke(main, ["verify", str(copy), "--model", "somewhere"])
    assert doctored.exit_code == 1
    assert "1 DISAGREE" in doctored.output
    assert "kl_bits" in doctored.output
