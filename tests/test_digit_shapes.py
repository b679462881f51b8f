"""The statistic of what a feature looks like recognises what it is named after; idx files are read and refused."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from experiments.mdl_sae_digits.images import digits, mnist
from experiments.mdl_sae_digits.shapes import KINDS, describe, digit_threshold
from mdl.errors import DataError


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return digits().vectors.rows[:600]


def kinds(rows: list[np.ndarray], images: np.ndarray) -> list[str]:
    threshold = digit_threshold(images[:400], images[400:])
    return [KINDS[k] for k in describe(np.array([r.reshape(-1) for r in rows]), images[:400], threshold).kind]


def bars() -> list[np.ndarray]:
    upright, level, slanting = (np.zeros((8, 8)) for _ in range(3))
    upright[1:7, 3:5] = 1.0
    level[4, 2:6] = 1.0
    slanting[np.arange(1, 7), np.arange(1, 7)] = slanting[np.arange(1, 6), np.arange(2, 7)] = 1.0
    return [upright, level, slanting]


def test_bars_are_segments(images: np.ndarray) -> None:
    assert kinds(bars(), images) == ["segment"] * 3
    noisy = [bar - 0.2 * np.abs(np.random.default_rng(0).standard_normal((8, 8))) for bar in bars()]
    assert kinds(noisy, images) == ["segment"] * 3


def test_dots_are_fragments(images: np.ndarray) -> None:
    dot, three = np.zeros((8, 8)), np.zeros((8, 8))
    dot[2, 5] = three[2, 5] = three[2, 6] = three[3, 5] = 1.0
    assert kinds([dot, three], images) == ["fragment"] * 2


def test_memorised_images_are_digits(images: np.ndarray) -> None:
    centred = images[:400] - images[:400].mean(0)
    assert set(kinds(list(centred[:50]), images)) == {"digit"}
    assert set(kinds(list(3.0 * centred[:50]), images)) == {"digit"}  # whatever their length


def test_blobs_are_other(images: np.ndarray) -> None:
    blob, two = np.zeros((8, 8)), np.zeros((8, 8))
    blob[2:6, 2:6] = 1.0
    two[1:3, 1:3] = two[5:7, 5:7] = 1.0  # apart, though the two together are elongated
    assert kinds([blob, two], images) == ["other"] * 2


def test_noise_is_mostly_fragments_and_never_a_digit(images: np.ndarray) -> None:
    """A row of noise has a few highest pixels: it passes for a fragment, which is what a useless row is, too."""
    noise = np.random.default_rng(1).standard_normal((100, 8, 8))
    found = kinds(list(noise), images)
    assert "digit" not in found
    assert found.count("segment") < 5


def test_ink_taken_away_is_no_segment(images: np.ndarray) -> None:
    row = 0.4 * bars()[0] - (1.0 - bars()[0])
    assert kinds([row, -np.ones((8, 8))], images)[0] != "segment"


def test_figures_of_a_bar(images: np.ndarray) -> None:
    shapes = describe(bars()[1].reshape(1, -1), images, 2.0)
    assert shapes.area[0] == 4 / 64
    assert shapes.elongation[0] == pytest.approx(4.0)  # (16 - 1) / 12 + 1 / 12 over 1 / 12
    assert shapes.positive[0] == 1.0
    assert shapes.shares(np.ones(1)) == {"digit": 0.0, "fragment": 0.0, "segment": 1.0, "other": 0.0}


def test_the_threshold_is_what_half_of_the_images_reach(images: np.ndarray) -> None:
    threshold = digit_threshold(images[:400], images[400:])
    mean = images[:400].mean(0)
    near = describe(images[400:] - mean, images[:400], threshold).cosine >= threshold
    assert near.mean() == pytest.approx(0.5, abs=0.01)


def test_idx_files(tmp_path: Path) -> None:
    pixels = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4)
    header = struct.pack(">4I", 0x803, 3, 4, 4)
    (tmp_path / "some.gz").write_bytes(gzip.compress(header + pixels.tobytes()))
    found = mnist(tmp_path / "some.gz")
    assert np.array_equal(found.vectors.rows, pixels.reshape(3, 16))
    assert (found.side, found.levels) == (4, 255)
    (tmp_path / "short").write_bytes(header + pixels.tobytes()[:-1])
    with pytest.raises(DataError, match="expected 0x803"):
        mnist(tmp_path / "short")
    (tmp_path / "no.gz").write_bytes(b"no idx file")
    with pytest.raises(DataError, match="no readable idx file"):
        mnist(tmp_path / "no.gz")
