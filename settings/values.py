"""One value of one option: read from text by the option's type, checked, and written as YAML.

The type of the option decides what a text means, not YAML's own rules: `1e-3` is a number where a
number is expected, and `no` is never text by accident. A `RefusedError` tells the reason; the
caller knows the file and line.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from settings.addresses import shareable
from settings.schema import LARGEST_INT, REQUIRED, Option, Section, entry_values
from settings.terminal import is_control

NULL_WORDS = {"", "~", "null", "none"}
TRUE_WORDS = {"true", "yes", "on"}
FALSE_WORDS = {"false", "no", "off"}
_WORDS = NULL_WORDS | TRUE_WORDS | FALSE_WORDS

_NUMBER = re.compile(r"[+-]?([0-9]+(_[0-9]+)*\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")
_WHOLE = re.compile(r"[+-]?[0-9]+(_[0-9]+)*")
_NOT_FINITE = re.compile(r"[+-]?\.?(nan|inf|infinity)", re.IGNORECASE)
_PLAIN_TEXT = re.compile(r"[A-Za-z/][A-Za-z0-9_./-]*")
_LONGEST_SHOWN = 60
_LONGEST_NUMBER = 400


class RefusedError(ValueError):
    """An option does not take a value, or a name is unknown; the message says what was expected."""


@dataclass(frozen=True, slots=True)
class Scalar:
    """A value as the user wrote it, in a file or in a shell."""

    text: str
    quoted: bool = False
    shell: bool = False  # typed on the command line

    @property
    def is_null(self) -> bool:
        """Whether the text is a word for null."""
        return not self.quoted and self.text.lower() in NULL_WORDS


def read_scalar(option: Option, scalar: Scalar) -> Any:
    """Returns the value that `scalar` means for `option`; raises RefusedError."""
    text = scalar.text
    # Choices first: `none` is a scheduler in some files, and null everywhere else.
    if text.lower() in option.choices:
        return text.lower()
    if scalar.is_null:
        return check_value(option, None)
    if option.kind is str:
        # YAML 1.1 reads `no` as false. As a folder's name it must be quoted, else it is a mistake.
        if not scalar.quoted and text.lower() in TRUE_WORDS | FALSE_WORDS:
            remedy = f"'\"{text}\"'" if scalar.shell else f'"{text}"'
            raise RefusedError(f"expected text, got the word {text}. Quote it: {remedy}")
        return check_value(option, text)
    value = _parse(option, text)
    if value is not None and scalar.quoted:
        raise RefusedError(f'expected {expected(option)}, got the text "{text}". Remove the quotes')
    return check_value(option, text if value is None else value)


def check_value(option: Option, value: Any) -> Any:
    """Returns `value` in the option's type: 1 becomes 1.0 for a float. Raises RefusedError."""
    if option.entry_options:
        return _check_entries(option, value)
    if value is None:
        if option.optional:
            return None
        raise RefusedError(f"expected {expected(option)}, got null. {_default(option)}")
    if isinstance(value, str) and value in option.choices:
        return value
    if option.kind is float and type(value) is int and abs(value) <= LARGEST_INT:
        value = float(value)
    # `type`, not isinstance: True is an int to Python, and `batch_size: true` is a mistake.
    if type(value) is not option.kind:
        raise RefusedError(_wrong_type(option, value))
    if isinstance(value, str):
        _check_text(option, value)
    elif isinstance(value, (int, float)):
        _check_number(option, value)
    return value


def _check_entries(option: Option, entries: Any) -> Any:
    """Returns the entries of a list; raises RefusedError."""
    for entry in entries if isinstance(entries, tuple) else [entries]:
        if type(entry) is not option.kind:
            kind = option.kind.__name__ if option.kind else ""
            raise RefusedError(f"expected a tuple of {kind}, got {shown(entry)}")
        for own in option.entry_options:
            try:
                check_value(own, getattr(entry, own.name))
            except RefusedError as error:
                raise RefusedError(f"{own.name}: {error}") from None
    return entries


def expected(option: Option) -> str:
    """Returns what the option takes, for a message: 'a whole number', 'one of error, skip'."""
    if option.entry_options:
        keys = ", ".join(own.name for own in option.entry_options)
        return f"a list of entries with the keys {keys}"
    words = {bool: ["true", "false"], int: ["a whole number"], float: ["a number"], str: ["text"]}
    allowed = [*(words[option.kind] if option.kind else []), *option.choices]
    if len(allowed) == 1:
        return allowed[0]
    if option.kind is None:
        return "one of " + ", ".join(allowed)
    return f"{', '.join(allowed[:-1])} or {allowed[-1]}"


