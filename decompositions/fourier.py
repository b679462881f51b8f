r"""Modular addition as an algorithm of its own: the logits are a clock's, read at a few frequencies.

$$\mathrm{logit}(c) = \sum_k a_k \cos\!\left(\frac{2 \pi k}{p} (x + y - c)\right)$$

for the two tokens x, y before the position; p is the number of logits. All that is sent is p, the frequencies k and the
amplitudes a_k; none of the network's weights. Source: Nanda et al. 2023, arXiv:2301.05217, equation (1) and section 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from decompositions.baselines import STATIC_KNOB
from mdl.alphabets import NoAlphabet
from mdl.errors import ExplanationError, MessageError
from mdl.message import QuantisedArray, Section, encode_message
from mdl.protocols import Inputs, Sample, Settings
from mdl.state import NoState, State
from mdl.task import Task
from mdl.units import nats_to_bits

KIND = "fourier"
OPERANDS = 2  # tokens before the position
LARGEST_MODULUS = 1 << 20
MOST = 16  # frequencies that are considered
NEWTON_STEPS, RIDGE = 60, 1e-9
STEPS = tuple(2.0**i for i in range(-6, 7))  # of the amplitudes, times what the settings ask for

__all__ = ["Fourier", "FourierDecoder", "FourierExplanation"]


def clocks(modulus: int, frequencies: np.ndarray) -> np.ndarray:
    """cos(2 pi k j / p) of every frequency k and j = 0 .. p - 1, float64 [K, p]."""
    turns = np.outer(np.asarray(frequencies, np.int64), np.arange(modulus)) % modulus
    return np.asarray(np.cos(2.0 * np.pi / modulus * turns))


def sums(inputs: Inputs, modulus: int) -> tuple[np.ndarray, np.ndarray]:
    """(x + y) mod p at each scored position, int64 [n], and where there are two tokens before it, bool [n]."""
    total, there = np.zeros(inputs.tokens.shape, np.int64), np.zeros(inputs.tokens.shape, bool)
    there[:, OPERANDS:] = True
    for back in range(1, OPERANDS + 1):
        total[:, OPERANDS:] += inputs.tokens[:, OPERANDS - back : inputs.tokens.shape[1] - back]
    return (total % modulus)[inputs.scored], there[inputs.scored]


@dataclass(frozen=True)
class FourierDecoder:
    """`frequencies` [K], increasing, from 1 to p // 2; `amplitudes` [K]."""

    modulus: int
    frequencies: np.ndarray
    amplitudes: np.ndarray

    @classmethod
    def from_section(cls, section: Section) -> FourierDecoder:
        """Header: p [1, 1], increments of the frequencies [1, K], amplitudes [1, K].

        **Raises:** `MessageError` for other arrays, or for frequencies beyond p // 2, which repeat earlier ones.
        """
        if len(section.header) != 3 or section.parts:
            raise MessageError("a 'fourier' section is a modulus, frequencies and amplitudes, and has no parts")
        modulus, frequencies = read_frequencies(section, KIND)
        amplitudes = section.header[2].vector("the amplitudes of a 'fourier' section")
        if len(amplitudes) != len(frequencies):
            raise MessageError(f"'fourier': {len(amplitudes)} amplitudes for {len(frequencies)} frequencies")
        return cls(modulus, frequencies, amplitudes)

    @property
    def alphabet(self) -> NoAlphabet:
        return NoAlphabet()

    def predict(self, inputs: Inputs, state: State) -> np.ndarray:
        """Logits [n, p], float32; zeros where fewer than two tokens come before.

        **Raises:** `MessageError` for a region of another number of logits.
        """
        config = getattr(inputs.network, "config", None)
        if config is not None and config.n_logits != self.modulus:
            raise MessageError(f"'fourier': modulo {self.modulus} for a region of {config.n_logits} logits")
        clock = self.amplitudes.astype(np.float64) @ clocks(self.modulus, self.frequencies)
        total, there = sums(inputs, self.modulus)
        return np.where(there[:, None], rolled(clock, total), 0.0).astype(np.float32)

    def touched(self, inputs: Inputs, state: State) -> None:
        return None

    def flops_per_token(self, inputs: Inputs, state: State) -> float:
        return 2.0 * len(self.frequencies) * self.modulus


