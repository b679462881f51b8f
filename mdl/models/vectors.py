"""Rows of numbers in the place of a model: outputs at a tolerance, where there is no next-token distribution.

The output distribution is Gaussian, N(row, sigma^2 I), so that an error e of the explained output costs exactly

    KL(M || M_E) = |e|^2 / (2 sigma^2 ln 2) bits

(Kullback and Leibler 1951, section 9). A fidelity is a fraction of the null's KL, hence the fraction of variance about
the fit data's mean that may stay unexplained; sigma cancels there and is 1, in the rows' own unit. The Fisher metric is
the identity. Every row is one sequence of one position with the constant token id 0: rows have no order, no context and
no next token.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from mdl.errors import ModelError
from mdl.models.sites import check_site

VECTORS = "vectors"  # the one site, and the one region


@dataclass(frozen=True, eq=False)
class Vectors:
    """Rows [n, d], float32. Made by `of` or `load`, which refuse what is no such array."""

    rows: np.ndarray
    name: str = VECTORS
    tokenizer: None = None

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
    def outside(cls, width: int) -> Vectors:
        """What a receiver holds of rows of some width: no row."""
        return cls(np.zeros((0, width), np.float32))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of shape and bytes."""
        return hashlib.sha256(f"vectors {self.rows.shape}\n".encode() + self.rows.tobytes()).hexdigest()

    @property
    def n_parameters(self) -> int:
        """There is nothing but data."""
        return 0

    @cached_property
    def first_equal(self) -> np.ndarray:
        """For each row the number of the first row equal to it, int32 [n]."""
        _, first, inverse = np.unique(self.rows, axis=0, return_index=True, return_inverse=True)
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
