"""What a sender says of a score, and what a receiver decoded for it: all that the accounting needs.

The sender's own process and a receiver's fresh one both produce a transcript, so that a score is worked out by the
same lines whether it is claimed or verified.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import scipy.sparse

from estimators.prices import coded, independent
from estimators.published.figures import Terms
from mdl.ledger import Score
from mdl.receiver import Reconstruction, Streams
from mdl.state import StreamLength
from mdl.streams import Coded


@dataclass(frozen=True)
class Claim:
    """What the sender says of a score beside its bits: what it explains, and how its settings were found."""

    explanation: str
    phenomenon: str
    fidelity: float | None
    horizon: float
    evaluations: int
    slope: float = 0.0
    notes: tuple[str, ...] = ()
    settings: Mapping[str, float | str] = field(default_factory=dict)

    @classmethod
    def of(cls, score: Score) -> Claim:
        """What a saved score claims beside its bits."""
        return cls(*(getattr(score, f.name) for f in fields(cls)))


@dataclass(frozen=True)
class Transcript:
    """Sizes and symbols' lengths of both streams, the parts that tokens need, and what was reconstructed.

    **Arguments:** `stream_bytes`: sizes of the state and the residual stream as files; `state`, `residual`: their exact
    lengths under their codes and the spread over tokens (residual None under behaviour); `l0`: parts on, a token;
    `split`: bits of the state's choices and of its numbers, and of state and residual under the independent codes;
    `prediction`, `values` [n, d]: the explanation's own part, and with the residual coder's correction; `touched`,
    `flops`: as in `mdl.receiver.Reconstruction`; `terms`: the state's symbols as real numbers, where others' formulas
    have something to say of it.
    """

    stream_bytes: tuple[int, int]
    state: StreamLength
    residual: StreamLength | None
    l0: float
    split: tuple[float, float, float, float]
    prediction: np.ndarray
    values: np.ndarray
    touched: tuple[scipy.sparse.csr_array | None, ...]
    flops: float
    terms: Terms | None = None

    @classmethod
    def of(
        cls,
        streams: Streams,
        state: Coded,
        codes: Coded | None,
        received: Reconstruction,
        additive: tuple[scipy.sparse.csr_array, np.ndarray] | None = None,
    ) -> Transcript:
        """From decoded symbols, the codes they came under, their reconstruction, and what `Receiver.terms` says."""
        touched = state.state.touched()
        size, alone = coded(state), independent(state.state)
        corrected = 0.0 if codes is None else codes.state.bits()
        return cls(
            stream_bytes=(len(streams.state), len(streams.residual)),
            state=state.length,
            residual=None if codes is None else codes.length,
            l0=0.0 if touched is None else touched.nnz / state.state.n_tokens,
            split=(size.choices, size.numbers, alone.choices + alone.numbers, corrected),
            prediction=received.prediction,
            values=received.values,
            touched=received.touched,
            flops=received.flops,
            terms=Terms.of(state.state, additive),
        )

    @property
    def n_tokens(self) -> int:
        """Number of tokens n."""
        return len(self.prediction)

    @property
    def learning(self) -> float:
        """Bits a token that adaptive codes spent on learning their tables."""
        return sum(s.learning for s in (self.state, self.residual) if s is not None) / self.n_tokens

    def save(self, path: Path) -> None:
        """Write an .npz of plain arrays."""
        arrays: dict[str, np.ndarray] = {
            "figures": np.array([*self.stream_bytes, self.l0, self.flops], np.float64),
            "split": np.array(self.split, np.float64),
            "prediction": self.prediction,
            "values": self.values,
        }
        for name, length in (("state", self.state), ("residual", self.residual)):
            if length is not None:
                arrays[f"{name}_figures"] = np.array([length.total, length.learning], np.float64)
                arrays[f"{name}_per_token"] = length.per_token
                arrays[f"{name}_code"] = np.frombuffer(length.code.encode(), np.uint8)
        for index, uses in enumerate(self.touched):
            arrays[f"touched_{index}"] = np.zeros(0) if uses is None else np.array(uses.shape)
            if uses is not None:
                csr = scipy.sparse.csr_array(uses)
                arrays[f"touched_{index}_indices"], arrays[f"touched_{index}_indptr"] = csr.indices, csr.indptr
        if self.terms is not None:
            arrays |= _saved_terms(self.terms)
        with path.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> Transcript:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            state_bytes, residual_bytes, l0, flops = arrays["figures"].tolist()
            sections = sum(1 for name in arrays.files if name.startswith("touched_") and name.count("_") == 1)
            return cls(
                stream_bytes=(int(state_bytes), int(residual_bytes)),
                state=_length(arrays, "state"),
                residual=_length(arrays, "residual") if "residual_figures" in arrays.files else None,
                l0=l0,
                split=tuple(arrays["split"].tolist()),
                prediction=arrays["prediction"],
                values=arrays["values"],
                touched=tuple(_uses(arrays, index) for index in range(sections)),
                flops=flops,
                terms=_terms(arrays) if "terms_shape" in arrays.files else None,
            )


def _saved_terms(terms: Terms) -> dict[str, np.ndarray]:
    matrix = terms.coefficients
    parts = {"shape": np.array(matrix.shape), "data": matrix.data, "indices": matrix.indices, "indptr": matrix.indptr}
    rows = {} if terms.rows is None else {"rows": terms.rows}
    return {f"terms_{name}": array for name, array in (parts | rows).items()}


def _terms(arrays: np.lib.npyio.NpzFile) -> Terms:
    data, indices, indptr, shape = (arrays[f"terms_{name}"] for name in ("data", "indices", "indptr", "shape"))
    matrix = scipy.sparse.csr_array((data, indices, indptr), shape=tuple(shape.tolist()))
    return Terms(matrix, arrays["terms_rows"] if "terms_rows" in arrays.files else None)


def _length(arrays: np.lib.npyio.NpzFile, name: str) -> StreamLength:
    total, learning = arrays[f"{name}_figures"].tolist()
    return StreamLength(total, learning, arrays[f"{name}_per_token"], arrays[f"{name}_code"].tobytes().decode())


def _uses(arrays: np.lib.npyio.NpzFile, index: int) -> scipy.sparse.csr_array | None:
    shape = arrays[f"touched_{index}"]
    if not shape.size:
        return None
    indices, indptr = arrays[f"touched_{index}_indices"], arrays[f"touched_{index}_indptr"]
    return scipy.sparse.csr_array((np.ones(len(indices), bool), indices, indptr), shape=tuple(shape.tolist()))