def read_frequencies(section: Section, kind: str) -> tuple[int, np.ndarray]:
    """p and the frequencies, from the first two arrays of a header. **Raises:** `MessageError` for what are none."""
    modulus = section.header[0].integers(f"the modulus of a '{kind}' section", 2, LARGEST_MODULUS, 1)
    columns = section.header[1].symbols.shape[1]
    increments = section.header[1].integers(f"the frequencies of a '{kind}' section", 1, LARGEST_MODULUS, columns)
    if len(modulus) != 1 or len(increments) != 1:
        raise MessageError(f"'{kind}': {len(modulus)} moduli and {len(increments)} rows of frequencies, not one each")
    p, frequencies = int(modulus[0, 0]), np.cumsum(increments[0])
    if len(frequencies) and frequencies[-1] > p // 2:
        raise MessageError(f"'{kind}': a frequency of {frequencies[-1]} turns; modulo {p} there are 1 to {p // 2}")
    return p, frequencies


def written_frequencies(modulus: int, frequencies: np.ndarray) -> tuple[QuantisedArray, QuantisedArray]:
    """The first two arrays of a header: p, and increments of the frequencies, which must increase."""
    increments = np.diff(np.asarray(frequencies, np.int64), prepend=0)
    return QuantisedArray.from_integers(np.array([[modulus]])), QuantisedArray.from_integers(increments[None])


def rolled(clock: np.ndarray, total: np.ndarray) -> np.ndarray:
    """clock[(total - c) mod p] for every c: [p] and [n] -> [n, p]."""
    p = len(clock)
    return np.asarray(clock[(total[:, None] - np.arange(p)) % p])


