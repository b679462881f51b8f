"""Rows of numbers in the place of a model: outputs at a tolerance, where there is no next-token distribution.

The output distribution is Gaussian, N(row, sigma^2 I), so that an error e of the explained output costs exactly

    KL(M || M_E) = |e|^2 / (2 sigma^2 ln 2) bits

(Kullback and Leibler 1951, section 9). A fidelity is a fraction of the null's KL, hence the fraction of variance about
the fit data's mean that may stay unexplained; sigma cancels there and is 1, in the rows' own unit. The Fisher metric is
the identity. Every row is one sequence of one position with the constant token id 0: rows have no order, no context and
no next token.

Rows may be the outputs of a network whose inputs the receiver has (`inputs`, `network`; `mdl.models.toys`): then an
explanation maps inputs to outputs, and may describe the network's weights. With `likelihood` "categorical" the outputs
are logits of a label, and KL is that of its distribution. Equal inputs are used once (`mdl.data.from_rows`), so that
where inputs are few, as in modular addition, each of them counts alike and once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from mdl.errors import ModelError
from mdl.models.networks import Network
from mdl.models.sites import check_site
from mdl.models.toys.description import described, from_description

LIKELIHOODS = ("gaussian", "categorical")
BATCH = 4096  # inputs at once
VECTORS = "vectors"  # the one site, and the one region
NETWORK_FILE, WEIGHTS_FILE, INPUTS_FILE = "network.json", "weights.safetensors", "inputs.npy"  # of a saved network


@dataclass(frozen=True, eq=False)
class Vectors:
    """Rows [n, d], float32. Made by `of`, `load` or `computed`, which refuse what is no such array.

    **Arguments:** `inputs` [n, d_in]: what each row was computed from, which the receiver has, or None; `network` and
    `weights`: by which; `likelihood`: of LIKELIHOODS; `noise`: sigma, where a tolerance was stated (`tolerating`): then
    there is a behaviour too, N(row, sigma^2 I), whose KL may be left as it is.
    """

    rows: np.ndarray
    name: str = VECTORS
    tokenizer: None = None
    inputs: np.ndarray | None = None
    network: Network | None = None
    weights: Mapping[str, np.ndarray] | None = None
    likelihood: str = "gaussian"
    noise: float | None = None

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
        """Read an .npy file of rows, or the folder of a network that `save` wrote, whose rows are computed anew.

        **Raises:** `ModelError` if it is neither.
        """
        return cls._load_network(path) if path.is_dir() else cls.of(_read_array(path), path.stem)

    @classmethod
    def _load_network(cls, folder: Path) -> Vectors:
        try:
            known = json.loads((folder / NETWORK_FILE).read_text())
            weights = load_file(folder / WEIGHTS_FILE)
            network, name, likelihood, noise = (known[key] for key in ("network", "name", "likelihood", "noise"))
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise ModelError(
                f"{folder} holds no network with its weights and inputs ({error}): expected {NETWORK_FILE}, "
                f"{WEIGHTS_FILE} and {INPUTS_FILE}, as `Vectors.save` writes them"
            ) from error
        inputs = _read_array(folder / INPUTS_FILE)
        return replace(cls.computed(from_description(network), weights, inputs, name, likelihood), noise=noise)

    def save(self, folder: Path) -> None:
        """Write a network's description, weights and inputs to a folder, which `mdl compare --model` takes.

        **Raises:** `ModelError` for rows that come from no network, or from one that has no description.
        """
        if self.network is None or self.inputs is None or self.weights is None:
            raise ModelError(f"{self.name}: rows that come from no network are saved by numpy.save, as an .npy file")
        known: dict[str, Any] = {"network": described(self.network), "name": self.name}
        known |= {"likelihood": self.likelihood, "noise": self.noise}
        folder.mkdir(parents=True, exist_ok=True)
        save_file({key: np.ascontiguousarray(w) for key, w in self.weights.items()}, folder / WEIGHTS_FILE)
        np.save(folder / INPUTS_FILE, self.inputs)
        (folder / NETWORK_FILE).write_text(json.dumps(known, indent=1) + "\n")

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
        own = {key: np.array(weight, np.float32) for key, weight in weights.items()}
        _check_weights(network, own, name)
        on_device = {key: jnp.asarray(weight) for key, weight in own.items()}
        found = []
        for start in range(0, len(given), BATCH):
            rows = jnp.asarray(given[start : start + BATCH, None])
            found.append(np.asarray(network.run(on_device, rows, jnp.zeros(rows.shape[:2], jnp.int32)))[:, 0])
        made = cls.of(np.concatenate(found), name)
        return replace(made, inputs=given, network=network, weights=own, likelihood=likelihood)

    def tolerating(self, tolerance: float) -> Vectors:
        """With noise of which `tolerance` times the rows' total variance is the variance of each number.

        Saying the mean then leaves 1 / (2 tolerance ln 2) bits a row: 72 at 1 %. **Raises:** `ModelError` unless it is
        positive and the outputs are Gaussian.
        """
        if self.likelihood != "gaussian" or not tolerance > 0:
            raise ModelError(
                f"{self.name}: a tolerance of {tolerance:g} for {self.likelihood} outputs; give one above 0"
            )
        return replace(self, noise=float(np.sqrt(tolerance * self.rows.var(0, dtype=np.float64).sum())))

    @property
    def behaves(self) -> bool:
        """Whether the outputs are a distribution of which some KL may be left: a label's, or with noise stated."""
        return self.likelihood == "categorical" or self.noise is not None

    @classmethod
    def outside(
        cls,
        width: int,
        inputs: np.ndarray | None = None,
        network: Network | None = None,
        likelihood: str = "gaussian",
        noise: float | None = None,
    ) -> Vectors:
        """What a receiver holds of rows of some width: no row, no weight; a network's inputs and architecture."""
        rows = np.zeros((0, width), np.float32)
        return cls(rows, inputs=inputs, network=network, likelihood=likelihood, noise=noise)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of shape and bytes, and of noise if there is any; of a network's rows, of all that they are
        computed from instead."""
        digest = hashlib.sha256(f"vectors {self.rows.shape}\n".encode())
        if self.inputs is None:
            digest.update(self.rows.tobytes())
        else:
            digest.update(
                f"{self.likelihood}, {self.network} of {self.inputs.shape}\n".encode() + self.inputs.tobytes()
            )
        for key, weight in sorted((self.weights or {}).items()):
            digest.update(f"{key} {weight.shape}\n".encode() + weight.tobytes())
        if self.noise is not None:
            digest.update(f"noise {self.noise!r}\n".encode())
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


def _read_array(path: Path) -> np.ndarray:
    """An .npy array. **Raises:** `ModelError` if it is none."""
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ModelError(f"{path} is not a readable .npy array ({error})") from error
    if not isinstance(array, np.ndarray):
        raise ModelError(f"{path} is an archive of arrays; expected one .npy array of rows [n, d]")
    return array


def _check_weights(network: Network, weights: Mapping[str, np.ndarray], name: str) -> None:
    """**Raises:** `ModelError` unless the weights are the network's, in its shapes, and finite."""
    vectors = {key: (size,) for key, size in network.vectors.items()}
    wanted: dict[str, tuple[int, ...]] = {**network.matrices, **network.tables, **vectors}
    found = {key: weight.shape for key, weight in weights.items()}
    if wrong := sorted(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k)):
        some = "; ".join(f"{k}: expected {wanted.get(k)}, found {found.get(k)}" for k in wrong[:3])
        raise ModelError(f"{name}: {len(wrong)} weights do not fit {network}: {some}")
    if bad := sorted(key for key, weight in weights.items() if not np.isfinite(weight).all()):
        raise ModelError(f"{name}: weights that are NaN or infinite: {', '.join(bad)}")
