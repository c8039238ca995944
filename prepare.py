"""Turn text into a folder of parquet files that `dataset.parquet_dir` can name.

    python prepare.py python-stdlib data/python-stdlib
    python prepare.py SOURCE OUT          # .txt, .jsonl or .parquet: a file or a folder of them

Each .txt file is one document, cut at line ends where it is longer than 16 KiB, so that it can be
shuffled and split; a .jsonl line or a parquet row is one document. OUT gets page checksums and row
groups of about 1 MB.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pyarrow as pa
import pyarrow.parquet as pq

from config import DataError, UserError
from data import corpus
from data.index import read_footer

_DOCUMENT_BYTES = 1 << 14
_FILES = 8
_SMALLEST_FILE_BYTES, _LARGEST_FILE_BYTES = 1 << 20, 256 << 20
_ENDINGS = (".txt", ".jsonl", ".parquet")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="prepare.py",
        description="Turn text into a folder of parquet files for dataset.parquet_dir.",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="python-stdlib (the library of this Python), or a .txt, .jsonl or .parquet file, "
        "or a folder of such files",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    parser.add_argument(
        "--text-column",
        default="text",
        metavar="NAME",
        help="key or column of the text in .jsonl and .parquet (default: text)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace OUT if it holds parquet files"
    )
    args = parser.parse_args(argv)
    problem = _refuse_out(args.out, args.overwrite)
    if problem:
        parser.error(problem)
    try:
        written = _prepare(args.source, args.out, args.text_column, args.overwrite)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(
        f"Wrote {written.documents} documents, {written.bytes / 1e6:.1f} MB of text, in "
        f"{written.files} files to {args.out} ({written.seconds:.1f} s)\n"
        f"Next: python train.py dataset.parquet_dir={args.out}"
    )
    return 0


def _refuse_out(out: Path, overwrite: bool) -> str | None:
    """Why OUT may not be written, if so."""
    if not out.exists():
        return None
    if not out.is_dir():
        return f"OUT: '{out}' is a file; name a folder"
    names = sorted(path.name for path in out.iterdir())
    if names and not overwrite:
        return f"OUT: '{out}' is not empty; name another folder or add --overwrite"
    foreign = [name for name in names if not name.endswith(".parquet")]
    if foreign:
        return f"OUT: '{out}' holds '{foreign[0]}', which --overwrite would delete; empty it first"
    return None


def _prepare(source: str, out: Path, column: str, overwrite: bool) -> corpus.Written:
    if source == corpus.NAME and not os.path.exists(source):
        return corpus.build(out, overwrite)
    try:
        files = _source_files(Path(source))
        size = sum(path.stat().st_size for path in files)
    except OSError as error:
        raise _unreadable(error.filename, error) from None
    file_bytes = min(max(size // _FILES, _SMALLEST_FILE_BYTES), _LARGEST_FILE_BYTES)
    return corpus.write_folder(_documents(files, column), out, file_bytes, overwrite)


def _source_files(source: Path) -> list[Path]:
    """The text files, in bytewise order of their paths."""
    if source.is_file():
        if source.suffix not in _ENDINGS:
            raise DataError(f"{source}: expected a file ending in {', '.join(_ENDINGS)}")
        return [source]
    if not source.is_dir():
        raise DataError(f"SOURCE '{source}': not found (working directory: {os.getcwd()})")
    files = [path for path in source.rglob("*") if path.suffix in _ENDINGS and path.is_file()]
    if not files:
        raise DataError(f"SOURCE '{source}' holds no file ending in {', '.join(_ENDINGS)}")
    return sorted(files, key=os.fsencode)


def _documents(files: list[Path], column: str) -> Iterator[corpus.Document]:
    for path in files:
        if path.suffix == ".txt":
            texts = _pieces(_read_text(path))
        elif path.suffix == ".jsonl":
            texts = _json_lines(path, column)
        else:
            texts = _parquet_rows(path, column)
        name = os.fsencode(path).decode("utf-8", "replace")
        yield from ((text, name) for text in texts if text)


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start}). Convert it first.") from None
    except OSError as error:
        raise _unreadable(path, error) from None


def _pieces(text: str) -> Iterator[str]:
    """Cut at line ends into pieces of at most about 16 KiB."""
    lines: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        if size + len(line) > _DOCUMENT_BYTES and lines:
            yield "".join(lines)
            lines, size = [], 0
        lines.append(line)
        size += len(line)
    yield "".join(lines)


def _unreadable(path: str | Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read: {error.strerror or error}")


def _json_lines(path: Path, key: str) -> Iterator[str]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _json_text(line, key, f"{path}:{number}")
    except OSError as error:
        raise _unreadable(path, error) from None


def _json_text(line: bytes, key: str, place: str) -> str:
    """The text of one record; `place` is where it stands."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON ({error})") from None
    text = record.get(key) if isinstance(record, dict) else None
    if not isinstance(text, str):
        keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise DataError(f"{place}: no string '{key}'; found: {keys}. Use --text-column NAME")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise DataError(
            f"{place}: '{key}' holds {half} (character {error.start}), half of a surrogate pair, "
            "which is not text. Correct or delete the line."
        ) from None
    return text


def _parquet_rows(path: Path, column: str) -> Iterator[str]:
    read_footer(str(path), column)  # says what is wrong with the file
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as source:
            for batch in source.iter_batches(batch_size=256, columns=[column]):
                yield from (text for text in batch.column(0).to_pylist() if text)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be decoded, the file is damaged ({error})") from None


def _stop(number: int, frame: FrameType | None) -> None:
    """Leaves through the blocks that delete what is half done."""
    del frame
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)
    if hasattr(signal, "SIGPIPE"):  # ends quietly where `| head` has read enough
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
