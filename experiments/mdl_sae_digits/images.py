"""Images as rows of numbers: scikit-learn's digits, or an MNIST file of images in the idx format."""

from __future__ import annotations

import gzip
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mdl.errors import DataError
from mdl.models import Vectors

IDX_IMAGES = 0x00000803  # unsigned bytes, three axes


@dataclass(frozen=True)
class Images:
    """Grey values as `vectors` [n, side * side], of pictures [side, side]; `levels`: grey values run from 0 to it."""

    vectors: Vectors
    side: int
    levels: int


def digits() -> Images:
    """The 1,797 digits of 8 x 8 that come with scikit-learn, grey values 0 to 16."""
    from sklearn.datasets import load_digits

    return Images(Vectors.of(load_digits().data, "digits"), 8, 16)


def mnist(path: Path) -> Images:
    """An idx file of images, gzip or plain, grey values 0 to 255. **Raises:** `DataError` if it is not one."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        magic, count, height, width = struct.unpack(">4I", data[:16])
    except (OSError, EOFError, struct.error) as error:
        raise DataError(f"{path} is no readable idx file ({error})") from error
    if magic != IDX_IMAGES or height != width or len(data) != 16 + count * height * width:
        raise DataError(
            f"{path}: magic {magic:#x}, {count} x {height} x {width}, {len(data)} bytes: expected {IDX_IMAGES:#x} and "
            "square images, such as t10k-images-idx3-ubyte.gz"
        )
    pixels = np.frombuffer(data, np.uint8, offset=16).reshape(count, height * width)
    return Images(Vectors.of(pixels, "mnist"), height, 255)
