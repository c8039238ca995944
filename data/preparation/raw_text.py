"""Reads text files, JSON lines and parquet rows: as documents, or in pieces for parallel workers.

The ending tells JSON lines and parquet files; a file of any other ending is text. A piece is about
1 MB of one file: a range of bytes, or of rows of a row group. All pieces are planned before
anything is read, so that any process can read any piece, memory is bounded, and the progress of a
conversion is the number of its pieces that are done.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from config import DataError
from data.preparation.errors import read_error
from data.sources.parquet.index import read_footer, text_column
from data.sources.parquet.text_column import choose_column
from data.tokenizers.base import Tokenizer

_JSON_ENDINGS, _PARQUET_ENDING = (".jsonl", ".ndjson", ".json"), ".parquet"
PIECE_BYTES = 1 << 20
_DOCUMENT_BYTES = 1 << 14
_MAX_PIECES_PER_GROUP = 16
_SAMPLE_BYTES = 1 << 16
_CUT_SEARCH_BYTES, _CUT_CONTEXT, _CUT_TRIALS = 4096, 256, 200


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a file that one worker reads.

    `first` and `last` are bytes of a text, bytes between which JSON lines begin, or rows of the row
    group `group`; `last` is exclusive.
    """

    path: Path
    first: int
    last: int
    bytes: int
    group: int = 0
    is_end: bool = True
    """Whether the file ends with this piece."""


def is_text(path: Path) -> bool:
    """Returns whether a file is read as text, not as records."""
    return path.suffix.lower() not in (*_JSON_ENDINGS, _PARQUET_ENDING)


def find_non_text(path: Path) -> int | None:
    """Returns the first byte of the file's first 64 KB that is zero or not UTF-8; None: all are."""
    data = _read(path, 0, _SAMPLE_BYTES)
    if 0 in data:
        return data.index(0)
    try:
        codecs.getincrementaldecoder("utf-8")().decode(data)  # may end within a character
    except UnicodeDecodeError as error:
        return error.start
    return None


def check_readable(path: Path) -> None:
    """Raises DataError for a file that is neither text nor, by its ending, records."""
    at = find_non_text(path) if is_text(path) and path.suffix != ".txt" else None
    if at is not None:
        raise DataError(
            f"{path}: not text in UTF-8 (byte {at}). Unpack archives, convert other encodings "
            "(iconv -f LATIN1 -t UTF-8 FILE), name files of records .jsonl or .parquet; token "
            "files are used as they are: python train.py train_data_path=FILE"
        )


def find_text_column(files: Sequence[Path]) -> str | None:
    """Returns the column or key of the text in the first file of records; None if there is none.

    Raises DataError if several could be meant.
    """
    for path in files:
        if path.suffix.lower() == _PARQUET_ENDING:
            return text_column(str(path))
        if not is_text(path):
            first = next(_json_records(path, 0, file_size(path)), None)
            if first is not None:
                record = first[1]
                strings = [key for key, value in record.items() if isinstance(value, str)]
                return choose_column(list(record), strings, str(path))
    return None


def plan_pieces(files: Sequence[Path], column: str) -> list[Piece]:
    """Returns the pieces of all files, in order; raises DataError for an unreadable file."""
    pieces: list[Piece] = []
    for path in files:
        if path.suffix.lower() == _PARQUET_ENDING:
            pieces += _plan_row_groups(path, column)
            continue
        size = file_size(path)
        for first in range(0, size, PIECE_BYTES):
            last = min(first + PIECE_BYTES, size)
            pieces.append(Piece(path, first, last, last - first, is_end=last == size))
    return pieces


