"""Time of one training step, here and in torch: `python -m experiments.parameter_decomposition.benchmark`.

The same step on both sides: TMS 40-10 with tied weights, C = 200, gates of 16 hidden units, one mask sample,
faithfulness + reconstruction + importance, Adam. The two alternate in one process, so that both meet the same load;
`ratio` is torch / ours, median and quartiles over the rounds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import torch

from decompositions.weights.batches import SparseUniform
from decompositions.weights.spd import SPDSettings, start_parameters, training_steps
from mdl.models.toys.superposition import Superposition

FEATURES, HIDDEN, COMPONENTS, GATE_HIDDEN = 40, 10, 200, 16
IMPORTANCE, RATE = 1e-4, 1e-3


@dataclass
class TorchStep:
    """One step with automatic derivatives, gates as one tensor of [batch, C, hidden units]."""

    weight: torch.Tensor
    bias: torch.Tensor
    parameters: list[torch.Tensor]
    optimiser: torch.optim.Optimizer
    batch: int
    generator: torch.Generator

    @classmethod
    def of(cls, weights: dict[str, np.ndarray], settings: SPDSettings, batch: int) -> TorchStep:
        own = start_parameters(
            Superposition(FEATURES, HIDDEN),
            {n: jnp.asarray(w) for n, w in weights.items()},
            SparseUniform(FEATURES, batch),
            settings,
            0,
        )["W"]
        assert own.gates is not None
        arrays = [own.inputs, own.outputs, *own.gates]
        parameters = [torch.from_numpy(np.array(a)).requires_grad_() for a in arrays]
        weight, bias = (torch.from_numpy(weights[n]) for n in ("W", "b"))
        return cls(
            weight, bias, parameters, torch.optim.Adam(parameters, RATE), batch, torch.Generator().manual_seed(0)
        )

    def __call__(self) -> float:
        v, u, weight_in, bias_in, weight_out, bias_out = self.parameters
        shape = (self.batch, FEATURES)
        x = torch.rand(shape, generator=self.generator) * (torch.rand(shape, generator=self.generator) < 0.05)
        target = torch.relu(x @ self.weight @ self.weight.T + self.bias)
        scalars = x @ v.T
        hidden = torch.nn.functional.gelu(scalars[..., None] * weight_in + bias_in)
        gates = (hidden * weight_out).sum(-1) + bias_out
        lower = torch.where(gates < 0, 0.01 * gates, gates.clamp(max=1.0))
        upper = torch.where(gates > 1, 1 + 0.01 * (gates - 1), gates.clamp(min=0.0))
        mask = lower + (1 - lower) * torch.rand(lower.shape, generator=self.generator)
        inner = (scalars * mask) @ u
        outputs = torch.relu(((inner @ u.T) * mask) @ v + self.bias)
        loss = ((self.weight - v.T @ u) ** 2).mean() + 2 * ((outputs - target) ** 2).mean()
        loss = loss + IMPORTANCE * (upper**2).sum(-1).mean()
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        return loss.item()


def seconds_a_step(run: Callable[[], object], steps: int) -> float:
    """Wall-clock seconds of a call that does `steps` steps, over `steps`."""
    begun = time.perf_counter()
    run()
    return (time.perf_counter() - begun) / steps


def compare(batch: int, steps: int, rounds: int) -> dict[str, object]:
    """Seconds a step of both, and their ratio, over alternating rounds."""
    network = Superposition(FEATURES, HIDDEN)
    weights = {name: np.asarray(w) for name, w in network.init(jax.random.key(0)).items()}
    settings = SPDSettings(
        (("W", COMPONENTS),), 10**6, RATE, GATE_HIDDEN, importance=IMPORTANCE, power=2.0, straight_through=False
    )
    ours = training_steps(network, weights, SparseUniform(FEATURES, batch), settings, seed=0, length=steps)
    theirs = TorchStep.of(weights, settings, batch)
    ours()
    theirs()
    pairs = []
    for _ in range(rounds):
        own = seconds_a_step(ours, steps)
        pairs.append((own, seconds_a_step(lambda: [theirs() for _ in range(steps)], steps)))
    ratios = np.array([b / a for a, b in pairs])
    return {
        "batch": batch,
        "rounds": rounds,
        "steps a round": steps,
        "ours_ms": round(1e3 * float(np.median([a for a, _ in pairs])), 2),
        "torch_ms": round(1e3 * float(np.median([b for _, b in pairs])), 2),
        "ratio": round(float(np.median(ratios)), 2),
        "ratio_quartiles": [round(float(q), 2) for q in np.quantile(ratios, [0.25, 0.75])],
    }


def main() -> None:
    """Print one JSON object a batch size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    versions = {"jax": jax.__version__, "torch": torch.__version__, "torch_threads": 1}
    found = [compare(batch, arguments.steps, arguments.rounds) for batch in arguments.batches]
    print(json.dumps({**versions, "steps": found}, indent=1))


if __name__ == "__main__":
    main()
