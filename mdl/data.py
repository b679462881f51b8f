"""Texts and token streams. The sequence is the unit of sampling.

The embedded text is the running Python's own standard library: the documentation in `pydoc_data.topics` and the
sources of its modules, split by file. Nothing is downloaded, and the hash of what was read goes into every score.
"""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mdl.errors import DataError

# Parts of the standard library that many distributions leave out, or that are data rather than text: held-out text
# must be the same wherever the package is installed, so these are only ever trained on.
OPTIONAL_PACKAGES = frozenset({"idlelib", "tkinter", "lib2to3", "distutils", "ensurepip", "turtledemo", "pydoc_data"})
SKIPPED_PACKAGES = frozenset({"site-packages", "dist-packages", "encodings", "__pycache__", "lib-dynload"})


@dataclass(frozen=True)
class Document:
    """A text, its name, and the split that its name puts it in: "train", "fit" or "held-out"."""

    name: str
    text: str
    split: str


def split_of(name: str) -> str:
    """84 % train, 8 % fit, 8 % held-out, by a hash of the name, so that a file never changes sides."""
    bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100
    return "train" if bucket < 84 else "fit" if bucket < 92 else "held-out"


def _module_documents() -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_PACKAGES & set(relative.parts):
            continue
        tests = any("test" in part for part in relative.parts[:-1])
        train_only = tests or relative.parts[0] in OPTIONAL_PACKAGES
        name = relative.as_posix()
        if relative.parts[0] == "pydoc_data":
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        yield Document(name, text, "train" if train_only else split_of(name))


def standard_library() -> list[Document]:
    """Documentation topics and module sources of the running Python, in a fixed order."""
    from pydoc_data.topics import topics

    found = [Document(f"topics/{name}", text, split_of(f"topics/{name}")) for name, text in sorted(topics.items())]
    return found + list(_module_documents())


# Names that tokenizers give the token that starts a text, in the order of preference.
START_TOKENS = ("<|endoftext|>", "<s>", "<bos>", "<|begin_of_text|>", "[BOS]")
SPLIT_SHARES = (0.6, 0.15, 0.25)  # fit, tune, held-out, where the data does not come in splits


