"""Text that is fit to be shown: names from a disk and values from a file may hold anything."""

from __future__ import annotations

import json
import reprlib
import unicodedata
from typing import Any

_LONGEST = 120
_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
"""Categories of control characters, direction marks, halves of characters (bytes that are not UTF-8), line ends."""

_values = reprlib.Repr()
_values.maxstring = _values.maxother = _values.maxlong = 60
_values.maxlevel = 3


def is_plain(text: str) -> bool:
    """Whether a text has only characters that can be seen."""
    return text.isprintable() or not any(unicodedata.category(character) in _HIDDEN for character in text)


def escaped(text: str, keep: str = "") -> str:
    """A text with what cannot be seen, or would move a terminal's cursor, as `\\n`, `\\x1b` or `\\udcff`.

    Args:
        text: any.
        keep: characters that stay as they are, such as a newline.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character in keep or unicodedata.category(character) not in _HIDDEN else _escape(character)
        for character in text
    )


def shown(value: Any) -> str:
    """A value for a message: one line of bounded length, whatever it is."""
    try:
        text = _values.repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits
        text = f"a {type(value).__name__}"
    return shortened(" ".join(text.split()))


def shortened(text: str, longest: int = _LONGEST) -> str:
    """The beginning of a text, what cannot be seen escaped."""
    return escaped(text if len(text) <= longest else f"{text[:longest]}... ({len(text)} characters)")


def read_json(content: str | bytes) -> Any:
    """What a JSON text says, bytes in UTF-8 whatever the locale.

    Raises:
        ValueError: it is not JSON, is nested too deeply, or holds an integer of thousands of digits.
    """
    try:
        return json.loads(content.decode() if isinstance(content, bytes) else content)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def is_whole(value: Any, least: int = 0) -> bool:
    """Whether a value of a file is a whole number from `least` that fits 63 bits."""
    return type(value) is int and least <= value < 2**63


def is_number(value: Any) -> bool:
    """Whether a value of a file is a number that a float can hold; NaN and infinity are."""
    return type(value) is float or (type(value) is int and abs(value) < 2**1000)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()
