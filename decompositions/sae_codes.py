"""What sae-lens computes with an SAE: its codes, and the linear map that turns them into a prediction."""

from __future__ import annotations

import numpy as np
import sae_lens
import scipy.sparse
import torch

from decompositions.dictionary import NO_SIDE, token_side
from decompositions.matching_pursuit import pursue
from decompositions.sae_origin import TEMPORAL, side_of
from mdl.errors import ExplanationError

CHUNK_ELEMENTS = 1 << 24  # activations held densely at a time
TOLERANCE = 1e-4  # of the largest output, in float32


def fold_scale(sae: sae_lens.SAE, values: np.ndarray) -> str:
    """Fold in the scale sqrt(d) / mean norm that training used and did not store, measured on fit data as sae-lens
    measures it. Returns the note that says so."""
    factor = float(np.sqrt(sae.cfg.d_in) / np.linalg.norm(values, axis=1).mean())
    sae.fold_activation_norm_scaling_factor(factor)
    return f"expected_average_only_in without a stored factor: {factor:.6g} measured on fit data and folded in"


def decoder_of(sae: sae_lens.SAE) -> tuple[np.ndarray, np.ndarray]:
    """Effective rows [F, d] and bias [d] of `decode`, before any per-token normalisation is undone; float32."""
    atoms, bias = sae.W_dec.detach(), sae.b_dec.detach()
    architecture, config = sae.cfg.architecture(), sae.cfg
    if getattr(config, "rescale_acts_by_decoder_norm", False):
        atoms = atoms / atoms.norm(dim=-1, keepdim=True)
    tied = architecture == "matching_pursuit" or (architecture == TEMPORAL and config.tied_weights)
    if tied and not config.apply_b_dec_to_input:
        bias = torch.zeros_like(bias)
    if config.normalize_activations == "constant_scalar_rescale":
        atoms, bias = atoms / config.activation_normalization_factor, bias / config.activation_normalization_factor
    return atoms.numpy().astype(np.float32), bias.numpy().astype(np.float32)


def skip_of(sae: sae_lens.SAE) -> np.ndarray | None:
    """The matrix [d_in, d_out] of a skip transcoder's second path."""
    skip = getattr(sae, "W_skip", None)
    return None if skip is None else skip.detach().numpy().T.astype(np.float32)


@torch.no_grad()
def encode(sae: sae_lens.SAE, values: np.ndarray) -> scipy.sparse.csr_array:
    """sae-lens's own encoding, sparse float32 [n, F], a bounded number of dense activations at a time."""
    size = max(1, CHUNK_ELEMENTS // sae.cfg.d_sae)
    found = []
    for start in range(0, len(values), size):
        codes = sae.encode(torch.from_numpy(np.ascontiguousarray(values[start : start + size], np.float32)))
        found.append(scipy.sparse.csr_array((codes.to_dense() if codes.is_sparse else codes).numpy()))
    return scipy.sparse.vstack(found, format="csr") if found else scipy.sparse.csr_array((0, sae.cfg.d_sae))


def encode_by_pursuit(
    atoms: np.ndarray, bias: np.ndarray, side: int, k: int, signed: bool, outputs: np.ndarray
) -> scipy.sparse.csr_array:
    """The codes [n, F] that matching pursuit finds for what a dictionary's rows have to make up."""
    if side != NO_SIDE:
        scale, mean = token_side(outputs, side)
        outputs = (outputs - mean[:, None]) / scale[:, None]
    return pursue(atoms, outputs - bias, k, signed)


def mean_active(sae: sae_lens.SAE, values: np.ndarray) -> int:
    """The number of features that the SAE's own encoder has on a token, rounded, at least 1."""
    return max(1, round(encode(sae, values).nnz / max(len(values), 1)))


@torch.no_grad()
def check_forward(sae: sae_lens.SAE, name: str, values: np.ndarray) -> None:
    """Our decoding of the exact codes must be sae-lens's own. **Raises:** `ExplanationError` if it is not."""
    expected = sae(torch.from_numpy(np.ascontiguousarray(values, np.float32))).numpy()
    atoms, bias = decoder_of(sae)
    ours = encode(sae, values) @ atoms + bias
    side, skip = side_of(sae), skip_of(sae)
    if side != NO_SIDE:
        scale, mean = token_side(values, side)
        ours = ours * scale[:, None] + mean[:, None]
    if skip is not None:
        ours = ours + values @ skip
    difference = float(np.abs(ours - expected).max(initial=0.0))
    if not difference <= TOLERANCE * max(float(np.abs(expected).max(initial=0.0)), 1e-6):
        raise ExplanationError(
            f"{name}: decoding differs from sae-lens {sae_lens.__version__}'s own by {difference:.3g} on "
            f"{len(values)} tokens: this version of sae-lens decodes in a way that is not supported here"
        )