@dataclass(frozen=True)
class Fourier:
    """A clock at the frequencies that the network itself uses most, or (`select` "kl") at whichever explain it best.

    **Arguments:** `frequencies`: how many; 0: as many as give the shortest total at the settings' N; `select`: "power":
    those of the largest amplitude in the region's own outputs first; "kl": greedily those whose best amplitudes leave
    the smallest KL.
    """

    frequencies: int = 0
    select: Literal["power", "kl"] = "power"

    def fit(self, task: Task) -> FourierExplanation:
        """**Raises:** `ExplanationError` for a region whose outputs are no logits of tokens that came before, for more
        frequencies than there are, and for data without a position that counts behind two tokens."""
        modulus = task.width
        if self.select not in ("power", "kl"):
            raise ExplanationError(f"fourier: no way {self.select!r} to select frequencies: there is power, kl")
        if task.region.output != "logits" or task.region.input != "tokens":
            raise ExplanationError(f"fourier: the region {task.region.name!r} does not go from tokens to logits")
        if not 0 <= self.frequencies <= modulus // 2:
            raise ExplanationError(f"fourier: {self.frequencies} frequencies; modulo {modulus} it has {modulus // 2}")
        fit = task.fit_activations
        aligned = Aligned.of(task.fit, fit.asked[fit.scored])
        most = self.frequencies or min(MOST, modulus // 2)
        order = aligned.by_power()[:most] if self.select == "power" else aligned.by_kl(most)
        counts = (self.frequencies,) if self.frequencies else tuple(range(1, most + 1))
        name = f"{self.frequencies or 'some'} frequencies" + ("" if self.select == "power" else " (chosen by KL)")
        return FourierExplanation(f"clock of {name}", aligned, order, counts)


@dataclass(frozen=True, eq=False)
class Aligned:
    """The region's own outputs with each answer turned to c = x + y - j, averaged over positions.

    **Arguments:** `distribution` [p], `logits` [p]: means, by j; `own`: mean of sum p ln p, nats; `share`: of the
    scored tokens, those that count here.
    """

    distribution: np.ndarray
    logits: np.ndarray
    own: float
    share: float

    @classmethod
    def of(cls, sample: Sample, asked: np.ndarray) -> Aligned:
        """From a sample and, bool [n], where predictions are asked for.

        **Raises:** `ExplanationError` where none of these positions has two tokens before it.
        """
        outputs = np.asarray(sample.outputs, np.float64)
        p = outputs.shape[1]
        total, there = sums(sample.inputs, p)
        there &= asked
        if not there.any():
            raise ExplanationError("fourier: no position that counts has two tokens before it, which are to be added")
        logits = np.take_along_axis(outputs[there], (total[there, None] - np.arange(p)) % p, 1)
        logs = logits - logits.max(1, keepdims=True)
        logs -= np.log(np.exp(logs).sum(1, keepdims=True))
        own = float((np.exp(logs) * logs).sum(1).mean())
        return cls(np.exp(logs).mean(0), logits.mean(0), own, float(there.mean()))

    @property
    def modulus(self) -> int:
        return len(self.logits)

    def amplitudes(self, frequencies: np.ndarray) -> np.ndarray:
        """Least squares: 2/p times the inner product with each clock (p odd)."""
        return np.asarray(clocks(self.modulus, frequencies) @ self.logits * 2.0 / self.modulus)

    def by_power(self) -> np.ndarray:
        """All frequencies, those of the largest amplitude first."""
        every = np.arange(1, self.modulus // 2 + 1)
        return np.asarray(every[np.argsort(-np.abs(self.amplitudes(every)), kind="stable")])

    def by_kl(self, most: int) -> np.ndarray:
        """Greedily, those first that leave the smallest KL."""
        found: list[int] = []
        for _ in range(most):
            left = [k for k in range(1, self.modulus // 2 + 1) if k not in found]
            kls = [self.kl(np.array([*found, k]), self.fitted(np.array([*found, k]))) for k in left]
            found.append(left[int(np.argmin(kls))])
        return np.array(found)

    def kl(self, frequencies: np.ndarray, amplitudes: np.ndarray) -> float:
        """Mean KL(M || M_E) of these clocks, in nats a position that has two tokens before it."""
        return self.own - float(self.distribution @ _log_softmax(amplitudes @ clocks(self.modulus, frequencies)))

    def fitted(self, frequencies: np.ndarray) -> np.ndarray:
        """The amplitudes of least KL: a convex problem, by Newton's method from the least squares."""
        basis, now = clocks(self.modulus, frequencies), self.amplitudes(frequencies)
        best = self.kl(frequencies, now)
        for _ in range(NEWTON_STEPS):
            q = np.exp(_log_softmax(now @ basis))
            gradient, mean = basis @ (q - self.distribution), basis @ q
            hessian = (basis * q) @ basis.T - np.outer(mean, mean)
            hessian += RIDGE * max(float(np.trace(hessian)) / len(hessian), 1e-12) * np.eye(len(hessian))
            move, size = np.linalg.solve(hessian, gradient), 1.0
            while size > 1e-6 and self.kl(frequencies, now - size * move) > best:
                size /= 2.0
            after = self.kl(frequencies, now - size * move)
            if not after < best:
                return now
            now, gain, best = now - size * move, best - after, after
            if gain < 1e-12:
                return now
        return now


def _log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


@dataclass(frozen=True)
class FourierExplanation:
    """`order`: frequencies, the first of them first; `counts`: how many of them may be sent."""

    name: str
    aligned: Aligned
    order: np.ndarray
    counts: tuple[int, ...]
    kind: str = KIND

    @property
    def knobs(self) -> Mapping[str, Sequence[float]]:
        return {"static": STATIC_KNOB}

    def section(self, settings: Settings) -> Section:
        """Of every count (and, where nothing mends the prediction, step) the one with the least total on fit data.

        The KL of what the receiver gets is worked out for each, so that nothing about it is estimated but that other
        data are like these.
        """
        scales = (1.0,) if settings.corrected else STEPS
        choices = [self._section(settings, count, scale) for count in self.counts for scale in scales]
        return min(choices, key=lambda found: self._total(found, settings))

    def _section(self, settings: Settings, count: int, scale: float) -> Section:
        chosen = np.sort(self.order[:count])
        amplitudes = self.aligned.fitted(chosen)
        energy = self._energy(settings.root, chosen)
        steps = scale * float(settings.metric_step(energy))
        sent = QuantisedArray.from_values(amplitudes[None], steps)
        return Section(KIND, (*written_frequencies(self.aligned.modulus, chosen), sent))

    def _energy(self, root: np.ndarray, frequencies: np.ndarray) -> float:
        """Mean square of a clock in the metric, over all turns of it, and over the clocks."""
        moment = root.T @ root
        rows = clocks(self.aligned.modulus, frequencies)
        turned = (rolled(row, np.arange(self.aligned.modulus)) for row in rows)
        return float(np.mean([np.einsum("nc,cd,nd->", t, moment, t) / len(t) for t in turned])) * self.aligned.share

    def _total(self, section: Section, settings: Settings) -> float:
        """Bits at the settings' N, in front of no coder."""
        decoder = FourierDecoder.from_section(section)
        kl = nats_to_bits(self.aligned.kl(decoder.frequencies, decoder.amplitudes.astype(np.float64)))
        static = encode_message([section]).whole_bits
        return float(static + settings.horizon * self.aligned.share * float(kl))

    def encode(self, decoder: FourierDecoder, sample: Sample, settings: Settings) -> NoState:
        return NoState(sample.inputs.n_tokens)