def _plan_row_groups(path: Path, column: str) -> Iterator[Piece]:
    for group, (rows, _, size, *_) in enumerate(read_footer(str(path), column)[0].tolist()):
        # The limit bounds the work: each piece of a row group decodes the rows before its own too.
        count = max(1, min(-(-size // PIECE_BYTES), _MAX_PIECES_PER_GROUP, rows))
        for n in range(count):
            yield Piece(path, rows * n // count, rows * (n + 1) // count, size // count, group)


def read_records(piece: Piece, column: str) -> Iterator[str]:
    """Yields the documents of a piece of JSON lines or parquet rows, empty ones included."""
    if piece.path.suffix.lower() in _JSON_ENDINGS:
        yield from _json_lines(piece.path, column, piece.first, piece.last)
    else:
        yield from _parquet_rows(piece, column)


def read_text(piece: Piece, tokenizer: Tokenizer | None) -> str:
    """Returns the text of a piece of a text file.

    Its ends are moved to places where cutting the text changes none of the tokenizer's tokens; with
    None, to the next character.
    """
    size = file_size(piece.path)
    first, last = (_find_cut(piece.path, at, size, tokenizer) for at in (piece.first, piece.last))
    return _decode(_read(piece.path, first, last), piece.path, first)


def _find_cut(path: Path, at: int, size: int, tokenizer: Tokenizer | None) -> int:
    """Returns the first place at or after byte `at` where the text can be cut.

    The pieces on both sides of `at` call it, with the same result.
    """
    if at in (0, size):
        return at
    begin = max(0, at - 4 * _CUT_CONTEXT)  # a character has at most 4 bytes
    data = _read(path, begin, min(size, at + _CUT_SEARCH_BYTES + 4 * _CUT_CONTEXT))
    while at < begin + len(data) and data[at - begin] & 0xC0 == 0x80:  # inside a character
        at += 1
    if tokenizer is None:
        return at
    text = data[at - begin :].decode("utf-8", "ignore")
    before = data[: at - begin].decode("utf-8", "ignore")[-_CUT_CONTEXT:]
    both, start = before + text, len(before)
    end = max(start + 1, len(both) - _CUT_CONTEXT)
    # Most vocabularies have no token that reaches from a letter to a blank, so places before a
    # blank come first. Vocabularies differ, so each place is tried: encoding both sides apart must
    # give the tokens of the text in one. If no place does, the piece is cut at `at`, and a few
    # tokens there differ.
    blanks = [i for i in range(start, end) if both[i] == " " and not both[i - 1 : i].isspace()]
    for i in [*blanks, *range(start, end)][:_CUT_TRIALS]:
        left, right = both[max(0, i - _CUT_CONTEXT) : i], both[i : i + _CUT_CONTEXT]
        apart = [*tokenizer.encode(left).tolist(), *tokenizer.encode(right).tolist()]
        if apart == tokenizer.encode(left + right).tolist():
            return at + len(both[start:i].encode())
    return at


def read_documents(path: Path, column: str) -> Iterator[str]:
    """Yields the documents of a file that hold text; a text is cut at line ends into 16 KiB."""
    if is_text(path):
        yield from filter(None, _cut_at_lines(path))
        return
    for piece in plan_pieces([path], column):
        yield from filter(None, read_records(piece, column))


def _cut_at_lines(path: Path) -> Iterator[str]:
    """Yields a text in parts of whole lines, of at most about 16 KiB."""
    lines: list[str] = []
    size = 0
    for line in _lines(path):
        if size + len(line) > _DOCUMENT_BYTES and lines:
            yield "".join(lines)
            lines, size = [], 0
        lines.append(line)
        size += len(line)
    yield "".join(lines)


def _lines(path: Path) -> Iterator[str]:
    rest, at, size = "", 0, file_size(path)
    while at < size:
        end = _find_cut(path, min(at + PIECE_BYTES, size), size, None)
        lines = (rest + _decode(_read(path, at, end), path, at)).splitlines(keepends=True)
        rest, at = lines.pop(), end  # the last line may be unfinished, or end between \r and \n
        yield from lines
    yield rest


def _json_lines(path: Path, key: str, first: int, last: int) -> Iterator[str]:
    """Yields the texts of the lines that begin in bytes [first, last)."""
    for at, record in _json_records(path, first, last):
        yield _json_text(record, key, path, at)


def _json_records(path: Path, first: int, last: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the records of the lines that begin in bytes [first, last), each after its byte."""
    try:
        with path.open("rb") as file:
            # From one byte earlier: the line end there shows that a line begins at `first`.
            at = max(first - 1, 0)
            file.seek(at)
            at += len(file.readline() if first else b"")
            for line in file:
                if at >= last:
                    return
                if line.strip():
                    yield at, _json_record(line, path, at)
                at += len(line)
    except OSError as error:
        raise read_error(path, error) from None


def _json_record(line: bytes, path: Path, at: int) -> dict[str, Any]:
    """Returns the record of a line that begins at byte `at`."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{_line_name(path, at)}: not JSON ({error}); every line is one record"
        ) from None
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise DataError(f"{_line_name(path, at)}: {kind}, not an object; every line is one record")
    return record


def _json_text(record: dict[str, Any], key: str, path: Path, at: int) -> str:
    """Returns the text of the record whose line begins at byte `at`."""
    text = record.get(key)
    if not isinstance(text, str):
        keys = ", ".join(record)
        raise DataError(
            f"{_line_name(path, at)}: no string '{key}'; found: {keys}. Use --text-column NAME"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        surrogate = f"\\u{ord(text[error.start]):04x}"
        raise DataError(
            f"{_line_name(path, at)}: '{key}' holds {surrogate} (character {error.start}), half of "
            "a surrogate pair, which is not text. Correct or delete the line."
        ) from None
    return text


def _line_name(path: Path, at: int) -> str:
    """Returns file and number of the line at a byte; lines are counted only for an error."""
    # Workers begin in the middle of a file and do not know the line's number.
    number = 1
    for first in range(0, at, PIECE_BYTES):
        number += _read(path, first, min(first + PIECE_BYTES, at)).count(b"\n")
    return f"{path}:{number}"


def _parquet_rows(piece: Piece, column: str) -> Iterator[str]:
    row = 0
    try:
        with pq.ParquetFile(
            piece.path, page_checksum_verification=True, pre_buffer=False, buffer_size=1 << 16
        ) as source:
            # Few rows at a time bound the memory: a row group may hold gigabytes of text. No
            # threads: the caller has a process for each core.
            for batch in source.iter_batches(256, [piece.group], [column], use_threads=False):
                if row >= piece.last:
                    return
                rows = batch.column(0)
                used = rows.slice(max(piece.first - row, 0), piece.last - max(row, piece.first))
                row += len(rows)
                yield from (text or "" for text in used.to_pylist())
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{piece.path}: cannot be decoded, the file is damaged ({error})") from None


def file_size(path: Path) -> int:
    """Returns a file's bytes; raises DataError."""
    try:
        return path.stat().st_size
    except OSError as error:
        raise read_error(path, error) from None


def file_sample(path: Path) -> bytes:
    """Returns the first 64 KB and the size of a file, which tell it from others."""
    return _read(path, 0, _SAMPLE_BYTES) + str(file_size(path)).encode()


def _read(path: Path, first: int, last: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(first)
            return file.read(last - first)
    except OSError as error:
        raise read_error(path, error) from None


def _decode(data: bytes, path: Path, first: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        at = first + error.start
        raise DataError(f"{path}: not UTF-8 (byte {at}). Convert it first.") from None
