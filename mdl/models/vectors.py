"""Rows of numbers in the place of a model: outputs at a tolerance, where there is no next-token distribution.

The output distribution is Gaussian, N(row, sigma^2 I), so that an error e of the explained output costs exactly

    KL(M || M_E) = |e|^2 / (2 sigma^2 ln 2) bits

(Kullback and Leibler 1951, section 9). A fidelity is a fraction of the null's KL, hence the fraction of variance about
the fit data's mean that may stay unexplained; sigma cancels there and is 1, in the rows' own unit. The Fisher metric is
the identity. Every row is one sequence of one position with the constant token id 0: rows have no order, no context and
no next token.

Rows may be the outputs of a network whose inputs the receiver has (`inputs`, `network`; `mdl.models.toys`): then an
explanation maps inputs to outputs, and may describe the network's weights. With `likelihood` "categorical" the outputs
are logits of a label, and KL is that of its distribution.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from mdl.errors import ModelError
from mdl.models.networks import Network
from mdl.models.sites import check_site

LIKELIHOODS = ("gaussian", "categorical")
BATCH = 4096  # inputs at once
VECTORS = "vectors"  # the one site, and the one region


@dataclass(frozen=True, eq=False)
class Vectors:
    """Rows [n, d], float32. Made by `of`, `load` or `computed`, which refuse what is no such array.

    **Arguments:** `inputs` [n, d_in]: what each row was computed from, which the receiver has, or None; `network` and
    `weights`: by which; `likelihood`: of LIKELIHOODS.
    """

    rows: np.ndarray
    name: str = VECTORS
    tokenizer: None = None
    inputs: np.ndarray | None = None
    network: Network | None = None
    weights: Mapping[str, np.ndarray] | None = None
    likelihood: str = "gaussian"

    @classmethod
    def of(cls, array: np.ndarray, name: str = VECTORS) -> Vectors:
        """A read-only float32 copy. **Raises:** `ModelError` unless it is [n, d] of finite numbers, not empty."""
        if array.ndim != 2 or array.size == 0 or array.dtype.kind not in "fiub":
            raise ModelError(
                f"{name}: a {array.dtype} array of shape {array.shape} is given; expected rows of numbers [n, d]. "
                "Flatten images: images.reshape(len(images), -1)."
            )
        rows = np.array(array, np.float32, order="C")
        if bad := int((~np.isfinite(rows)).sum()):
            raise ModelError(f"{name}: {bad} of {rows.size} numbers are NaN or infinite in float32")
        rows.setflags(write=False)
        return cls(rows, name)

    @classmethod
    def load(cls, path: Path) -> Vectors:
        """Read an .npy file. **Raises:** `ModelError` if it is not one, or holds no rows."""
        try:
            array = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ModelError(f"{path} is not a readable .npy array ({error})") from error
        if not isinstance(array, np.ndarray):
            raise ModelError(f"{path} is an archive of arrays; expected one .npy array of rows [n, d]")
        return cls.of(array, path.stem)

    @classmethod
    def computed(
        cls,
        network: Network,
        weights: Mapping[str, np.ndarray],
        inputs: np.ndarray,
        name: str,
        likelihood: str = "gaussian",
    ) -> Vectors:
        """The outputs of a network on inputs [n, d_in]. **Raises:** `ModelError` for what is no such array."""
        if likelihood not in LIKELIHOODS:
            raise ModelError(f"{name}: no likelihood {likelihood!r}; there is {', '.join(LIKELIHOODS)}")
        given = cls.of(inputs, f"{name}'s inputs").rows
        found = []
        for start in range(0, len(given), BATCH):
            rows = jnp.asarray(given[start : start + BATCH, None])
            on_device = {key: jnp.asarray(weight) for key, weight in weights.items()}
            found.append(np.asarray(network.run(on_device, rows, jnp.zeros(rows.shape[:2], jnp.int32)))[:, 0])
        own = {key: np.array(weight, np.float32) for key, weight in weights.items()}
        made = cls.of(np.concatenate(found), name)
        return replace(made, inputs=given, network=network, weights=own, likelihood=likelihood)

    @classmethod
    def outside(cls, width: int) -> Vectors:
        """What a receiver holds of rows of some width: no row."""
        return cls(np.zeros((0, width), np.float32))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of shape and bytes, of what the rows were computed from too."""
        digest = hashlib.sha256(f"vectors {self.rows.shape}\n".encode() + self.rows.tobytes())
        if self.inputs is not None:
            digest.update(f"{self.likelihood} of inputs {self.inputs.shape}\n".encode() + self.inputs.tobytes())
        for key, weight in sorted((self.weights or {}).items()):
            digest.update(f"{key} {weight.shape}\n".encode() + weight.tobytes())
        return digest.hexdigest()

    @property
    def n_parameters(self) -> int:
        """Of the network, if there is one; else there is nothing but data."""
        return sum(w.size for w in (self.weights or {}).values())

    @cached_property
    def first_equal(self) -> np.ndarray:
        """For each row the number of the first row equal to it, int32 [n]; where there are inputs, of these."""
        compared = self.rows if self.inputs is None else self.inputs
        _, first, inverse = np.unique(compared, axis=0, return_index=True, return_inverse=True)
        return first[inverse.reshape(-1)].astype(np.int32)

    def sites(self) -> tuple[str, ...]:
        return (VECTORS,)

    def check_site(self, name: str) -> None:
        """**Raises:** `ModelError` for any site but the one."""
        check_site(name, self.sites())

    def site_width(self, name: str) -> int:
        """Numbers a row."""
        self.check_site(name)
        return int(self.rows.shape[1])
