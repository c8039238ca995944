"""Text that may be printed: names of files can hold anything, escape sequences included."""

from __future__ import annotations

import unicodedata

_LAYOUT = "\n\t"


def is_control(character: str) -> bool:
    """Return whether a terminal may act on the character, or an output encoding refuse it."""
    return unicodedata.category(character) in {"Cc", "Cs"}


def printable(text: str) -> str:
    """Return text with control characters as `\\x1B`, and bytes of a file's name that are not
    UTF-8 as `\\xFF`; line ends and tabs stay."""
    if text.isprintable():
        return text
    return "".join(c if c in _LAYOUT or not is_control(c) else _escaped(ord(c)) for c in text)


def _escaped(code: int) -> str:
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps a byte that is not UTF-8
        code -= 0xDC00
    return f"\\x{code:02X}" if code <= 0xFF else f"\\u{code:04X}"