def shown(value: Any) -> str:
    """Returns a value as a message shows it: text in quotes, numbers and words as typed."""
    if isinstance(value, str):
        cut = _cut(shareable(value))  # before it is cut: a password ends at "@"
        bare = value and (_NUMBER.fullmatch(cut) or cut.lower() in _WORDS)
        return cut if bare else one_line(cut)
    if isinstance(value, (bool, int, float)) or value is None:
        return _cut(to_text(value))
    return f"a {type(value).__name__}"


def to_text(value: Any) -> str:
    """Returns YAML for a plain value, such that it reads back equal (here and elsewhere)."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return _float_text(value)
    if isinstance(value, Section):
        value = entry_values(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {to_text(each)}" for key, each in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(to_text, value)) + "]"
    if isinstance(value, str):
        # Only what no YAML reader takes for a date, a number or a boolean stays unquoted.
        plain = _PLAIN_TEXT.fullmatch(value) and value.lower() not in _WORDS | {"y", "n"}
        return value if plain else '"' + "".join(map(_escaped, value)) + '"'
    return str(value)


def one_line(text: str) -> str:
    """Returns text in single quotes on one line, with control characters escaped."""
    return "'" + "".join(_escaped(c) if is_control(c) else c for c in text) + "'"


def _parse(option: Option, text: str) -> bool | int | float | None:
    """Returns the boolean or number that `text` spells, or None."""
    if option.kind is bool:
        word = text.lower()
        return True if word in TRUE_WORDS else False if word in FALSE_WORDS else None
    if _NOT_FINITE.fullmatch(text):
        raise RefusedError(f"must be finite, got {text}. {_default(option)}")
    if len(text) > _LONGEST_NUMBER or not _NUMBER.fullmatch(text):
        return None
    if option.kind is float:
        return float(text)
    if _WHOLE.fullmatch(text):
        return int(text)
    # 1e3 is a whole number to people. Decimal, because a float would round 2**53 + 1.
    number = Decimal(text)
    whole = "e" in text.lower() and number == number.to_integral_value()
    return int(number) if whole else None


def _wrong_type(option: Option, value: Any) -> str:
    message = f"expected {expected(option)}, got {shown(value)}. "
    near = difflib.get_close_matches(str(value)[:100].lower(), option.choices, 1)
    return message + (f"Did you mean {near[0]}?" if near else _default(option))


def _check_number(option: Option, value: float) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise RefusedError(f"must be finite, got {shown(value)}. {_default(option)}")
    if not option.limits.allow(value):
        limits = option.limits.describe()
        raise RefusedError(f"must be {limits}, got {shown(value)}. {_default(option)}")
    if isinstance(value, int) and abs(value) > LARGEST_INT:
        raise RefusedError(f"must be at most 2**63 - 1, got {shown(value)}")


def _check_text(option: Option, value: str) -> None:
    if not value:
        raise RefusedError(f"must not be empty. {_default(option)}")
    bad = next((c for c in value if is_control(c)), None)
    if bad is not None:
        raise RefusedError(f"holds the control character U+{ord(bad):04X}, got {shown(value)}")
    if option.form is not None and not re.fullmatch(option.form.pattern, value):
        raise RefusedError(f"expected {option.form.text}, got {shown(value)}. {_default(option)}")


def _default(option: Option) -> str:
    if option.default is REQUIRED:
        return ""
    return f"The default is {to_text(option.default)}"


def _float_text(value: float) -> str:
    """Returns the shortest text that is the same float, with a point or an exponent."""
    text = repr(value)
    if value and not 1e-2 <= abs(value) < 1e6 and math.isfinite(value):
        mantissa, exponent = next(
            text.split("e")
            for text in (f"{value:.{n}e}" for n in range(17))
            if float(text) == value
        )
        text = f"{mantissa}e{int(exponent)}"
    return text


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "..."


def _escaped(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    code = ord(character)
    if 0x20 <= code < 0x7F or (character.isprintable() and code < 0xFFFE):
        return character
    if code <= 0xFF:
        return f"\\x{code:02X}"
    return f"\\u{code:04X}" if code <= 0xFFFF else f"\\U{code:08X}"
