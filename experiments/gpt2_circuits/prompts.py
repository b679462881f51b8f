"""Pairs of prompts as EAP-IG and MIB publish them: a csv of clean and corrupted texts and the labels of the answer.

| task | columns | metric, larger is better |
| --- | --- | --- |
| ioi | clean, corrupted, correct_idx, incorrect_idx | logit of the right name less that of the wrong one |
| greater-than | clean, corrupted, correct_idx | probability of later years less that of others |

Labels are token ids; of greater-than, the last two digits of the year that the answer has to exceed, as a number.
Prompts of a pair must have as many tokens; pairs are put together by their length, so that nothing is padded.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdl.errors import DataError

TASKS: Mapping[str, tuple[str, ...]] = {
    "ioi": ("clean", "corrupted", "correct_idx", "incorrect_idx"),
    "greater-than": ("clean", "corrupted", "correct_idx"),
}


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of one length. **Arguments:** `clean`, `corrupted` [B, T]: token ids; `labels` [B, L]: of the task."""

    clean: np.ndarray
    corrupted: np.ndarray
    labels: np.ndarray

    @property
    def last(self) -> np.ndarray:
        """The position that counts, [B, 1]."""
        return np.full((len(self.clean), 1), self.clean.shape[1] - 1)


def read_pairs(path: Path, task: str, tokenizer: Any, limit: int | None = None) -> list[Pairs]:
    """The first `limit` pairs of a file, by length.

    **Raises:** `DataError` for a file that cannot be read, columns or labels that are missing, a pair of two lengths.
    """
    wanted = TASKS[task]
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))[:limit]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a csv of prompts ({error})") from error
    if not rows or any(name not in rows[0] for name in wanted):
        found = ", ".join(rows[0]) if rows else "nothing"
        raise DataError(f"{path} has {found}; {task} takes the columns {', '.join(wanted)}")
    by_length: dict[int, list[tuple[list[int], list[int], list[int]]]] = {}
    for number, row in enumerate(rows, 2):
        clean, corrupted = (tokenizer.encode(row[name], add_special_tokens=False).ids for name in wanted[:2])
        if len(clean) != len(corrupted) or not clean:
            raise DataError(
                f"{path}, line {number}: {len(clean)} tokens and {len(corrupted)} of the corrupted prompt: activations "
                "take each other's place position by position. Is the tokenizer the one the prompts were made for?"
            )
        try:
            labels = [int(row[name]) for name in wanted[2:]]
        except ValueError as error:
            raise DataError(f"{path}, line {number}: a label is no number ({error})") from error
        by_length.setdefault(len(clean), []).append((clean, corrupted, labels))
    return [Pairs(*(np.array(part, np.int32) for part in zip(*some, strict=True))) for some in by_length.values()]


def year_tokens(tokenizer: Any) -> np.ndarray:
    """The token ids of 00 to 99, [100]. **Raises:** `DataError` where a year of two digits is not one token."""
    encoded = [tokenizer.encode(f"{year:02d}", add_special_tokens=False).ids for year in range(100)]
    if any(len(ids) != 1 for ids in encoded):
        raise DataError("greater-than needs every number from 00 to 99 to be one token, as it is of GPT-2")
    return np.array([ids[0] for ids in encoded])


def metric_of(task: str, pairs: Pairs, tokenizer: Any) -> Callable[[Any, Any], Any]:
    """A task's metric as a loss of logits [B, 1, V]: minus the mean over the pairs."""
    labels = jnp.asarray(pairs.labels)
    if task == "ioi":

        def logit_difference(logits: Any, _: Any) -> Any:
            right, wrong = (jnp.take_along_axis(logits[:, 0], labels[:, i : i + 1], 1) for i in (0, 1))
            return (wrong - right).mean()

        return logit_difference
    years = jnp.asarray(year_tokens(tokenizer))
    later = jnp.arange(100)[None] > labels[:, :1]

    def probability_difference(logits: Any, _: Any) -> Any:
        p = jax.nn.softmax(logits[:, 0])[:, years]
        return (jnp.where(later, -p, p)).sum(1).mean()

    return probability_difference
