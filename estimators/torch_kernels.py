"""The slower torch path of the evaluation, for modules without an adapter: two whole forward passes each time.

The module has no suffix that could be run alone, and its own predictions are computed anew beside the explained ones:
logits of all tokens would not fit into memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from estimators.kernels import CHUNK_TOKENS, Damage, batches, next_tokens
from mdl.errors import ModelError
from mdl.models.torch_path import TorchModel
from mdl.task import TORCH_TOKENS, Activations, Region


def kl_nats(reference: torch.Tensor, explained: torch.Tensor) -> torch.Tensor:
    r"""KL(M || M_E) of rows of logits [..., v], nats [...], in float32; `estimators.kernels.kl_nats` says how.

    $$KL = \sum_v p_v \, (e^{\delta_v} - 1 - \delta_v), \quad \delta = \log q - \log p$$
    """
    log_p, log_q = reference.float().log_softmax(-1), explained.float().log_softmax(-1)
    delta, p = log_q - log_p, log_p.exp()
    near = delta.clamp(-0.1, 0.1)
    series = near * near * (1 / 2 + near * (1 / 6 + near * (1 / 24 + near / 120)))
    exact = log_q.exp() - p - p * delta
    return torch.where(delta.abs() < 0.1, p * series, exact).sum(-1)


def sample_rows(logits: torch.Tensor, uniform: np.ndarray) -> torch.Tensor:
    """One draw a row of logits [..., v], by inverting its distribution function at `uniform` [...]: indices [..., 1].

    Uniform numbers made on the host give the same draws on every device.
    """
    cumulative = logits.detach().float().softmax(-1).cumsum(-1)
    at = torch.as_tensor(uniform, dtype=torch.float32, device=logits.device)[..., None] * cumulative[..., -1:]
    return torch.searchsorted(cumulative, at, right=True).clamp(max=logits.shape[-1] - 1)


@dataclass(frozen=True)
class TorchEvaluator:
    """A torch module cut at a region, with what `estimators.kernels.Evaluator` offers for our own models."""

    model: TorchModel
    region: Region

    @property
    def notes(self) -> tuple[str, ...]:
        return (f"evaluated through the slower torch path (no JAX adapter for {self.model.name})",)

    def reference(self, activations: Activations) -> np.ndarray:
        """M's own outputs of the region, [sequences, positions, d], from which its predictions are computed anew."""
        return activations.outputs

    def damage(self, activations: Activations, reference: np.ndarray, values: np.ndarray) -> Damage:
        """Replace the region's outputs by `values` [sequences, positions, d] and compare with M, scored tokens only."""
        tokens, targets = activations.tokens, next_tokens(activations.tokens)
        with torch.no_grad():
            parts = [
                _kl_and_loss(self._logits(tokens[s], reference[s]), self._logits(tokens[s], values[s]), targets[s])
                for s in batches(activations, TORCH_TOKENS)
            ]
        return Damage.of_nats(np.concatenate(parts), activations)

    def score_gradients(self, activations: Activations, seed: int) -> np.ndarray:
        """d log p(y) / d output at the scored positions, nats per unit, [n, d]; y is sampled from M itself.

        **Raises:** `ModelError` where no gradient reaches the region's output.
        """
        uniform = np.random.default_rng(seed).random(activations.tokens.shape, np.float32)
        parts = [
            self._gradient(activations.tokens[s], activations.outputs[s], uniform[s], activations.asked[s])
            for s in batches(activations, TORCH_TOKENS)
        ]
        return np.concatenate(parts)[activations.scored]

    def logits(self, activations: Activations, reference: np.ndarray) -> np.ndarray:
        """Predictions with `reference` [sequences, positions, d] in the region's place, scored tokens only, [n, v]."""
        with torch.no_grad():
            parts = [
                self._logits(activations.tokens[s], reference[s]).float().cpu().numpy()[activations.scored[s]]
                for s in batches(activations, CHUNK_TOKENS)
            ]
        return np.concatenate(parts)

    def _logits(self, tokens: np.ndarray, values: np.ndarray) -> torch.Tensor:
        """Logits with the region's outputs replaced, [sequences, positions, v]."""
        if self.region.output == "logits":
            return torch.as_tensor(np.array(values, np.float32))
        return self.model.forward(tokens, {self.region.output: lambda own: torch.as_tensor(np.array(values)).to(own)})

    def _gradient(self, tokens: np.ndarray, values: np.ndarray, uniform: np.ndarray, asked: np.ndarray) -> np.ndarray:
        leaves: list[torch.Tensor] = []

        def leaf(own: Any) -> torch.Tensor:
            torch.set_grad_enabled(True)  # from here on only: nothing upstream of the region's output is recorded
            leaves.append(torch.as_tensor(np.array(values)).to(own).requires_grad_())
            return leaves[-1]

        with torch.no_grad():
            logits = self.model.forward(tokens, {self.region.output: leaf}).float()
            drawn = sample_rows(logits, uniform)
            drawn_logs = logits.log_softmax(-1).gather(-1, drawn)[..., 0]
            likelihood = (drawn_logs * torch.as_tensor(asked).to(drawn_logs)).sum()
        try:
            (gradient,) = torch.autograd.grad(likelihood, leaves)
        except RuntimeError as error:
            raise ModelError(
                f"no gradient of {self.model.name}'s predictions reaches {self.region.output} ({error}). The module "
                "probably detaches it, or runs its later part without gradients; the Fisher metric needs them."
            ) from error
        return gradient.float().cpu().numpy()


def _kl_and_loss(reference: torch.Tensor, explained: torch.Tensor, targets: np.ndarray) -> np.ndarray:
    """KL and cross-entropy of `targets` [b, t], nats [b, t, 2], a chunk of rows at a time."""
    wanted = torch.as_tensor(targets.reshape(-1)).long().to(explained.device)
    rows = (reference.flatten(0, 1), explained.flatten(0, 1), wanted)
    parts = [
        torch.stack([kl_nats(p, q), torch.nn.functional.cross_entropy(q.float(), target, reduction="none")], -1)
        for p, q, target in zip(*(r.split(CHUNK_TOKENS) for r in rows), strict=True)
    ]
    return torch.cat(parts).cpu().numpy().reshape(*targets.shape, 2)
