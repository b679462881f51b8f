"""Numbers for human eyes: three significant digits, k and M, errors in the digits that they leave uncertain."""

from __future__ import annotations

import math

from mdl.ledger import Interval

_SUFFIXES = ("", "k", "M", "G", "T", "P", "E")


def human(value: float | int) -> str:
    """Three significant digits with k, M, G...: 0.0533, 104, 1.23M."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    rounded = float(f"{value:.2e}")
    if rounded == 0:
        return "0"
    size = math.floor(math.log10(abs(rounded)))
    if size < -3:
        mantissa, exponent = f"{abs(value):.1e}".split("e")
        return _sign(value) + f"{mantissa}e-{abs(int(exponent))}"
    power = min(max(size // 3, 0), len(_SUFFIXES) - 1)
    digits = max(0, 2 - (size - 3 * power))
    return _sign(value) + f"{abs(rounded) / 1000**power:.{digits}f}{_SUFFIXES[power]}"


def count(value: float | int) -> str:
    """As `human`, without zeros that say nothing: 1, 10, 1k, 1.2M. For numbers of tokens."""
    text = human(value)
    number = text.rstrip("kMGTPE")
    suffix = text[len(number) :]
    return (number.rstrip("0").rstrip(".") if "." in number and "e" not in number else number) + suffix


def with_error(value: float | int, stderr: float | int) -> str:
    """A figure and its standard error, to the error's leading digit: 103.9 ±0.8. Exact figures stand alone."""
    if stderr == 0:
        return human(value)
    if not math.isfinite(stderr):
        return f"{human(value)} ±?"
    # Two decimals at most, or as many as three significant digits of a small figure take.
    most = max(2, 2 - math.floor(math.log10(abs(value)))) if value else 2
    digits = min(max(-math.floor(math.log10(stderr)), 0), most, 6)
    shown = f"{stderr:.{digits}f}"
    return f"{_sign(value)}{abs(value):.{digits}f} ±{shown if float(shown) else f'<{10.0**-digits:.{digits}f}'}"


def percent(fraction: float | int) -> str:
    """A fraction as a percentage of three significant digits: 31.2%, 0.1%, −4.05%."""
    if not math.isfinite(fraction):
        return human(fraction)
    value = 100 * fraction
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    text = f"{abs(value):.{digits}f}"
    return (_sign(value) if float(text) else "") + text + "%"


def fidelity_text(fidelity: float | int) -> str:
    """A fidelity as people say it: 1 %, 0.1 %."""
    return f"{100 * fidelity:.4g} %"


def interval_text(interval: Interval) -> str:
    """The interval of a number of tokens: [720–850]."""
    return f"[{count(interval.low)}–{count(interval.high)}]"


def _sign(value: float | int) -> str:
    return "−" if value < 0 else ""
