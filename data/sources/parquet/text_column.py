"""Which column of parquet files, or key of JSON records, holds the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from config import DataError

AUTO = "auto"
"""In place of a name: the column that `choose_column` finds."""
USUAL_NAMES = ("text", "content", "raw_content", "document", "article", "body", "code")
OPTION = "dataset.text_column=NAME"
"""What errors propose; prepare.py puts its own option in its place."""


def choose_column(names: Sequence[str], strings: Sequence[str], place: str) -> str:
    """Returns the column of the text: the first of USUAL_NAMES, or the only one of strings.

    Args:
        names: all columns.
        strings: those that hold strings.
        place: the file, for errors.

    Raises DataError if several columns could be meant, or none.
    """
    # A usual name counts even if it does not hold strings: reading it says so and names the
    # remedy, where the only column of strings may be an id.
    for known in (strings, names):
        for name in USUAL_NAMES:
            if name in known:
                return name
    if len(strings) == 1:
        return strings[0]
    listed = ", ".join(strings[:20]) or "none"
    raise DataError(
        f"{place}: none of its columns has a usual name ({', '.join(USUAL_NAMES)}), so which one "
        f"holds the text? Columns of strings: {listed}. Name one: {OPTION}"
    )


def find_column(metadata: Any, place: str) -> str:
    """Returns the column of the text of a parquet file, from its footer; see `choose_column`."""
    names = metadata.schema.to_arrow_schema().names
    return choose_column(names, _string_columns(metadata), place)


def column_number(metadata: Any, column: str, place: str) -> int:
    """Returns the number of the text column; raises DataError unless it is one of strings."""
    schema = metadata.schema
    for number in range(metadata.num_columns):
        if schema.column(number).path == column and _holds_strings(schema.column(number)):
            return number
    arrow = schema.to_arrow_schema()
    if column not in arrow.names:
        names = ", ".join(arrow.names[:20]) or "none"
        raise DataError(f"{place}: no column '{column}'; columns: {names}. Set {OPTION}")
    strings = ", ".join(_string_columns(metadata)) or "none"
    kind, name = arrow.field(column).type, repr(column)
    remedy = f"Name one of these: {OPTION}"
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        remedy += f"; or store strings, in pandas: df[{name}] = df[{name}].str.decode('utf-8')"
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        remedy += f"; or store one string in each row, in pandas: df = df.explode({name})"
    raise DataError(
        f"{place}: column '{column}' is {kind}, not string; string columns: {strings}. {remedy}"
    )


def _string_columns(metadata: Any) -> list[str]:
    schema = metadata.schema
    leaves = (schema.column(number) for number in range(metadata.num_columns))
    # By path: a nested field may have the name of a column.
    top = set(schema.to_arrow_schema().names)
    return [leaf.path for leaf in leaves if leaf.path in top and _holds_strings(leaf)]


def _holds_strings(leaf: Any) -> bool:
    is_string = leaf.physical_type == "BYTE_ARRAY" and leaf.logical_type.type == "STRING"
    return bool(is_string and leaf.max_repetition_level == 0)
