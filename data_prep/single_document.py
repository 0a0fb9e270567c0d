"""Split a corpus of a single document, whose end becomes the validation split."""


def validation_offset(text: bytes, fraction: float) -> int:
    """Find the byte offset at which the validation part of a single document begins.

    The text is cut after the paragraph, else the line, the sentence or the word that ends nearest
    to the start of the last ``fraction`` of the text, within half of that fraction; else between
    two characters. A text that is too short is training text as a whole.

    Args:
        text: UTF-8.
        fraction: Fraction of the text to hold out, above 0 and below 1.

    Returns:
        An offset in bytes, above 0, up to ``len(text)``.
    """
    size = len(text.rstrip())
    target = round(size * (1 - fraction))
    reach = int(size * min(fraction, 1 - fraction) / 2)
    low = max(1, target - reach)
    high = min(size - 1, target + reach)

    # From the most to the least natural cut.
    for end in (b"\n\n", b"\n", "。".encode(), b". ", b"! ", b"? ", b" "):
        before = text.rfind(end, max(0, low - len(end)), target) + len(end)
        after = text.find(end, max(0, target - len(end)), high) + len(end)
        offsets = [
            offset
            for offset in (before, after)
            if low <= offset <= high and text.endswith(end, 0, offset)
        ]
        if offsets:
            return min(offsets, key=lambda offset: abs(offset - target))

    while 0 < target < size and text[target] & 0xC0 == 0x80:  # inside a character
        target -= 1
    return target if 0 < target < size else len(text)
