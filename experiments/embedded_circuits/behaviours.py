"""Two behaviours that the embedded model has, as positions of its own text at which they show.

| behaviour | positions |
| --- | --- |
| induction | this token and the one before, parts of identifiers, stood side by side earlier: it goes on as then |
| brackets | a round bracket is open, and the next token of the text closes it |

The masks say where the model's predictions are asked for; the receiver of a message does not see them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from mdl.data import Dataset
from mdl.models.model import Model


def induction(tokens: np.ndarray, texts: list[str]) -> np.ndarray:
    """Where a pair of tokens, both parts of identifiers, has stood before: bool [sequences, positions]."""
    part = np.array([text.strip().isidentifier() for text in texts])
    found = np.zeros(tokens.shape, bool)
    for row, ids in enumerate(tokens):
        seen: set[tuple[int, int]] = set()
        for position, pair in enumerate(zip(ids[:-1].tolist(), ids[1:].tolist(), strict=True), 1):
            found[row, position] = pair in seen and bool(part[list(pair)].all())
            seen.add(pair)
    return found


def brackets(tokens: np.ndarray, texts: list[str]) -> np.ndarray:
    """Where a round bracket is open and the next token begins by closing one: bool [sequences, positions]."""
    opened = np.array([text.count("(") - text.count(")") for text in texts])
    closing = np.array([text.lstrip().startswith(")") for text in texts])
    found = np.zeros(tokens.shape, bool)
    count = np.cumsum(opened[tokens], 1)
    depth = count - np.minimum.accumulate(np.minimum(count, 0), 1)  # what was opened before the sequence is nobody's
    found[:, :-1] = (depth[:, :-1] > 0) & closing[tokens[:, 1:]]
    return found


BEHAVIOURS: Mapping[str, Callable[[np.ndarray, list[str]], np.ndarray]] = {"induction": induction, "brackets": brackets}


def write(model: Model, data: Dataset, behaviour: str, path: Path) -> Path:
    """Leave `tokens`, `measured` and `documents` of a behaviour where `mdl compare --tokens` reads them: all sequences
    of the data that show it."""
    assert model.tokenizer is not None
    texts = [model.tokenizer.decode([i]) for i in range(model.config.d_vocab)]
    tokens = np.concatenate([data.fit, data.tune, data.held_out])
    ends = np.cumsum([0, *(int(g.max()) + 1 for g in data.groups)])
    documents = np.concatenate([g + first for g, first in zip(data.groups, ends, strict=False)])
    measured = BEHAVIOURS[behaviour](tokens, texts)
    shown = measured.any(1)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npz")
    np.savez_compressed(partial, tokens=tokens[shown], measured=measured[shown], documents=documents[shown])
    partial.replace(path)
    return path
