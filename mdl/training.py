"""What is known of a model's training: its loss against compute, measured or as a law. Read, checked, and recorded in
the task as plain data; `estimators.training_compute` does the arithmetic.

    L(C) = E + A C^-alpha          nats a token, C in floating-point operations
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mdl.errors import DataError, TaskError

CURVE, LAW = "loss curve", "scaling law"
COMPUTE_KEYS = ("flops", "tokens", "step")  # of a record of a loss curve, the first that it has
LOSS_KEYS = ("loss_nats", "loss")


def training_flops(parameters: float, tokens: float) -> float:
    """6 N D: forward and backward passes over D tokens (Kaplan et al. 2020, section 2.1)."""
    return 6.0 * parameters * tokens


def scaling_law(numbers: Sequence[float], flops: float | None) -> dict[str, Any]:
    """The record of a law E, A, alpha[, C].

    **Arguments:** `numbers`: E in nats, A, alpha for C in floating-point operations, and the model's own C; `flops`:
    that C, where it is known otherwise.

    **Raises:** `TaskError` for numbers that are no law, or no C.
    """
    known = [*numbers, flops] if len(numbers) == 3 and flops is not None else list(numbers)
    if len(known) == 3:
        raise TaskError(
            "a scaling law E,A,alpha needs the model's training compute: give E,A,alpha,C with C in floating-point "
            "operations, or say with --training-tokens how many tokens it was trained on (C = 6 N D)"
        )
    if len(known) != 4 or not all(math.isfinite(x) for x in known) or min(known) < 0 or min(known[1:]) == 0:
        raise TaskError(
            f"a scaling law {', '.join(f'{x:g}' for x in numbers)}: it is E,A,alpha or E,A,alpha,C of "
            "L(C) = E + A C^-alpha, E >= 0 in nats a token, the others positive, C in floating-point operations"
        )
    irreducible, coefficient, exponent, compute = map(float, known)
    return {
        "kind": LAW,
        "irreducible_nats": irreducible,
        "coefficient": coefficient,
        "exponent": exponent,
        "flops": compute,
    }


def read_loss_curve(path: Path, vocabulary: int) -> dict[str, Any]:
    """The record of a measured curve: JSON lines with `flops`, `tokens` or `step`, and `loss_nats` or `loss` (nats).

    Compute is wanted up to a factor only, so that tokens or steps do where the batch was constant. The last record is
    the model itself.

    **Raises:** `DataError` for a file that is no such curve.
    """
    try:
        records = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        key = next(k for k in COMPUTE_KEYS if all(k in r for r in records))
        loss = next(k for k in LOSS_KEYS if all(k in r for r in records))
        points = {"compute": [float(r[key]) for r in records], "loss_nats": [float(r[loss]) for r in records]}
    except (OSError, ValueError, TypeError, StopIteration) as error:
        raise DataError(
            f"{path} is no loss curve ({error or 'fields are missing'}): a JSON object a line, each with one of "
            f"{', '.join(COMPUTE_KEYS)} and {' or '.join(LOSS_KEYS)} (nats a token)"
        ) from error
    return loss_curve({**points, "unit": key, "final": points["compute"][-1] if points["compute"] else 0.0}, vocabulary)


def loss_curve(points: Mapping[str, Any], vocabulary: int) -> dict[str, Any]:
    """The record of a curve from `compute` and `loss_nats` (lists), `unit`, and `final`, the compute of the model.

    **Raises:** `DataError` unless compute increases, is positive and does not exceed `final`, and losses are finite.
    """
    compute, losses = points["compute"], points["loss_nats"]
    rising = all(a < b for a, b in zip([0.0, *compute], [*compute, math.inf], strict=True))
    if len(compute) < 2 or not rising or compute[-1] > points["final"] or not all(map(math.isfinite, losses)):
        raise DataError(
            f"a loss curve of {len(compute)} points up to {points['final']:g} {points['unit']}: it takes two or more, "
            "compute positive and increasing, losses finite. Was a resumed run's log joined to an earlier one?"
        )
    return {"kind": CURVE, "untrained_nats": math.log(vocabulary), **points}
