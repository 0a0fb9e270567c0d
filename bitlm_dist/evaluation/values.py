"""Numbers of a report that may have no value: how they are divided and shown."""


def shown(value: float | None, pattern: str = "{:.4f}") -> str:
    """A number as text; a dash where there is none."""
    return "–" if value is None else pattern.format(value)


def ratio_of(value: float | None, reference: float | None) -> float | None:
    """``value / reference``; None where either has no value or the reference is zero."""
    return None if value is None or not reference else value / reference
