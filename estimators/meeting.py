"""A step is moved until a measured KL meets its target: by secants of the logarithms, bracketed once there is one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol, TypeVar, runtime_checkable

USUAL_SLOPE = 1.7  # d ln KL / d ln step before it was measured: a little under the quadratic law, for dead zones
LARGEST_MOVE = 1.5  # of ln step at a time
NARROW = 1e-3  # brackets of ln step below this are left alone


@runtime_checkable
class Measured(Protocol):
    """What a trial of a step gives."""

    @property
    def step(self) -> float: ...

    @property
    def kl(self) -> float: ...


T = TypeVar("T", bound=Measured)


def meet(trial: Callable[[float], T], step: float, eps: float, tolerance: float, most: int = 8) -> list[T]:
    """Trials of steps until one's KL is within a relative `tolerance` of `eps`; at most so many. The nearest is last.

    **Arguments:** `trial`: measures a step (it may use one nearby: what counts is the `step` that it returns); `step`:
    where to begin; `eps`: the KL wanted, in the trials' unit.
    """
    found: list[T] = []
    for _ in range(most):
        found.append(trial(step))
        if abs(_gap(found[-1], eps)) < tolerance:
            break
        following = _next(found, eps)
        if min(abs(math.log(following / t.step)) for t in found) < NARROW:
            break
        step = following
    return sorted(found, key=lambda t: -abs(_gap(t, eps)))


def _gap(measured: Measured, eps: float) -> float:
    return math.log(max(measured.kl, 1e-30) / eps)


def _next(found: list[T], eps: float) -> float:
    """The secant's step between the nearest trials on either side of eps, or beyond the last where all are on one."""
    below = [t for t in found if _gap(t, eps) <= 0]
    above = [t for t in found if _gap(t, eps) > 0]
    if below and above:
        low, high = max(below, key=lambda t: t.kl), min(above, key=lambda t: t.kl)
        share = _gap(low, eps) / (_gap(low, eps) - _gap(high, eps))
        a, b = math.log(low.step), math.log(high.step)
        return math.exp(a + min(max(share, 0.1), 0.9) * (b - a))
    slope = USUAL_SLOPE
    if len(found) > 1:
        run = math.log(found[-1].step / found[-2].step)
        rise = _gap(found[-1], eps) - _gap(found[-2], eps)
        slope = min(max(rise / run, 0.4), 4.0) if abs(run) > 1e-9 else USUAL_SLOPE
    move = min(max(_gap(found[-1], eps) / slope, -LARGEST_MOVE), LARGEST_MOVE)
    return found[-1].step * math.exp(-move)
