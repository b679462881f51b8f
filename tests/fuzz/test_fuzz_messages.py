"""A short run of the fuzz target, and what its corpus and its limits are good for."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from estimators.fidelity import decoder_of
from mdl.errors import MessageError
from mdl.message import QuantisedArray, Section, decode_message, encode_message
from mdl.plugins import available
from tests.fuzz import fuzz_messages
from tests.fuzz.corpus import WIDTH, corpus, explanations
from tests.fuzz.fuzz_messages import DECODED, FAILED, REFUSED, REFUSED_BY_DECODER, attempt, limits
from tests.fuzz.mutations import KINDS, STRATEGIES, Corpus

ROOT = Path(__file__).resolve().parents[2]
MESSAGES = 3000
NAMES = tuple(strategy.__name__ for strategy, _ in STRATEGIES)
BIG = 10**9


def test_the_corpus_has_every_kind_that_is_shipped() -> None:
    ours = {
        name for name, point in available("decoder").items() if point.module.startswith(("mdl.", "decompositions."))
    }
    assert ours | {"special"} == set(KINDS)
    assert {section.kind for sections in corpus() for section in sections} == set(KINDS)


def test_messages_of_the_corpus_decode_and_build() -> None:
    for sections in corpus():
        for sent, received in zip(sections, decode_message(encode_message(sections).data), strict=True):
            assert [a.symbols.shape for a in sent.parts] == [a.symbols.shape for a in received.parts]
            if received.kind != "special":
                decoder_of(received)


def test_thousands_of_mutated_messages_end_in_sections_or_one_error() -> None:
    """The program itself, in a process of its own, without run-time checks of types."""
    command = [sys.executable, "-m", "tests.fuzz.fuzz_messages", "--count", str(MESSAGES), "--seed", "1"]
    done = subprocess.run([*command, "--processes", "1"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"{MESSAGES:,} mutated messages .* 0 crashes, hangs or over-allocations", done.stdout)
    table = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line.startswith(NAMES)}
    rows = np.array([[int(n.replace(",", "")) for n in table[name]] for name in NAMES])
    assert rows.sum() == MESSAGES
    outcomes = rows.sum(0)
    assert outcomes[FAILED] == 0
    # It gets past the checksum and into the decoders, or it would show nothing.
    assert min(outcomes[DECODED], outcomes[REFUSED], outcomes[REFUSED_BY_DECODER]) > MESSAGES // 60
    assert rows.sum(1).min() > MESSAGES // 60


def test_a_message_depends_on_its_number_alone() -> None:
    known = Corpus.of(corpus())
    first = [fuzz_messages.message(known, 5, index) for index in range(12)]
    assert first == [fuzz_messages.message(known, 5, index) for index in range(12)]
    assert len({data for _, data in first}) > 9
    assert {strategy for strategy, _ in first} <= set(range(len(STRATEGIES)))


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        (ValueError("shapes"), "ValueError: shapes"),
        (MemoryError(), "MemoryError"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_any_other_exception_is_a_failure(monkeypatch: pytest.MonkeyPatch, fault: Exception, name: str) -> None:
    def broken(data: bytes) -> list[Section]:
        raise fault

    monkeypatch.setattr(fuzz_messages, "decode_message", broken)
    outcome, what = attempt(b"")
    assert (outcome, what.startswith(name)) == (FAILED, True)


def test_a_hang_and_a_flood_are_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(data: bytes) -> list[Section]:
        while True:
            time.perf_counter()

    def greedy(data: bytes) -> list[Section]:
        return [np.ones(1 << 28) for _ in range(2)]

    monkeypatch.setattr(fuzz_messages, "SECONDS", 0.05)
    with limits(1 << 30):
        monkeypatch.setattr(fuzz_messages, "decode_message", slow)
        assert attempt(b"") == (FAILED, "Hang: more than 0.05 s of processor time")
        monkeypatch.setattr(fuzz_messages, "decode_message", greedy)
        monkeypatch.setattr(fuzz_messages, "SECONDS", 60)
        outcome, what = attempt(b"")
    assert outcome == FAILED
    assert "MemoryError" in what


def changed(section: Section, group: str, place: int, array: QuantisedArray) -> Section:
    arrays = {"header": list(section.header), "parts": list(section.parts)}
    arrays[group][place] = array
    return Section(section.kind, tuple(arrays["header"]), tuple(arrays["parts"]))


def arrays_of_any_shape(rows: int) -> list[QuantisedArray]:
    """Shapes and symbols that no section takes in any place but a matching one."""
    integers = [np.zeros((0, WIDTH)), np.zeros((rows, 0)), np.zeros((0, 0)), np.zeros((rows + 1, WIDTH + 1))]
    extremes = [np.full((rows, c), v) for c in (1, 3) for v in (BIG, -BIG, (1 << 62) - 1)]
    return [QuantisedArray.from_integers(np.asarray(a, np.int64)) for a in (*integers, *extremes)]


@pytest.mark.parametrize("section", explanations(1e4), ids=lambda s: f"{s.kind}-{len(s.header)}")
def test_decoders_refuse_arrays_that_do_not_fit(section: Section) -> None:
    """Every array replaced by every wrong one: a decoder, or `MessageError`; an empty or ragged one is refused."""
    refused = []
    decoder_of(section)
    for group, arrays in (("header", section.header), ("parts", section.parts)):
        for place, own in enumerate(arrays):
            for wrong in arrays_of_any_shape(max(len(own.symbols), 1)):
                try:
                    decoder_of(changed(section, group, place, wrong))
                except MessageError as error:
                    refused.append(str(error))
    # Centroids may be any matrix, and a constant any vector.
    assert len(refused) >= {"clusters": 0, "constant": 3}.get(section.kind, 8)
    assert all(len(message) > 20 for message in refused)


@pytest.mark.parametrize(
    ("kind", "group", "place", "symbols", "match"),
    [
        ("constant", "header", 0, np.zeros((0, 4)), "one vector, not 0 rows"),
        ("table", "parts", 0, np.zeros((6, 0)), "0 columns in place of 1"),
        ("table", "parts", 0, np.full((6, 1), (1 << 31) - 1), "token ids up to"),
        ("table", "parts", 1, np.zeros((6, 3)), "do not fit a mean of 4"),
        ("affine", "header", 0, np.zeros((3, 2)), "does not fit a bias of 4"),
        ("components", "parts", 1, np.full((4, 3), 33), r"they lie in \[-32, 32\]"),
        ("components", "parts", 0, np.zeros((4, 2)), "do not fit a mean of 4"),
        ("dictionary", "header", 1, np.array([[0, 2, BIG, 0]]), r"flags has values from 0 to 1000000000"),
        ("dictionary", "parts", 1, np.full((10, 1), 505), "value steps has values from 505"),
        ("dictionary", "parts", 2, np.full((10, 1), 16), "value classes has values from 16"),
        ("skip-dictionary", "header", 2, np.zeros((4, 3)), "for outputs of 4"),
        ("random-dictionary", "header", 2, np.array([[0, 1 << 40]]), "a receiver draws"),
        ("random-dictionary", "header", 2, np.array([[-1, 10]]), "seed and size has values from -1"),
        ("random-dictionary", "parts", 0, np.zeros((10, 1)), "names a row twice"),
        ("random-dictionary", "parts", 0, np.full((10, 1), BIG), "array of rows has values"),
        ("token-pairs", "parts", 0, np.zeros((6, 1)), "belongs to no token"),
        ("token-pairs", "parts", 1, np.zeros((7, 1)), r"or \[6, 7\] keys"),
        ("token-pairs", "parts", 2, np.zeros((6, 3)), "do not fit a mean of 4"),
        ("sum", "header", 0, np.full((1, 8), 3), "does not fit its"),
        ("sum", "parts", 1, np.zeros((3, 1)), "all have as many"),
        ("predictor", "header", 1, np.zeros((4, 3)), r"a matrix \(4, 3\) does not fit"),
        ("predictor", "parts", 1, np.zeros((3, 3)), "an axis has one of each"),
        ("block-sparse", "header", 1, np.array([[257]]), "lie in"),
        ("fourier", "header", 1, np.array([[1, 3, 2]]), "a frequency of 6 turns"),
        ("fourier", "header", 2, np.ones((1, 2)), "2 amplitudes for 3 frequencies"),
        ("fourier-weights", "header", 4, np.ones((4, 5)), "for 3 frequencies"),
        ("block-sparse", "parts", 2, np.zeros((5, 3)), "do not fit a bias of 4"),
    ],
)
def test_decoders_say_what_does_not_fit(kind: str, group: str, place: int, symbols: np.ndarray, match: str) -> None:
    section = next(s for s in explanations(1e4) if s.kind == kind)
    with pytest.raises(MessageError, match=match):
        decoder_of(changed(section, group, place, QuantisedArray.from_integers(np.asarray(symbols, np.int64))))
