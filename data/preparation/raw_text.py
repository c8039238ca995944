"""Text files, JSON lines and parquet rows as documents, and the pieces that are read in parallel.

Endings tell JSON lines and parquet files; a file of any other ending is text. A piece is about
1 MB of one file (bytes of text or lines, rows of a row group), named before anything is read. So
pieces can be read by any process in any order, memory is bounded, and what is done can be told by a
number.
"""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from config import DataError
from data.sources.parquet_index import read_footer
from data.tokenizers.base import Tokenizer

_LINES, _ROWS = (".jsonl", ".ndjson", ".json"), (".parquet",)
ENDINGS = (".txt", ".jsonl", ".ndjson", ".parquet")
"""Of the files that are meant where a folder holds others too."""
PIECE_BYTES = 1 << 20
_DOCUMENT_BYTES = 1 << 14
_MOST_PARTS = 16  # of a row group: each decodes the rows before its own
_SEARCH_BYTES, _CONTEXT = 4096, 256
_TRIED_PLACES = 200


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes [first, last) of a text or of the places where lines begin, or rows of a row group."""

    path: Path
    first: int
    last: int
    bytes: int
    group: int = 0
    is_end: bool = True
    """Whether the file ends with it."""


def is_text(path: Path) -> bool:
    """Whether a file is read as text, not as records."""
    return path.suffix.lower() not in (*_LINES, *_ROWS)


def not_text_at(path: Path) -> int | None:
    """Where the first 64 KB of a file stop being text in UTF-8: at a zero byte, or by decoding."""
    data = _read(path, 0, 1 << 16)
    if 0 in data:
        return data.index(0)
    try:
        codecs.getincrementaldecoder("utf-8")().decode(data)  # may end within a character
    except UnicodeDecodeError as error:
        return error.start
    return None


def check_readable(path: Path) -> None:
    """Raises DataError for a file that is neither text nor records by its ending."""
    at = not_text_at(path) if is_text(path) and path.suffix != ".txt" else None
    if at is not None:
        raise DataError(
            f"{path}: not text in UTF-8 (byte {at}). Unpack archives, convert other encodings "
            "(iconv -f LATIN1 -t UTF-8 FILE); records are told by the endings .jsonl and .parquet, "
            "and token files need no preparing: python train.py train_data_path=FILE"
        )


def plan_pieces(files: Sequence[Path], column: str) -> list[Piece]:
    """The pieces of all files, in order; raises DataError for a file that cannot be read."""
    pieces: list[Piece] = []
    for path in files:
        if path.suffix.lower() in _ROWS:
            for group, (rows, _, size, _) in enumerate(read_footer(str(path), column)[0].tolist()):
                parts = max(1, min(-(-size // PIECE_BYTES), _MOST_PARTS, rows))
                bounds = [rows * part // parts for part in range(parts + 1)]
                pieces += [
                    Piece(path, first, last, size // parts, group)
                    for first, last in zip(bounds, bounds[1:], strict=False)
                ]
        else:
            size = _size(path)
            for first in range(0, size, PIECE_BYTES):
                last = min(first + PIECE_BYTES, size)
                pieces.append(Piece(path, first, last, last - first, is_end=last == size))
    return pieces


def read_piece(piece: Piece, column: str) -> Iterator[str]:
    """The documents of a piece of JSON lines or parquet rows, empty ones included."""
    if piece.path.suffix.lower() in _LINES:
        yield from _json_lines(piece.path, column, piece.first, piece.last)
    else:
        yield from _parquet_rows(piece, column)


def read_text(piece: Piece, tokenizer: Tokenizer | None) -> str:
    """The text of a piece of a text file, from a place to cut to the next.

    `tokenizer` finds places where cutting changes no token; None: anywhere between characters.
    """
    size = _size(piece.path)
    first, last = (_cut(piece.path, at, size, tokenizer) for at in (piece.first, piece.last))
    return _decode(_read(piece.path, first, last), piece.path, first)


def _cut(path: Path, at: int, size: int, tokenizer: Tokenizer | None) -> int:
    """The first good place to cut at or after a byte; the same for both pieces that meet there.

    Tokens of words do not reach from a letter to a blank. Whether that holds for this tokenizer is
    tried on the text around the place, and where it does not, at other places.
    """
    if at in (0, size):
        return at
    begin = max(0, at - 4 * _CONTEXT)
    data = _read(path, begin, min(size, at + _SEARCH_BYTES + 4 * _CONTEXT))
    while at < begin + len(data) and data[at - begin] & 0xC0 == 0x80:  # inside a character
        at += 1
    if tokenizer is None:
        return at
    text = data[at - begin :].decode("utf-8", "ignore")
    before = data[: at - begin].decode("utf-8", "ignore")[-_CONTEXT:]
    whole, start = before + text, len(before)
    end = max(start + 1, len(whole) - _CONTEXT)
    blanks = [i for i in range(start, end) if whole[i] == " " and not whole[i - 1 : i].isspace()]
    for i in [*blanks, *range(start, end)][:_TRIED_PLACES]:
        left, right = whole[max(0, i - _CONTEXT) : i], whole[i : i + _CONTEXT]
        parts = [*tokenizer.encode(left).tolist(), *tokenizer.encode(right).tolist()]
        if parts == tokenizer.encode(left + right).tolist():
            return at + len(whole[start:i].encode())
    return at


def documents(path: Path, column: str) -> Iterator[str]:
    """The documents of a file that hold text; text files are cut at line ends into 16 KiB."""
    if is_text(path):
        texts = _line_pieces(path)
    elif path.suffix.lower() in _LINES:
        texts = _json_lines(path, column, 0, _size(path))
    else:
        texts = (
            text for piece in plan_pieces([path], column) for text in read_piece(piece, column)
        )
    yield from (text for text in texts if text)


def _line_pieces(path: Path) -> Iterator[str]:
    """Cut at line ends into pieces of at most about 16 KiB."""
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
    rest, at, size = "", 0, _size(path)
    while at < size:
        end = _cut(path, min(at + PIECE_BYTES, size), size, None)
        lines = (rest + _decode(_read(path, at, end), path, at)).splitlines(keepends=True)
        rest, at = lines.pop(), end  # it may go on, or end in the first half of \r\n
        yield from lines
    yield rest


def _json_lines(path: Path, key: str, first: int, last: int) -> Iterator[str]:
    """The texts of the lines that begin in bytes [first, last)."""
    try:
        with path.open("rb") as file:
            file.seek(max(first - 1, 0))
            at = max(first - 1, 0) + len(file.readline() if first else b"")
            for line in file:
                if at >= last:
                    return
                if line.strip():
                    yield _json_text(line, key, path, at)
                at += len(line)
    except OSError as error:
        raise unreadable(path, error) from None


def _json_text(line: bytes, key: str, path: Path, at: int) -> str:
    """The text of one record, whose line begins at byte `at`."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{_place(path, at)}: not JSON ({error}); every line is one record"
        ) from None
    text = record.get(key) if isinstance(record, dict) else None
    if not isinstance(text, str):
        keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise DataError(
            f"{_place(path, at)}: no string '{key}'; found: {keys}. Use --text-column NAME"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise DataError(
            f"{_place(path, at)}: '{key}' holds {half} (character {error.start}), half of a "
            "surrogate pair, which is not text. Correct or delete the line."
        ) from None
    return text


def _place(path: Path, at: int) -> str:
    """File and number of the line that begins at a byte, counted only where there is an error."""
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
            for batch in source.iter_batches(256, [piece.group], [column], use_threads=False):
                if row >= piece.last:
                    return
                rows = batch.column(0)
                used = rows.slice(max(piece.first - row, 0), piece.last - max(row, piece.first))
                row += len(rows)
                yield from (text or "" for text in used.to_pylist())
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{piece.path}: cannot be decoded, the file is damaged ({error})") from None


def unreadable(path: str | os.PathLike[str], error: OSError) -> DataError:
    """What to raise where a file cannot be read."""
    return DataError(f"{os.fspath(path)}: cannot be read: {error.strerror or error}")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise unreadable(path, error) from None


def _read(path: Path, first: int, last: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(first)
            return file.read(last - first)
    except OSError as error:
        raise unreadable(path, error) from None


def _decode(data: bytes, path: Path, first: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        at = first + error.start
        raise DataError(f"{path}: not UTF-8 (byte {at}). Convert it first.") from None


def head(path: Path) -> bytes:
    """What tells a text file from others without reading it all."""
    return _read(path, 0, 1 << 16) + str(_size(path)).encode()
