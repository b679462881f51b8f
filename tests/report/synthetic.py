"""A synthetic scorecard of plausible size: ten explanations, three fidelities and behaviour, no model behind it."""

from __future__ import annotations

import numpy as np

from mdl.ledger import Comparison, Entry, Interval, Score, Scorecard, StaticCurve

SEQUENCES, TOKENS = 40, 127
FIDELITIES = (0.1, 0.01, 0.001)
NULL_KL = 5.6

# name: static kbit, kbit at N = 1, state and residual bits a token at 10 %, 1 % and 0.1 %, L0, explained variance
MADE_UP = {
    "nothing": (9.1, 6.0, (0.0, 0.0, 0.0), (93.5, 156.9, 221.9), 0.0, 0.0),
    "table": (310.0, 7.5, (0.0, 0.0, 0.0), (39.0, 90.8, 153.7), 0.0, 0.55),
    "affine": (61.0, 61.0, (0.0, 0.0, 0.0), (47.0, 98.1, 160.9), 0.0, 0.49),
    "pca(rank=16)": (14.2, 13.9, (55.0, 80.0, 96.0), (41.2, 78.8, 127.0), 16.0, 0.81),
    "clusters(k=256)": (171.0, 7.1, (6.9, 6.9, 6.9), (52.3, 108.0, 169.0), 1.0, 0.52),
    "random(n=1024, k=8)": (402.0, 11.9, (71.0, 82.0, 90.0), (44.0, 92.0, 149.0), 8.0, 0.61),
    "sae topk 4x": (188.0, 9.5, (58.0, 66.0, 75.0), (8.4, 36.5, 85.0), 8.0, 0.86),
    "sae topk 16x": (655.0, 10.2, (62.1, 70.0, 81.0), (4.1, 29.9, 77.0), 8.0, 0.89),
    "sae jumprelu 16x": (611.0, 10.9, (66.0, 73.0, 82.0), (6.0, 33.0, 80.4), 11.3, 0.88),
    "sae standard 16x": (644.0, 12.0, (79.0, 93.0, 101.0), (9.0, 40.0, 88.0), 21.5, 0.84),
}


def synthetic_scorecard() -> Scorecard:
    settings = [("activations", f) for f in FIDELITIES] + [("behaviour", None)]
    scores = tuple(_score(name, *setting) for setting in settings for name in MADE_UP)
    comparisons = tuple(
        _comparison(one, other)
        for setting in settings
        for group in [[s for s in scores if (s.phenomenon, s.fidelity) == setting]]
        for i, one in enumerate(group)
        for other in group[:i]
    )
    task = {
        "model": "embedded",
        "region": "upstream of blocks.2.hook_resid_pre",
        "horizon": 1e6,
        "training_tokens": 9.4e6,
        "held_out_tokens": SEQUENCES * TOKENS,
        "held_out_units": SEQUENCES,
        "null_kl_bits": NULL_KL,
    }
    return Scorecard(task, scores, comparisons, {"mdl-interp": "0.1.0"}, 212.0)


def _score(name: str, phenomenon: str, fidelity: float | None) -> Score:
    whole, first, states, residuals, l0, variance = MADE_UP[name]
    if fidelity is None:
        state, residual = float(states[0]), NULL_KL * (1 - variance) ** 2 + 0.004
        kl, kl_stderr, curve = residual, 0.04, ()
    else:
        level = FIDELITIES.index(fidelity)
        state, residual = float(states[level]), residuals[level]
        kl, kl_stderr = fidelity * NULL_KL * 1.004, fidelity * 0.1
        curve = _curve(np.add(states, residuals))
    rng = np.random.default_rng([len(name), int(1000 * (fidelity or 0))])
    shared = np.random.default_rng(7).normal(0, 0.06, SEQUENCES)
    noise = shared + rng.normal(0, 0.01, SEQUENCES)
    sequence_bits = tuple(float(b) for b in (state + residual) * TOKENS * (1 + noise - noise.mean()))
    error = (state + residual) * 0.0095
    share = state / (state + residual)
    return Score(
        name,
        phenomenon,
        fidelity,
        1e6,
        (
            Entry("message", "static", whole * 1000, 0.0, "coded", "range coder"),
            Entry("support and values", "state", state, error * share, "codelength", "Krichevsky-Trofimov"),
            Entry("standard coder", "residual", residual, error * (1 - share), "codelength", "adaptive counts"),
        ),
        _static(whole * 1000, first * 1000),
        kl,
        kl_stderr,
        sequence_bits,
        (TOKENS,) * SEQUENCES,
        9,
        0.0,
        curve,
        {"static": 1.0},
        {
            "l0": l0,
            "explained_variance": variance,
            "ce_recovered": 1 - (1 - variance) ** 2 / 1.1,
            "kl_recovered": 1 - (1 - variance) ** 2,
            "flops_ratio": 0.01 + l0 / 200,
        },
        message_file=f"messages/{name}.mdl",
        notes=("the first position's constant is charged",) if name == "sae topk 16x" else (),
    )


def _static(whole: float, first: float) -> StaticCurve:
    """Parts used with power-law frequencies: paid on first use."""
    tokens = np.logspace(0, 10, 61)
    frequencies = 1.0 / np.arange(1, 1001) ** 1.1
    used = np.array([np.mean(1 - np.exp(-n * frequencies / 5)) for n in tokens])
    header = min(first, 5000.0)
    rising = (used - used[0]) / (1 - used[0])
    return StaticCurve(tuple(tokens.tolist()), tuple((first + (whole - first) * rising).tolist()), header, whole)


def _curve(rates: np.ndarray) -> tuple[tuple[float, float], ...]:
    levels = np.log([NULL_KL * f for f in FIDELITIES])[::-1]
    at = np.linspace(levels[0] - 0.6, levels[-1] + 0.5, 9)
    slope = (rates[0] - rates[1]) / (levels[-1] - levels[-2])
    rate = np.interp(at, levels, rates[::-1])
    rate = rate + np.where(at > levels[-1], slope * (at - levels[-1]), 0)
    rate = rate + np.where(at < levels[0], (levels[0] - at) * 27.0, 0)
    return tuple((float(np.exp(a)), float(max(r, 1.0))) for a, r in zip(at, rate, strict=True))


def _comparison(first: Score, second: Score) -> Comparison:
    difference = first.rate - second.rate
    error = 0.002 * (first.rate + second.rate)
    grid = np.logspace(0, 10, 2001)
    gap = first.total(grid) - second.total(grid)
    changes = np.flatnonzero(np.diff(np.sign(gap)))
    crossing = overtaker = None
    if len(changes):
        at = changes[-1]
        n = float(np.sqrt(grid[at] * grid[at + 1]))
        spread = 1 + min(2 * 1.96 * error / max(abs(difference), 1e-9), 4.0)
        crossing = Interval(n, n / spread, n * spread)
        overtaker = first.explanation if gap[at + 1] < 0 else second.explanation
    return Comparison(
        first.explanation,
        second.explanation,
        first.phenomenon,
        first.fidelity,
        Interval(difference, difference - 1.96 * error, difference + 1.96 * error),
        crossing,
        overtaker,
    )
