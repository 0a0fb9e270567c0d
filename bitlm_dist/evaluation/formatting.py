"""Format and divide report values that may be missing."""


def format_value(value: float | None, pattern: str = "{:.4f}") -> str:
    """Format a number; None becomes a dash."""
    return "–" if value is None else pattern.format(value)


def ratio_or_none(value: float | None, reference: float | None) -> float | None:
    """Compute ``value / reference``; None if either is missing or the reference is zero."""
    return None if value is None or not reference else value / reference