@dataclass(frozen=True)
class Dataset:
    """Token ids [sequences, positions] in three disjoint splits, with the unit of sampling of every sequence.

    `special_tokens`: ids whose positions are not scored: every explanation has a constant there, which is charged.
    `description`: source, hash and sizes, for the scorecard. `measured`: of each split, bool [sequences, positions],
    where what the model predicts is asked for (a behaviour that shows at some positions); None: everywhere. All else is
    predicted and paid for as ever, but M's predictions there are nobody's concern: their KL counts as 0.
    """

    fit: np.ndarray
    tune: np.ndarray
    held_out: np.ndarray
    groups: tuple[np.ndarray, np.ndarray, np.ndarray]
    special_tokens: tuple[int, ...]
    description: dict[str, Any]
    measured: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    def save(self, path: Path) -> None:
        """Write an .npz of plain arrays, to a temporary file that is then renamed."""
        names = ("fit", "tune", "held_out")
        arrays = {name: getattr(self, name) for name in names}
        arrays |= {f"{name}_groups": g for name, g in zip(names, self.groups, strict=True)}
        arrays["special_tokens"] = np.array(self.special_tokens, np.int64)
        if self.measured is not None:
            arrays |= {f"{name}_measured": m for name, m in zip(names, self.measured, strict=True)}
        temporary = path.with_name(path.name + ".partial")
        with temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> Dataset:
        """Read what `save` wrote, its hash computed anew. **Raises:** `DataError` if the file is not that."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                fit, tune, held_out = (arrays[name] for name in ("fit", "tune", "held_out"))
                groups = (arrays["fit_groups"], arrays["tune_groups"], arrays["held_out_groups"])
                special = tuple(int(i) for i in arrays["special_tokens"])
                masks = [
                    arrays[f"{name}_measured"] for name in ("fit", "tune", "held_out") if f"{name}_measured" in arrays
                ]
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path} does not hold the data of a run ({error}): expected its data.npz") from error
        measured = (masks[0], masks[1], masks[2]) if len(masks) == 3 else None
        description = {"data_sha256": _hash(fit, tune, held_out, *masks)}
        return cls(fit, tune, held_out, groups, special, description, measured)

    def splits(self) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray | None]]:
        """Name, tokens, groups and measured positions of each."""
        measured = self.measured or (None, None, None)
        yield from zip(
            ("fit", "tune", "held-out"), (self.fit, self.tune, self.held_out), self.groups, measured, strict=True
        )


@dataclass(frozen=True)
class Sizes:
    """How many sequences to use at most: to fit explanations on, to tune knobs on, and to score."""

    fit: int = 800
    tune: int = 64
    held_out: int = 48


def _hash(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array, np.int32).tobytes())
    return digest.hexdigest()


def _rows(tokens: np.ndarray) -> list[bytes]:
    """A key for every sequence."""
    return [row.tobytes() for row in np.ascontiguousarray(tokens, np.int32)]


def repeats(seen: list[np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """Which sequences [n] occur in `seen`, or earlier among themselves."""
    known = {key for array in seen for key in _rows(array)}
    found = []
    for key in _rows(tokens):
        found.append(key in known)
        known.add(key)
    return np.array(found, bool)


def refuse_repeats(data: Dataset) -> None:
    """**Raises:** `DataError` where held-out sequences are among those that explanations were fitted or tuned on, or
    occur twice: a look-up table of them would explain nothing, and shine."""
    again = repeats([data.fit, data.tune], data.held_out)
    if again.any():
        raise DataError(
            f"{again.sum()} of {len(again)} held-out sequences are duplicates, of fit or tuning data or of one "
            "another: a table that memorises them would be rewarded. Remove them, or load the data with mdl.data, "
            "which drops them."
        )


def _spread(owner: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Sequences in random order, one of every unit before a second of any: intervals rest on the number of units."""
    order = rng.permutation(len(owner))
    by_unit = np.argsort(owner[order], kind="stable")
    sorted_units = owner[order][by_unit]
    rank = np.empty(len(order), np.int64)
    rank[by_unit] = np.arange(len(order)) - np.searchsorted(sorted_units, sorted_units)
    return order[np.argsort(rank, kind="stable")]


def _dataset(
    splits: list[tuple[np.ndarray, np.ndarray]],
    special: tuple[int, ...],
    sizes: Sizes,
    seed: int,
    source: str,
    masks: list[np.ndarray] | None = None,
) -> Dataset:
    """Draw the wanted numbers of sequences from each split, number their units from 0, hash what was drawn.

    Held-out sequences that also occur in the other splits, or that occurred before, are dropped and counted.
    """
    rng = np.random.default_rng(seed)
    tokens, groups, measured = [], [], []
    again = repeats([array for array, _ in splits[:2]], splits[2][0])
    splits = [*splits[:2], (splits[2][0][~again], splits[2][1][~again])]
    masks = masks and [*masks[:2], masks[2][~again]]
    for number, size in enumerate((sizes.fit, sizes.tune, sizes.held_out)):
        array, owner = splits[number]
        chosen = np.sort(_spread(owner, rng)[:size])
        tokens.append(np.ascontiguousarray(array[chosen], np.int32))
        groups.append(np.unique(owner[chosen], return_inverse=True)[1].reshape(-1))
        measured += [masks[number][chosen]] if masks else []
    for name, array in zip(("fit", "tune", "held-out"), tokens, strict=True):
        if len(array) < 2:
            raise DataError(
                f"only {len(array)} sequences of {array.shape[-1]} tokens for the {name} split: standard errors need "
                "at least 2. Give more text, or shorter sequences with --context."
            )
    sha256 = _hash(*tokens, *measured)
    description = {"data": source, "data_sha256": sha256, "context": int(tokens[0].shape[1]), "seed": seed}
    description["special_tokens"] = list(special)
    description["duplicates_dropped"] = int(again.sum())
    where = (measured[0], measured[1], measured[2]) if measured else None
    return Dataset(tokens[0], tokens[1], tokens[2], (groups[0], groups[1], groups[2]), special, description, where)


