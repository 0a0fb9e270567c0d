"""Numbers as people read them: counts with their noun, fractions, times, missing values."""

import time
from datetime import timedelta


def plural(count: int, noun: str, nouns: str = "") -> str:
    """Format a count with its noun: "1 document", "3,000 documents".

    Args:
        count: the number.
        noun: in the singular.
        nouns: in the plural; default: the noun with an s.
    """
    return f"{count:,} {noun if count == 1 else nouns or f'{noun}s'}"


def format_percent(fraction: float) -> str:
    """Format a fraction as per cent with two significant digits below 10 %, else without decimals.

    Only all is 100 % and only nothing is 0 %.
    """
    percent = 100 * fraction
    if percent == 0 or percent >= 100:
        return f"{percent:.0f} %"
    if percent < 10:
        return f"{percent:.2g} %" if percent >= 0.001 else "< 0.001 %"
    return f"{percent:.0f} %" if percent < 99 else f"{min(percent, 99.9):.3g} %"


def format_duration(seconds: float) -> str:
    """Format seconds as H:MM:SS, with the days in front if there are any."""
    return str(timedelta(seconds=round(seconds)))


def format_time(seconds: float | None = None) -> str:
    """Format a time as local time: ``2026-01-31T12:34:56``.

    Args:
        seconds: since 1970; None: now.
    """
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(seconds))


def format_value(value: float | None, pattern: str = "{:.4f}") -> str:
    """Format a number; None becomes a dash."""
    return "–" if value is None else pattern.format(value)


def ratio_or_none(value: float | None, reference: float | None) -> float | None:
    """Compute ``value / reference``; None if either is missing or the reference is zero."""
    return None if value is None or not reference else value / reference
