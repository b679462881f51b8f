"""Small sae-lens SAEs with weights that are all non-zero, a task for them, and what a receiver makes of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from sae_lens.registry import get_sae_class
from sae_lens.saes.sae import SAEMetadata

from mdl.message import decode_message, encode_message
from mdl.protocols import Inputs, Sample, Settings
from mdl.receiver import decoder_of

D_IN, D_SAE, TOKENS = 16, 64, 120
SITE = "blocks.1.hook_resid_pre"
METADATA = {"hook_name": SITE, "model_name": "tiny"}


def randomise(sae: Any, seed: int = 0) -> Any:
    """Weights, biases and thresholds that are all non-zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name == "threshold":
                parameter.copy_(0.2 + 0.3 * torch.rand(parameter.shape, generator=generator))
            elif name.startswith("W"):
                # rows of different norms, so that rescaling by them matters
                scale = 0.25 + 0.5 * torch.rand((len(parameter), 1), generator=generator)
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    if hasattr(sae, "topk_threshold"):
        sae.topk_threshold.fill_(1.0)
    if sae.cfg.architecture() == "matching_pursuit":
        sae.W_dec.data /= sae.W_dec.data.norm(dim=1, keepdim=True)
    return sae


def make(architecture: str = "standard", *, metadata: dict[str, Any] | None = None, **options: Any) -> Any:
    """A random SAE; what follows a space in `architecture` only names the case."""
    sae_class, config_class = get_sae_class(architecture.split()[0])
    kept = SAEMetadata(**(METADATA if metadata is None else metadata))
    sizes = {"d_in": D_IN, "d_sae": D_SAE, **options}
    return randomise(sae_class(config_class(metadata=kept, **sizes)))


def outputs_of(width: int = D_IN, tokens: int = TOKENS) -> np.ndarray:
    rng = np.random.default_rng(5)
    return (rng.normal(size=(tokens, width)) * rng.uniform(0.5, 2, (tokens, 1)) + 0.2).astype(np.float32)


def task_of(outputs: np.ndarray, site: str = SITE) -> Any:
    """One sequence without special tokens, and no model behind it."""
    tokens = np.zeros((1, len(outputs)), np.int32)
    sample = Sample(Inputs(tokens, np.ones_like(tokens, bool)), outputs)
    model = SimpleNamespace(name="tiny")
    region = SimpleNamespace(output=site, input="tokens", name=f"upstream of {site}")
    return SimpleNamespace(fit=sample, width=outputs.shape[1], region=region, model=model)


def through_message(explanation: Any, task: Any, step: float = 3e-3) -> tuple[np.ndarray, Any]:
    """What the receiver predicts from the bytes and the state symbols, at fine steps."""
    settings = Settings(25.0, step, np.eye(task.width))
    (section,) = decode_message(encode_message([explanation.section(settings)]).data)
    decoder = decoder_of(section)
    state = explanation.encode(decoder, task.fit, settings)
    return decoder.predict(task.fit.inputs, state), state


@torch.no_grad()
def forward(sae: Any, values: np.ndarray) -> np.ndarray:
    """sae-lens's own output."""
    return sae(torch.from_numpy(values)).numpy()
