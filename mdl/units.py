"""The only place where nats become bits."""

from __future__ import annotations

import math
from typing import Any

LN2 = math.log(2.0)


def nats_to_bits(nats: Any) -> Any:
    """`nats / ln 2`, for a number or an array of numbers."""
    return nats / LN2


def bits_to_nats(bits: Any) -> Any:
    """`bits * ln 2`, for a number or an array of numbers."""
    return bits * LN2
