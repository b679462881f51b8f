"""Token streams: disjoint splits, seeds, and bad input refused in words."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from mdl.data import (
    Dataset,
    Sizes,
    embedded_text,
    from_dataset,
    from_text,
    from_tokens,
    split_of,
    standard_library,
    start_token,
    windows,
)
from mdl.errors import DataError

SIZES = Sizes(fit=20, tune=6, held_out=8)


@pytest.fixture(scope="module")
def tokenizer() -> tokenizers.Tokenizer:
    """Bytes as tokens, behind a start token: fast, and every text round-trips."""
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0} | {c: i + 1 for i, c in enumerate(alphabet)}
    found = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    found.add_special_tokens(["<|endoftext|>"])
    return found


def token_file(folder: Path, tokens: np.ndarray) -> Path:
    np.save(folder / "tokens.npy", tokens)
    return folder / "tokens.npy"


def numbered(sequences: int = 40, positions: int = 12, start: int | None = 0) -> np.ndarray:
    """Sequences that can be told apart by their second token."""
    tokens = np.random.default_rng(0).integers(1, 30, (sequences, positions)).astype(np.int32)
    tokens[:, 1] = 100 + np.arange(sequences)
    if start is not None:
        tokens[:, 0] = start
    return tokens


def rows_of(data: Dataset) -> list[set[tuple[int, ...]]]:
    return [{tuple(row) for row in tokens.tolist()} for _, tokens, _, _ in data.splits()]


def assert_disjoint(data: Dataset) -> None:
    fit, tune, held_out = rows_of(data)
    assert not fit & tune
    assert not fit & held_out
    assert not tune & held_out


def test_splits_of_a_token_array_are_disjoint_and_sized(tmp_path: Path) -> None:
    data = from_tokens(token_file(tmp_path, numbered(100)), SIZES, seed=0)
    assert [len(t) for _, t, _, _ in data.splits()] == [20, 6, 8]
    assert_disjoint(data)
    assert data.special_tokens == (0,)
    for _, tokens, groups, _ in data.splits():
        assert tokens.dtype == np.int32
        assert np.array_equal(groups, np.arange(len(tokens)))
    assert data.description["data"] == "tokens.npy"
    assert data.description["context"] == 12
    assert len(data.description["data_sha256"]) == 64


def test_shares_where_data_is_short(tmp_path: Path) -> None:
    data = from_tokens(token_file(tmp_path, numbered(40)), Sizes(1000, 1000, 1000), seed=0)
    assert [len(t) for _, t, _, _ in data.splits()] == [24, 6, 10]
    assert sum(len(r) for r in rows_of(data)) == 40


def test_a_seed_gives_the_same_split_and_another_another(tmp_path: Path) -> None:
    path = token_file(tmp_path, numbered(100))
    first, again, other = (from_tokens(path, SIZES, seed) for seed in (3, 3, 4))
    for a, b in zip(first.splits(), again.splits(), strict=True):
        assert np.array_equal(a[1], b[1])
    assert first.description == again.description
    assert first.description["data_sha256"] != other.description["data_sha256"]
    assert rows_of(first)[2] != rows_of(other)[2]


def test_only_a_common_first_token_is_special(tmp_path: Path) -> None:
    assert from_tokens(token_file(tmp_path, numbered(40, start=None)), SIZES, 0).special_tokens == ()
    assert from_tokens(token_file(tmp_path, numbered(40, start=7)), SIZES, 0).special_tokens == (7,)


def test_a_shorter_context_cuts_the_sequences(tmp_path: Path) -> None:
    data = from_tokens(token_file(tmp_path, numbered(40)), SIZES, 0, context=5)
    assert data.fit.shape[1] == data.held_out.shape[1] == 5


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.zeros((4, 4)), "float64 array of shape"),
        (np.zeros(4, np.int64), r"shape \(4,\); expected integer token ids"),
        (np.zeros((0, 4), np.int64), r"shape \(0, 4\)"),
        (np.full((9, 4), -1), r"negative token ids \(smallest -1\)"),
        (np.ones((3, 4), np.int64), "standard errors need at least 2"),
    ],
)
def test_bad_token_arrays_are_refused(tmp_path: Path, tokens: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        from_tokens(token_file(tmp_path, tokens), SIZES, 0)


def test_what_is_no_array_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_text("tokens")
    for name in ("x.npy", "absent.npy"):
        with pytest.raises(DataError, match="not a readable array"):
            from_tokens(tmp_path / name, SIZES, 0)


def test_pickled_arrays_are_not_run(tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([[{}]], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="not a readable array"):
        from_tokens(tmp_path / "objects.npy", SIZES, 0)


def test_text_becomes_windows_behind_the_start_token(tmp_path: Path, tokenizer: tokenizers.Tokenizer) -> None:
    text = "".join(chr(97 + i % 26) + str(i) for i in range(600))
    (tmp_path / "text.txt").write_text(text)
    data = from_text(tmp_path / "text.txt", tokenizer, 16, SIZES, 0)
    assert data.special_tokens == (0,)
    assert_disjoint(data)
    for _, tokens, _, _ in data.splits():
        assert (tokens[:, 0] == 0).all()
        for row in tokens:
            assert tokenizer.decode(row[1:].tolist()) in text
    other = from_text(tmp_path / "text.txt", tokenizer, 16, SIZES, 1)
    assert other.description["data_sha256"] != data.description["data_sha256"]


@pytest.mark.parametrize("content", [b"", b"  \n\t\n"])
def test_an_empty_text_is_refused(tmp_path: Path, tokenizer: tokenizers.Tokenizer, content: bytes) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(DataError, match=r"text\.txt is an empty text: there is nothing to score"):
        from_text(tmp_path / "text.txt", tokenizer, 16, SIZES, 0)


def test_bad_texts_are_refused(tmp_path: Path, tokenizer: tokenizers.Tokenizer) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    for name in ("latin.txt", "absent.txt"):
        with pytest.raises(DataError, match="cannot be read as UTF-8 text"):
            from_text(tmp_path / name, tokenizer, 16, SIZES, 0)
    (tmp_path / "short.txt").write_text("too short for six sequences")
    with pytest.raises(DataError, match=r"only \d sequences of 16 tokens for the \S+ split"):
        from_text(tmp_path / "short.txt", tokenizer, 16, SIZES, 0)
    with pytest.raises(DataError, match=r"without a tokenizer\.json.*give --tokens"):
        from_text(tmp_path / "short.txt", None, 16, SIZES, 0)


def test_datasets_on_disk(tmp_path: Path, tokenizer: tokenizers.Tokenizer) -> None:
    datasets = pytest.importorskip("datasets", reason="Hugging Face datasets is not installed")
    ids = [[100 + i, *range(20)] for i in range(40)]
    datasets.Dataset.from_dict({"input_ids": ids}).save_to_disk(str(tmp_path / "ids"))
    data = from_dataset(tmp_path / "ids", None, 10, SIZES, 0)
    assert data.special_tokens == ()
    assert data.fit.shape == (20, 10)
    texts = [f"Document {i} says something that is its own, {i * i}." * 3 for i in range(40)]
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": texts})}).save_to_disk(str(tmp_path / "text"))
    data = from_dataset(tmp_path / "text", tokenizer, 24, SIZES, 0)
    assert data.special_tokens == (0,)
    assert data.fit.shape == (20, 24)
    datasets.Dataset.from_dict({"label": [1, 2]}).save_to_disk(str(tmp_path / "labels"))
    with pytest.raises(DataError, match=r"columns \['label'\]; expected 'input_ids' or 'text'"):
        from_dataset(tmp_path / "labels", tokenizer, 24, SIZES, 0)
    with pytest.raises(DataError, match="not a dataset written by `save_to_disk`"):
        from_dataset(tmp_path / "nowhere", tokenizer, 24, SIZES, 0)


def test_windows_drop_remainders_and_know_their_documents() -> None:
    tokens, owner = windows([list(range(1, 8)), [], list(range(20, 24))], 4, 0)
    assert tokens.tolist() == [[0, 1, 2, 3], [0, 4, 5, 6], [0, 20, 21, 22]]
    assert owner.tolist() == [0, 0, 2]
    tokens, owner = windows([[1, 2]], 4, None)
    assert tokens.shape == (0, 4)
    assert owner.shape == (0,)


def test_start_tokens_in_the_order_of_preference(tokenizer: tokenizers.Tokenizer) -> None:
    assert start_token(tokenizer) == 0
    from tokenizers import models

    assert start_token(tokenizers.Tokenizer(models.WordLevel({"a": 0, "<s>": 3, "<bos>": 2}))) == 3
    assert start_token(tokenizers.Tokenizer(models.WordLevel({"a": 0}))) is None


def test_a_file_never_changes_sides() -> None:
    names = [f"package/module_{i}.py" for i in range(4000)]
    shares = {split: sum(split_of(n) == split for n in names) / 4000 for split in ("train", "fit", "held-out")}
    assert shares["train"] == pytest.approx(0.84, abs=0.02)
    assert shares["fit"] == pytest.approx(0.08, abs=0.015)
    assert shares["held-out"] == pytest.approx(0.08, abs=0.015)
    # Fixed for good: the embedded model was trained with these.
    assert [split_of(n) for n in ("ast.py", "csv.py", "_pydecimal.py")] == ["train", "fit", "held-out"]


@pytest.fixture(scope="module")
def embedded(tokenizer: tokenizers.Tokenizer) -> Dataset:
    return embedded_text(tokenizer, 64, Sizes(40, 12, 30), 0)


def test_embedded_text_has_the_sizes_and_its_documents_as_units(embedded: Dataset) -> None:
    assert [t.shape for _, t, _, _ in embedded.splits()] == [(40, 64), (12, 64), (30, 64)]
    for _, tokens, groups, _ in embedded.splits():
        assert np.array_equal(np.unique(groups), np.arange(groups.max() + 1))
        assert (tokens[:, 0] == 0).all()
    assert 2 <= embedded.groups[2].max() + 1 <= 30
    assert_disjoint(embedded)
    assert embedded.description["data"].startswith("standard library of Python 3.")


def test_no_document_that_was_trained_on_is_scored(embedded: Dataset, tokenizer: tokenizers.Tokenizer) -> None:
    """Every sequence lies in a document of its own split, and in none of those that were trained on."""
    by_split: dict[str, list[str]] = {"train": [], "fit": [], "held-out": []}
    for document in standard_library():
        by_split[document.split].append(document.text)
    whole = {split: "\0".join(texts) for split, texts in by_split.items()}
    for (_, tokens, _, _), split in zip(embedded.splits(), ("fit", "fit", "held-out"), strict=True):
        others = [s for s in whole if s != split]
        foreign = 0
        for row in tokens:
            text = tokenizer.decode(row[1:].tolist()).strip("\ufffd")
            assert text in whole[split]
            foreign += any(text in whole[s] for s in others)
        # Licence texts and the like occur in several files; they are few.
        assert foreign <= 0.1 * len(tokens)


def test_documents_do_not_depend_on_optional_packages() -> None:
    """What distributions leave out is only ever trained on, and so are the tests."""
    documents = standard_library()
    names = [d.name for d in documents]
    assert len(set(names)) == len(names)
    assert all(a <= b for a, b in pairwise(n for n in names if n.startswith("topics/")))
    for document in documents:
        first = document.name.split("/")[0]
        if first in {"idlelib", "tkinter", "lib2to3", "ensurepip", "turtledemo", "distutils"}:
            assert document.split == "train"
        elif first == "topics":
            assert document.split == split_of(document.name)
    assert {d.split for d in documents} == {"train", "fit", "held-out"}