def _shared_split(
    tokens: np.ndarray,
    special: tuple[int, ...],
    sizes: Sizes,
    seed: int,
    source: str,
    measured: np.ndarray | None = None,
    documents: np.ndarray | None = None,
) -> Dataset:
    """Split sequences that come in one array: a seeded permutation of `documents` [sequences], the units, 60 / 15 /
    25 %; by default each sequence is one."""
    units, owner = np.unique(np.arange(len(tokens)) if documents is None else documents, return_inverse=True)
    place = np.argsort(np.random.default_rng(seed).permutation(len(units)))[owner]  # of its document, in random order
    order = np.argsort(place, kind="stable")
    parts = np.split(order, np.searchsorted(place[order], _cuts(len(units))))
    masks = None if measured is None else [measured[part] for part in parts]
    return _dataset([(tokens[part], place[part]) for part in parts], special, sizes, seed, source, masks)


def start_token(tokenizer: Any) -> int | None:
    """The id that starts a text, or None if the tokenizer has none of the usual names."""
    ids = [tokenizer.token_to_id(name) for name in START_TOKENS]
    return next((i for i in ids if i is not None), None)


def windows(documents: list[list[int]], context: int, start: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Cut documents into sequences of `context` tokens, each behind the start token; remainders are dropped.

    **Returns:** tokens [sequences, context] and the number of the document each comes from [sequences].
    """
    width = context - (start is not None)
    rows, owners = [], []
    for owner, ids in enumerate(documents):
        for begin in range(0, len(ids) - width + 1, width):
            rows.append(ids[begin : begin + width])
            owners.append(owner)
    tokens = np.array(rows, np.int32).reshape(len(rows), width)
    if start is not None:
        tokens = np.concatenate([np.full((len(rows), 1), start, np.int32), tokens], 1)
    return tokens, np.array(owners, np.int64)


def from_tokens(path: Path, sizes: Sizes, seed: int, context: int | None = None) -> Dataset:
    """A token array on disk: an .npy file of integers [sequences, positions], or an .npz archive of `tokens` like that
    and, as far as there are such, `measured`, bool of the same shape: the positions at which the model's predictions
    are asked for; `documents`, integers [sequences]: which sequences are parts of one, and go to one split together.

    A token id that begins every sequence is taken for a start-of-text token: it is not scored.
    **Raises:** `DataError` if the file is not such an array.
    """
    tokens, measured, documents = _read_tokens(path)
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer) or tokens.size == 0:
        raise DataError(
            f"{path} holds a {tokens.dtype} array of shape {tokens.shape}; expected integer token ids "
            "[sequences, positions]"
        )
    if measured is not None and (measured.shape != tokens.shape or measured.dtype != bool):
        raise DataError(
            f"{path}: `measured` is {measured.dtype} {measured.shape} for tokens {tokens.shape}: it says of every "
            "position, True or False, whether the model's prediction there is asked for"
        )
    if documents is not None and (
        documents.shape != tokens.shape[:1] or not np.issubdtype(documents.dtype, np.integer)
    ):
        raise DataError(
            f"{path}: `documents` is {documents.dtype} {documents.shape} for {len(tokens)} sequences: it numbers the "
            "document of each"
        )
    tokens, measured = tokens[:, :context].astype(np.int32), None if measured is None else measured[:, :context]
    if tokens.min() < 0:
        raise DataError(f"{path} holds negative token ids (smallest {tokens.min()})")
    first = tokens[0, 0]
    special = (int(first),) if (tokens[:, 0] == first).all() else ()
    return _shared_split(tokens, special, sizes, seed, Path(path).name, measured, documents)


def _read_tokens(path: Path) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """`tokens`, `measured` and `documents`. **Raises:** `DataError` for a file without the first."""
    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return found, None, None
        with found:
            return found["tokens"], found.get("measured"), found.get("documents")
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{path} is not a readable array of token ids ({error}): it takes an .npy array, or an .npz with `tokens`"
        ) from error


def from_rows(first_equal: np.ndarray, held_out: int | None, seed: int, source: str) -> Dataset:
    """Rows of numbers, each by its number as a sequence of one position: 60 / 15 / 25 %, the last at most `held_out`.

    **Arguments:** `first_equal` [n]: for each row the number of the first row equal to it, which alone is kept: what is
    scored would else be among what was fitted on. So rows that come several times count once, and rates are means over
    different rows, not over the distribution that they were drawn from; for rows from a continuous one these are equal.
    Inputs of which there are few (pairs of residues) are therefore to be given once each.
    """
    numbers = np.unique(first_equal)[:, None]
    sizes = Sizes(len(numbers), len(numbers), held_out or len(numbers))
    data = _shared_split(numbers, (), sizes, seed, source)
    return replace(data, description={**data.description, "duplicates_dropped": len(first_equal) - len(numbers)})


def from_text(path: Path, tokenizer: Any, context: int, sizes: Sizes, seed: int) -> Dataset:
    """A UTF-8 text file, cut into sequences of `context` tokens, which have to serve as the unit of sampling.

    **Raises:** `DataError` for a missing, empty or undecodable file, or a model without a tokenizer.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text ({error})") from error
    if not text.strip():
        raise DataError(f"{path} is an empty text: there is nothing to score")
    return _from_texts([text], tokenizer, context, sizes, seed, Path(path).name)


def from_dataset(path: Path, tokenizer: Any, context: int, sizes: Sizes, seed: int) -> Dataset:
    """A Hugging Face dataset saved on disk, with a column `input_ids` or `text`.

    **Raises:** `DataError` if it is not one, or has neither column.
    """
    import datasets

    try:
        stored = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a dataset written by `save_to_disk` ({error})") from error
    if isinstance(stored, datasets.DatasetDict):
        stored = next(iter(stored.values()))
    if "input_ids" in stored.column_names:
        tokens, _ = windows([list(ids) for ids in stored["input_ids"]], context, None)
        return _shared_split(tokens, (), sizes, seed, Path(path).name)
    if "text" not in stored.column_names:
        raise DataError(f"{path} has columns {stored.column_names}; expected 'input_ids' or 'text'")
    return _from_texts(list(stored["text"]), tokenizer, context, sizes, seed, Path(path).name)


def _from_texts(texts: list[str], tokenizer: Any, context: int, sizes: Sizes, seed: int, source: str) -> Dataset:
    """Several texts: whole documents go to one split, and are the unit of sampling. One: its first 60 % of windows are
    fitted on and its last 25 % scored, and the window has to serve as the unit."""
    if tokenizer is None:
        raise DataError("this model came without a tokenizer.json, so text cannot be tokenised: give --tokens instead")
    start = start_token(tokenizer)
    special = () if start is None else (start,)
    encoded = [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
    if len(encoded) == 1:
        tokens, _ = windows(encoded, context, start)
        parts = [(part, np.arange(len(part))) for part in np.split(tokens, _cuts(len(tokens)))]
    else:
        order = np.random.default_rng(seed).permutation(len(encoded))
        chosen = [[encoded[i] for i in part] for part in np.split(order, _cuts(len(order)))]
        parts = [windows(documents, context, start) for documents in chosen]
    return _dataset(parts, special, sizes, seed, source)


def _cuts(count: int) -> np.ndarray:
    return np.cumsum([round(share * count) for share in SPLIT_SHARES[:2]])


def embedded_text(tokenizer: Any, context: int, sizes: Sizes, seed: int) -> Dataset:
    """The running Python's standard library: fit and tune from its `fit` files, scores from its `held-out` files.

    The document is the unit of sampling. No file that the embedded model was trained on is among them.
    """
    start = start_token(tokenizer)
    by_split: dict[str, list[list[int]]] = {"fit": [], "tune": [], "held-out": []}
    for document in standard_library():
        if document.split == "train":
            continue
        tune = document.split == "fit" and hashlib.sha256(document.name.encode()).digest()[4] % 4 == 0
        by_split["tune" if tune else document.split].append(
            tokenizer.encode(document.text, add_special_tokens=False).ids
        )
    splits = [windows(documents, context, start) for documents in by_split.values()]
    special = () if start is None else (start,)
    version = ".".join(map(str, sys.version_info[:3]))
    return _dataset(splits, special, sizes, seed, f"standard library of Python {version}")
