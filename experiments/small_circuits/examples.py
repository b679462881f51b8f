"""The data of the small models: what goes in, where an answer is measured, and what it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

OPEN, CLOSE, ASK, PAD = 0, 1, 2, 3  # tokens of the bracket strings
NOT_MEASURED = -1


@dataclass(frozen=True)
class Examples:
    """`tokens` [n, t]; `measured` [n, t]: where there is an answer; `answers` [n, t]: the right one there, else -1."""

    tokens: np.ndarray
    measured: np.ndarray
    answers: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: np.ndarray) -> Examples:
        return Examples(self.tokens[rows], self.measured[rows], self.answers[rows])

    def save(self, path: Path) -> None:
        """`tokens` and `measured` as `mdl compare --tokens` takes them, through a temporary file that is renamed."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".partial")
        with temporary.open("wb") as file:
            np.savez_compressed(file, tokens=self.tokens, measured=self.measured)
        temporary.replace(path)


def repeats(count: int, rng: np.random.Generator, vocabulary: int, positions: int, periods: range) -> Examples:
    """Sequences of period r, r drawn from `periods`: r different tokens in random order, again and again.

    Measured from position r on, where the next token is that behind the current one's first occurrence; the tokens of a
    period differ, so that this is one token and no other.
    """
    tokens = np.empty((count, positions + 1), np.int32)
    period = rng.choice(np.array(periods), count)
    for row, r in zip(tokens, period, strict=True):
        row[:] = np.resize(rng.permutation(vocabulary)[:r], positions + 1)
    measured = np.arange(positions)[None] >= period[:, None]
    answers = np.where(measured, tokens[:, 1:], NOT_MEASURED).astype(np.int32)
    return Examples(tokens[:, :-1], measured, answers)


def additions(modulus: int) -> Examples:
    """All p^2 questions "a b =", in order; the answer (a + b) mod p is measured at the "=", token p."""
    a, b = (side.ravel() for side in np.meshgrid(np.arange(modulus), np.arange(modulus), indexing="ij"))
    tokens = np.stack([a, b, np.full_like(a, modulus)], 1).astype(np.int32)
    return _last(tokens, (a + b) % modulus)


def brackets(count: int, rng: np.random.Generator, longest: int, shortest: int = 10) -> Examples:
    """Strings of even length behind which "?" asks whether they are balanced (answer 1) or not (0), then padding.

    Half are balanced, drawn uniformly from all balanced strings of their length. The others, a third each: as many
    opening as closing brackets in an order that is not balanced; balanced but for one bracket turned round; random and
    not balanced.
    """
    tokens = np.full((count, longest + 1), PAD, np.int32)
    measured, answers = np.zeros(tokens.shape, bool), np.full(tokens.shape, NOT_MEASURED, np.int32)
    for i in range(count):
        half = int(rng.integers(shortest // 2, longest // 2 + 1))
        answer = int(rng.random() < 0.5)
        string = balanced(half, rng) if answer else _unbalanced(half, rng)
        tokens[i, : 2 * half] = string
        tokens[i, 2 * half], measured[i, 2 * half], answers[i, 2 * half] = ASK, True, answer
    return Examples(tokens, measured, answers)


def balanced(half: int, rng: np.random.Generator) -> np.ndarray:
    """A balanced string of `half` pairs, uniform over all of them.

    Source: the cycle lemma (Dvoretzky and Motzkin 1947): of the rotations of half + 1 opening and `half` closing
    brackets exactly one stays above zero; without its first bracket it is balanced.
    """
    steps = rng.permutation(np.repeat([OPEN, CLOSE], [half + 1, half]))
    depth = np.cumsum(1 - 2 * steps)
    last_lowest = len(depth) - 1 - int(np.argmin(depth[::-1]))
    return np.roll(steps, -(last_lowest + 1))[1:]


def is_balanced(string: np.ndarray) -> bool:
    """Whether no prefix closes more than was opened, and all that was opened is closed."""
    depth = np.cumsum(1 - 2 * np.asarray(string))
    return bool(depth.min() >= 0 and depth[-1] == 0)


def _unbalanced(half: int, rng: np.random.Generator) -> np.ndarray:
    kind = rng.integers(3)
    while True:
        if kind == 0:
            string = rng.permutation(np.repeat([OPEN, CLOSE], half))
        elif kind == 1:
            string = balanced(half, rng)
            place = rng.integers(2 * half)
            string[place] = OPEN + CLOSE - string[place]
        else:
            string = rng.integers(0, 2, 2 * half)
        if not is_balanced(string):
            return string


def _last(tokens: np.ndarray, answer: np.ndarray) -> Examples:
    measured = np.zeros(tokens.shape, bool)
    measured[:, -1] = True
    answers = np.where(measured, answer[:, None], NOT_MEASURED).astype(np.int32)
    return Examples(tokens, measured, answers)
