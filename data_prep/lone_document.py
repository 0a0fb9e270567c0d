"""A corpus of one document has no second one to hold out: its end becomes the validation split."""


def place_to_cut(text: bytes, share: float) -> int:
    """Where the validation part of a lone document begins.

    That is behind the empty line, else line break, sentence or word whose end is nearest to the last ``share`` of the text and not
    farther from it than half of that; else at a character. All of the text is training text if it is too short.

    Args:
        text: UTF-8.
        share: of the text to hold out, above 0 and below 1.

    Returns:
        A number of bytes, above 0, up to ``len(text)``.
    """
    size = len(text.rstrip())
    wanted = round(size * (1 - share))
    reach = int(size * min(share, 1 - share) / 2)
    low, high = max(1, wanted - reach), min(size - 1, wanted + reach)
    for end in (b"\n\n", b"\n", "。".encode(), b". ", b"! ", b"? ", b" "):
        before = text.rfind(end, max(0, low - len(end)), wanted) + len(end)
        after = text.find(end, max(0, wanted - len(end)), high) + len(end)
        places = [place for place in (before, after) if low <= place <= high and text.endswith(end, 0, place)]
        if places:
            return min(places, key=lambda place: abs(place - wanted))
    while 0 < wanted < size and text[wanted] & 0xC0 == 0x80:  # inside a character
        wanted -= 1
    return wanted if 0 < wanted < size else len(text)
