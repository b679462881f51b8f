"""The loop that trains the shipped transcoder, on a little MLP: it learns, can be interrupted, and is loaded back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import sae_lens
import torch

from experiments.embedded_model import train_transcoder as trainer

STEPS, WIDTH = 120, 8


@pytest.fixture(scope="module")
def pairs() -> trainer.Pairs:
    """A ReLU network of 12 neurons."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4096, WIDTH)).astype(np.float32)
    hidden = np.maximum(x @ rng.normal(size=(WIDTH, 12)) - 1.0, 0.0)
    return trainer.Pairs(x, (hidden @ rng.normal(size=(12, WIDTH)) + 0.5).astype(np.float32))


@pytest.fixture(autouse=True)
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "K", 6)
    monkeypatch.setattr(trainer, "WARM_UP", 10)
    monkeypatch.setattr(trainer, "CHECKPOINT_STEPS", 40)


def train(pairs: trainer.Pairs, checkpoint: Path, said: list[str]) -> sae_lens.JumpReLUSkipTranscoder:
    return trainer.train(pairs, STEPS, checkpoint, "little", 0, said.append)


def test_it_learns_and_is_stored_as_sae_lens_reads_it(pairs: trainer.Pairs, tmp_path: Path) -> None:
    sae = train(pairs, tmp_path / "run.checkpoint", [])
    np.testing.assert_allclose(sae.W_dec.detach().norm(dim=1), 1.0, rtol=1e-5)
    assert len(set(sae.threshold.tolist())) == 1
    training = {"training_tokens": len(pairs.inputs), "steps": STEPS, "affine": trainer.affine_map(pairs)}
    metrics = trainer.save(sae, tmp_path / "made", pairs, training)
    assert metrics["explained_variance"] > metrics["affine_explained_variance"] + 0.05
    assert 3 < metrics["l0"] < 12
    read = sae_lens.SAE.load_from_disk(tmp_path / "made", dtype="float32")
    assert read.cfg.metadata.hook_name_out == trainer.WRITES
    with torch.no_grad():
        error = pairs.outputs - read(torch.from_numpy(pairs.inputs)).numpy()
    share = np.square(error).sum() / np.square(pairs.outputs - pairs.outputs.mean(0)).sum()
    assert metrics["explained_variance"] == pytest.approx(1.0 - share, abs=1e-4)


def test_an_interrupted_run_goes_on_to_the_same_weights(
    pairs: trainer.Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(pairs, tmp_path / "whole.checkpoint", [])
    advance, calls = trainer.Run.advance, iter(range(STEPS))

    def interrupted(run: trainer.Run, x: torch.Tensor, y: torch.Tensor, rate: float) -> float:
        if next(calls) == 90:
            raise KeyboardInterrupt
        return advance(run, x, y, rate)

    monkeypatch.setattr(trainer.Run, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(pairs, tmp_path / "run.checkpoint", [])
    monkeypatch.setattr(trainer.Run, "advance", advance)
    said: list[str] = []
    resumed = train(pairs, tmp_path / "run.checkpoint", said)
    assert said[0] == "goes on from step 80"
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=1e-5, atol=1e-6)
