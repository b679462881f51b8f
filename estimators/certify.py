r"""The residual, certified: M's own samples, really coded under M_E and under M, differ in length by the KL reported.

$$\frac{1}{n} (\ell_{M_E}(y) - \ell_M(y)) \approx \frac{1}{n} \sum_t KL_t, \quad y_t \sim M(\cdot | x_{\le t})$$

with l the length of a stream that was written and decoded. The contexts are the data's; what is sampled, and where, is
drawn from a seed that is a hash of the message, so that it cannot be known before the message is frozen.

Sources: Shannon 1948 (a code's excess length is the KL); Salmon et al. 2011 (Philox, a counter-based generator).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from estimators.fidelity import Attempt, Bench, Split
from estimators.kernels import CHUNK_TOKENS, RegionEvaluator, batches
from mdl.codes.bitstream import BitReader, BitWriter
from mdl.codes.tokens import STREAM_SPREAD_BITS, TokenCode
from mdl.errors import CodeError, DataError, TaskError
from mdl.ledger import ratio_stderr
from mdl.receiver import Receiver
from mdl.task import Activations
from mdl.units import nats_to_bits

AUDIT_SEQUENCES = 8
AUDIT_DRAWS = 32  # samples at each position: they cost little beside the predictions, and divide the variance
STANDARD_ERRORS = 4.0
CHUNK_LOGITS = 1 << 22  # float64 numbers held at once, a few arrays of them

_CHOICE = 0  # the generator's stream that chooses sequences; sequence s is sampled with stream 1 + s


def audit_seed(message: bytes, *others: bytes) -> int:
    """The audit's seed: the first 8 bytes of the SHA-256 of the frozen message, big-endian.

    `others` (state streams, a verifier's own nonce) are hashed in, one after the other.
    """
    digest = hashlib.sha256(message).digest()
    for other in others:
        digest = hashlib.sha256(digest + hashlib.sha256(other).digest()).digest()
    return int.from_bytes(digest[:8], "big")


@dataclass(frozen=True)
class Certificate:
    """What coding M's samples under both models found. Bits; rates are bits a sampled token.

    **Arguments:** `sequences`: those audited, by their number in the split; `tokens`: scored positions in them;
    `draws`: samples at each; `explained_bits`, `model_bits`: 8 * len of the streams under M_E and under M; `kl_bits`:
    reported mean KL of the same positions; `stderr`: of difference - KL, exact given the contexts, from both models'
    predictions (draws at different positions are independent); `stderr_by_token`, `stderr_by_sequence`: the same from
    the scatter of what was found, with position or document as the unit; `tolerance`: the coder's.
    """

    seed: int
    sequences: tuple[int, ...]
    tokens: int
    draws: int
    explained_bits: int
    model_bits: int
    kl_bits: float
    stderr: float
    stderr_by_token: float
    stderr_by_sequence: float
    tolerance: float

    @property
    def difference(self) -> float:
        """Coded bits under M_E less those under M, a sampled token."""
        return (self.explained_bits - self.model_bits) / (self.tokens * self.draws)

    @property
    def z(self) -> float:
        """Difference less reported KL, in standard errors."""
        gap = self.difference - self.kl_bits
        return gap / self.stderr if self.stderr else math.copysign(math.inf, gap) if gap else 0.0

    @property
    def agrees(self) -> bool:
        """|difference - KL| <= 4 standard errors + tolerance."""
        return abs(self.difference - self.kl_bits) <= STANDARD_ERRORS * self.stderr + self.tolerance


@dataclass(frozen=True)
class _Sent:
    """The streams under M and under M_E, the samples, and a few figures of each position.

    `excess` [n]: bits under M_E less bits under M, mean of the draws; `variance` [n]: of one draw's log-ratio, bits^2;
    `tolerance`: what the coder may add to or take from the difference, bits a sampled token: leak, floors, ends.
    """

    streams: tuple[bytes, bytes]
    samples: tuple[np.ndarray, ...]
    excess: np.ndarray
    variance: np.ndarray
    tolerance: float


@dataclass(frozen=True)
class _Audit:
    """The audited sequences alone: what M and M_E make of them, and how to draw."""

    evaluator: RegionEvaluator
    activations: Activations
    reference: np.ndarray
    explained: np.ndarray
    sequences: np.ndarray
    seed: int
    draws: int

    def predictions(self) -> Iterator[tuple[slice, list[np.ndarray]]]:
        """The logits of M and of M_E at the scored positions of some of the sequences at a time."""
        for some in batches(self.activations, CHUNK_TOKENS):
            part = self.activations.some(some)
            both = [self.evaluator.logits(part, v) for v in (self.reference[some], self.explained[some])]
            if not all(np.isfinite(logits).all() for logits in both):
                raise DataError(
                    f"logits of sequences {self.sequences[some]} are NaN or infinite: nothing can be sampled from them"
                )
            yield some, both

    def uniform(self, some: slice) -> np.ndarray:
        """Numbers in [0, 1) to draw with, [n, draws]; a sequence's own, whatever else is audited."""
        counts = self.activations.scored[some].sum(1)
        parts = [
            _uniform(self.seed, 1 + int(s), int(n) * self.draws)
            for s, n in zip(self.sequences[some], counts, strict=True)
        ]
        return np.concatenate(parts).reshape(-1, self.draws)

    def send(self) -> _Sent:
        """Draw, and code what was drawn."""
        writers, samples, figures = (BitWriter(), BitWriter()), [], []
        for some, both in self.predictions():
            uniform = self.uniform(some)
            for rows in _chunks(both[0].shape):
                chunk = [logits[rows] for logits in both]
                logs = [_log_softmax(logits) for logits in chunk]
                p = np.exp(logs[0])
                samples.append(_sample(p, uniform[rows]))
                figures.append(_write(writers, chunk, samples[-1], p, nats_to_bits(logs[0] - logs[1]), logs[1]))
        excess, variance, shortfall = np.concatenate(figures, 1)
        ends = STREAM_SPREAD_BITS / (excess.size * self.draws)
        code = TokenCode(both[0].shape[1])
        tolerance = code.tolerance_bits + max(float(shortfall.mean()), code.own_shortfall_bits) + ends
        streams = (writers[0].to_bytes(), writers[1].to_bytes())
        return _Sent(streams, tuple(samples), excess, variance, tolerance)

    def receive(self, streams: tuple[bytes, bytes]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Both streams decoded, under predictions computed anew."""
        readers, found = [BitReader(data) for data in streams], []
        for _, both in self.predictions():
            code = TokenCode(both[0].shape[1])
            for rows in _chunks(both[0].shape):
                first, second = (
                    code.rows(logits[rows]).read(reader, self.draws)
                    for reader, logits in zip(readers, both, strict=True)
                )
                found.append((first, second))
        for reader in readers:
            reader.finish()
        return found


def certify(
    evaluator: RegionEvaluator,
    activations: Activations,
    reference: np.ndarray,
    explained: np.ndarray,
    kl_bits: Float[np.ndarray, " n"],
    seed: int,
    *,
    sequences: int = AUDIT_SEQUENCES,
    draws: int = AUDIT_DRAWS,
) -> Certificate:
    """Sample from M, code under M_E and under M, decode, and compare the difference with the reported KL.

    **Arguments:** `reference`, `explained` [sequences, positions, d]: what `evaluator.reference` gives for M, and for
    activations whose outputs are M_E's (see `explained_reference`); `kl_bits` [n]: reported KL, all scored positions;
    `seed`: from `audit_seed`; `sequences`: how many to audit (all, if there are fewer); `draws`: samples at each of
    their scored positions.

    **Raises:** `TaskError` for arguments that do not fit together, `DataError` for predictions that are not finite,
    `CodeError` if a stream does not decode to what was sampled: then the predictions did not come out the same twice.
    """
    _check(activations, (reference, explained), kl_bits, sequences, draws)
    chosen = _audited(seed, activations, sequences)
    kl_bits = kl_bits[activations.asked[activations.scored]]
    activations = replace(activations, scored=activations.asked)
    part = activations.some(chosen)
    audit = _Audit(evaluator, part, reference[chosen], explained[chosen], chosen, seed, draws)
    sent = audit.send()
    for samples, (first, second) in zip(sent.samples, audit.receive(sent.streams), strict=True):
        if not (np.array_equal(samples, first) and np.array_equal(samples, second)):
            raise CodeError(
                f"{samples.size} tokens did not decode to what was sampled: the model's predictions differ between two "
                "runs on the same data, so nothing coded under them can be read. Run it deterministically."
            )
    reported = kl_bits[np.isin(_owners(activations), chosen)]
    n = part.n_tokens
    gaps, units = sent.excess - reported, np.unique(part.groups[_owners(part)], return_inverse=True)[1]
    return Certificate(
        seed=seed,
        sequences=tuple(int(s) for s in chosen),
        tokens=n,
        draws=draws,
        explained_bits=8 * len(sent.streams[1]),
        model_bits=8 * len(sent.streams[0]),
        kl_bits=float(reported.mean()),
        stderr=math.sqrt(float(sent.variance.sum()) / draws) / n,
        stderr_by_token=ratio_stderr(gaps, np.ones(n)),
        stderr_by_sequence=ratio_stderr(np.bincount(units, gaps), np.bincount(units).astype(np.float64)),
        tolerance=sent.tolerance,
    )


def certify_attempt(
    bench: Bench,
    split: Split,
    attempt: Attempt,
    *,
    sequences: int = AUDIT_SEQUENCES,
    draws: int = AUDIT_DRAWS,
    nonce: bytes = b"",
) -> Certificate:
    """`certify` for an explanation as the receiver has it: rebuilt from the message's bytes, the seed their hash.

    `nonce`: a verifier's own, drawn after the message was frozen, against messages that were tried until one was lucky.
    """
    others = (nonce,) if nonce else ()
    seed = audit_seed(attempt.message.data, *others)
    activations, reference = split.activations, split.reference
    chosen = _audited(seed, activations, sequences)
    explained = np.full_like(reference, np.nan)  # only what is audited is computed
    values = reconstruction(bench, split, attempt)[chosen]
    explained[chosen] = explained_reference(bench.evaluator, activations.some(chosen), values)
    kl_bits = np.asarray(attempt.damage.kl_bits, np.float64)
    return certify(bench.evaluator, activations, reference, explained, kl_bits, seed, sequences=sequences, draws=draws)


def explained_reference(evaluator: RegionEvaluator, activations: Activations, values: np.ndarray) -> np.ndarray:
    """What `evaluator.reference` gives with `values` [sequences, positions, d] in the place of the region's outputs."""
    return evaluator.reference(replace(activations, outputs=values))


def reconstruction(bench: Bench, split: Split, attempt: Attempt) -> np.ndarray:
    """The region's outputs as the receiver rebuilds them, constants at special positions, [sequences, positions, d]."""
    receiver = Receiver.of(attempt.message.data)
    received = receiver.reconstruct(split.sample.inputs, attempt.state, attempt.residual)
    constants = dict(zip(bench.special[0], receiver.special, strict=True))
    return split.activations.filled(received.values, constants)


def _check(
    activations: Activations, both: tuple[np.ndarray, np.ndarray], kl_bits: np.ndarray, sequences: int, draws: int
) -> None:
    if len({a.shape[:2] for a in (*both, activations.tokens)}) > 1 or len(kl_bits) != activations.n_tokens:
        raise TaskError(
            f"an audit of states of shapes {both[0].shape}, {both[1].shape} and {len(kl_bits)} KLs, where tokens are "
            f"{activations.tokens.shape} and {activations.n_tokens} positions are scored: they are of other data"
        )
    if sequences < 1 or draws < 1:
        raise TaskError(f"an audit of {sequences} sequences with {draws} draws a position: both must be at least 1")


def _raw(seed: int, stream: int, count: int) -> np.ndarray:
    """64-bit words of one of the seed's streams; NumPy keeps a bit generator's own output the same for ever."""
    words: Any = np.random.Philox(key=np.array([seed, stream], np.uint64)).random_raw(count)
    return np.asarray(words, np.uint64)


def _uniform(seed: int, stream: int, count: int) -> np.ndarray:
    """Multiples of 2^-53 in [0, 1)."""
    return (_raw(seed, stream, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _audited(seed: int, activations: Activations, wanted: int) -> np.ndarray:
    """Numbers of `wanted` of the sequences in which predictions are asked for (or all), ascending."""
    available = np.flatnonzero(activations.asked.any(1))
    return np.asarray(available[_choose(seed, len(available), wanted)])


def _choose(seed: int, available: int, wanted: int) -> np.ndarray:
    """Numbers of `wanted` of so many (or all), ascending."""
    return np.sort(np.argsort(_raw(seed, _CHOICE, available), kind="stable")[:wanted])


def _owners(activations: Activations) -> np.ndarray:
    """The sequence of each scored position, in stream order."""
    return np.nonzero(activations.scored)[0]


def _chunks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of rows of `shape` [rows, v] of about CHUNK_LOGITS numbers each."""
    size = max(1, CHUNK_LOGITS // shape[1])
    return (slice(start, start + size) for start in range(0, shape[0], size))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities of rows of logits, nats, float64."""
    shifted = logits - logits.max(1, keepdims=True).astype(np.float64)
    shifted -= np.log(np.exp(shifted).sum(1, keepdims=True))
    return shifted


def _sample(
    probabilities: Float[np.ndarray, "n v"], uniform: Float[np.ndarray, "n draws"]
) -> Int[np.ndarray, "n draws"]:
    """Draws from each row, by inverting its distribution function in float64; ids of probability 0 never come."""
    cumulative = np.cumsum(probabilities, 1)
    totals = cumulative[:, -1:]
    wanted = np.minimum(uniform * totals, np.nextafter(totals, 0.0))
    found = np.empty(uniform.shape, np.int64)
    for row, places in enumerate(wanted):
        found[row] = np.searchsorted(cumulative[row], places, side="right")
    return found


def _write(
    writers: tuple[BitWriter, BitWriter],
    both: list[np.ndarray],
    samples: np.ndarray,
    p: np.ndarray,
    ratio: np.ndarray,
    log_q: np.ndarray,
) -> np.ndarray:
    """Code the samples of some rows under M and under M_E; `ratio`: log2 p/q.

    **Returns:** excess, variance of a draw's log-ratio, and shortfall of each position, [3, n].
    """
    coded = [TokenCode(logits.shape[1]).rows(logits) for logits in both]
    for writer, one in zip(writers, coded, strict=True):
        one.write(writer, samples)
    excess = (coded[1].bits(samples) - coded[0].bits(samples)).mean(1)
    weighted = p * ratio
    variance = np.einsum("nv,nv->n", weighted, ratio) - weighted.sum(1) ** 2
    return np.stack([excess, np.maximum(variance, 0.0), coded[1].shortfall_bits(p, log_q)])
