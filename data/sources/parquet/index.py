"""Which parquet files there are, and what their footers state.

The footers of all files are read once into a small table: rows and bytes of every row group, kept
between runs in the user's cache folder. Whatever does not need the text itself (segments, split,
order, sizes) follows from the table without opening a file again.

pyarrow.dataset could find the files and their row groups, but tells neither their times, by which a
change during a run is noticed, nor whether pages have checksums, nor what else is in the folder.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from config import DataError
from data.loading.order import Booleans, Integers
from data.remote.listing import Listing
from data.remote.store import RemoteError
from data.remote.threads import map_ahead
from data.sources.cache import cache_path, load_arrays, save_arrays
from data.sources.dataset import (
    changed_data,
    changed_tags,
    check_file_unchanged,
    remote_details,
)
from data.sources.parquet.text_column import AUTO, USUAL_NAMES, column_number, find_column
from data.sources.prepare_command import prepare_remedy
from settings.addresses import is_remote

log = logging.getLogger(__name__)

REMEDY = "Download it again, delete it, or set dataset.on_bad_shard: skip."
# Of the text column in a row group: nulls is -1 where not recorded, start is where its bytes begin.
GROUP_FIELDS = ("rows", "compressed_bytes", "bytes", "nulls", "start")
_PAGE_HEADER_BYTES = 32  # hold the first four fields
_SAID_FILES = 500  # on a server; reading the footers of more takes seconds
FOOTER_END_BYTES = 8  # length and magic number


class File(NamedTuple):
    """A file as it was at the start of the run; `path` is relative to the folder."""

    path: str
    size: int
    mtime_ns: int


class Footer(NamedTuple):
    """What the footer of a file states."""

    groups: Integers
    """(row groups, GROUP_FIELDS)"""
    unprotected: bool
    """Whether pages have no checksum, so that a flipped bit in their text goes unnoticed."""
    bytes: int
    """The size of the footer with its length and magic number: the end of the file."""


@dataclass(frozen=True, slots=True)
class Index:
    """The files of a folder and their row groups, as arrays with one entry per file or group."""

    root: str
    column: str
    paths: tuple[str, ...]
    sizes: Integers
    mtimes_ns: Integers
    group_counts: Integers
    """Row groups of each file."""
    groups: Integers
    """(row groups of all files, GROUP_FIELDS)"""
    unprotected: Booleans
    """Files without page checksums."""
    footer_bytes: Integers
    """The size of each file's footer, with its length and magic number."""
    tags: tuple[str, ...] = ()
    """What names the content of each remote file; empty for a local folder."""
    listing: Listing | None = None
    """Of remote files, those that were not readable and left out among them."""

    @property
    def group_file(self) -> Integers:
        """The file of each row group."""
        return np.repeat(np.arange(len(self.paths)), self.group_counts)

    @property
    def group_number(self) -> Integers:
        """The number of each row group inside its file."""
        starts = np.cumsum(self.group_counts) - self.group_counts
        return np.arange(len(self.groups)) - np.repeat(starts, self.group_counts)

    @property
    def rows(self) -> int:
        """The rows of all files."""
        return int(self.groups[:, 0].sum())

    @property
    def place(self) -> str:
        """The folder, however it was spelled: caches of what was found in it go by this."""
        return self.root if self.listing else os.path.realpath(self.root)

    def path(self, file: int) -> str:
        """Returns the path of a file as the user can open it."""
        return os.path.join(self.root, self.paths[file])

    def group_name(self, group: int) -> str:
        """Returns file and number of a row group, for messages."""
        return f"{self.path(int(self.group_file[group]))} row group {self.group_number[group]}"

    def check_file(self, file: int) -> None:
        """Raises DataError if a file is gone or no longer the one that was indexed."""
        size, mtime_ns = int(self.sizes[file]), int(self.mtimes_ns[file])
        check_file_unchanged(self.path(file), size, mtime_ns)

    def digest(self) -> str:
        """Returns an identity of the files, for caches of what was found in their text."""
        # Times too: a file rewritten with the same size must not find the counts of the old one.
        digest = hashlib.blake2b(os.fsencode("\0".join(self.paths)))
        for table in (self.sizes, self.mtimes_ns, self.group_counts):
            digest.update(np.ascontiguousarray(table, dtype="<i8").tobytes())
        return digest.hexdigest()


def build_index(root: str, column: str, skip_bad: bool, saved: Mapping[str, Any]) -> Index:
    """Reads the footers of all parquet files below `root`, or takes them from the cache.

    Files are sorted by the bytes of their relative path; names that start with '.' or '_' are
    passed over. Raises DataError for a missing or empty folder. A file that is not readable or has
    no such text column raises DataError too or, with `skip_bad`, is left out with a warning. The
    column `auto` is that of the first file that can be read.

    saved: the `summary` of a checkpoint; see `check_listed`.
    """
    found = _find_files(root, column)
    check_listed(root, found, saved)
    return index_files(root, found, LocalFooters(root), column, skip_bad)


def check_listed(
    root: str, found: list[File], saved: Mapping[str, Any], listing: Listing | None = None
) -> None:
    """Raises DataError for a file that is not what it was by the `summary` of a checkpoint.

    Before footers are read: they would make a changed file look like a damaged one.
    """
    sizes = saved.get("sizes") or {}
    for file in found:
        was = sizes.get(file.path, file.size)
        if was != file.size:
            path = os.path.join(root, file.path)
            raise changed_data(f"{path} had {was} bytes, has {file.size}")
    change = changed_tags(saved, remote_details([listing] if listing else []))
    if change is not None:
        raise changed_data(change)


class Footers(Protocol):
    """Reads the footers of a folder's files; `at_once` in as many threads."""

    at_once: int

    def read(self, file: File, column: str) -> Footer:
        """Reads one footer; raises DataError, which says why it cannot be read."""

    def column(self, file: File) -> str:
        """Returns the column of the text; raises DataError if none is known to be it."""


class LocalFooters:
    """Reads the footers of files below a folder."""

    at_once = 1

    def __init__(self, root: str) -> None:
        self._root = root

    def read(self, file: File, column: str) -> Footer:
        """Reads one footer."""
        return read_footer(os.path.join(self._root, file.path), column)

    def column(self, file: File) -> str:
        """Returns the column of the text."""
        return text_column(os.path.join(self._root, file.path))


def index_files(
    root: str, found: list[File], footers: Footers, column: str, skip_bad: bool
) -> Index:
    """Returns the index of the files that were found, from the cache as far as they are there."""
    if column == AUTO:
        column = _find_column(found, footers, skip_bad)
    place = root if is_remote(root) else os.path.realpath(root)
    cache = cache_path("index", place, column, " ".join(GROUP_FIELDS))
    # Of 10,000 unchanged files only the listing is left to do: 0.1 s.
    arrays = load_arrays(cache)
    files = [] if arrays is None else _cached_files(arrays)
    if arrays is None or files != found:
        known = {} if arrays is None else dict(zip(files, _cached_footers(arrays), strict=True))
        read = _read_footers(root, column, found, known, footers, skip_bad)
        files, arrays = list(read), _to_arrays(read)
        save_arrays(cache, arrays)
    paths, sizes, mtimes_ns = zip(*files, strict=True)
    return Index(
        root,
        column,
        paths,
        np.array(sizes, dtype=np.int64),
        np.array(mtimes_ns, dtype=np.int64),
        arrays["counts"],
        arrays["groups"],
        arrays["unprotected"],
        arrays["footer_bytes"],
    )


def _find_files(root: str, column: str) -> list[File]:
    """Returns every parquet file, in bytewise order. `column` is that of the text, for a message
    about text that is not parquet."""
    if not os.path.isdir(root):
        if os.path.exists(root):
            if not root.endswith(".parquet"):
                remedy = prepare_remedy(root, column)
                raise DataError(f"dataset.parquet_dir '{root}' is no folder of parquet. {remedy}")
            parent = os.path.dirname(root) or "."
            raise DataError(f"dataset.parquet_dir '{root}' is a file; give its folder: {parent}")
        raise DataError(
            f"dataset.parquet_dir '{root}': not found (working directory: {os.getcwd()}). "
            "Correct the path, or make it: python prepare.py SOURCE OUT"
        )
    found: list[File] = []
    others = Counter[str]()
    try:
        _list_folder(root, "", found, others, set())
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be listed: {error.strerror}") from None
    if not found:
        listed = ", ".join(f"{count} *{ending}" for ending, count in others.most_common(5))
        remedy = prepare_remedy(root, column, listed) if listed else "Correct the path."
        raise DataError(
            f"dataset.parquet_dir '{root}' holds no *.parquet (found {listed or 'nothing'}). "
            f"{remedy}"
        )
    return sorted(found, key=lambda file: os.fsencode(file.path))


def _list_folder(
    root: str, prefix: str, found: list[File], others: Counter[str], visited: set[str]
) -> None:
    """Adds the files below root/prefix; `others` counts the endings of those of other kinds."""
    real = os.path.realpath(os.path.join(root, prefix))
    if real in visited:  # a linked folder is entered once, so a loop of links ends
        return
    visited.add(real)
    with os.scandir(os.path.join(root, prefix)) as entries:
        for entry in entries:
            if entry.name.startswith((".", "_")):
                continue
            ending = os.path.splitext(entry.name)[1]
            if entry.is_dir():
                _list_folder(root, prefix + entry.name + "/", found, others, visited)
            elif ending == ".parquet":
                stat = entry.stat()
                found.append(File(prefix + entry.name, stat.st_size, stat.st_mtime_ns))
            else:
                others[ending] += 1


def _find_column(found: list[File], footers: Footers, skip_bad: bool) -> str:
    """Returns the text column of the first file; with `skip_bad`, of the first readable one."""
    for file in found:
        try:
            return footers.column(file)
        except RemoteError:
            raise
        except DataError:
            if not skip_bad:
                raise
    return USUAL_NAMES[0]  # no file is readable: `_read_footers` says why


def _read_footers(
    root: str,
    column: str,
    found: list[File],
    known: dict[File, Footer],
    footers: Footers,
    skip_bad: bool,
) -> dict[File, Footer]:
    """Returns the footer of each readable file; `known` ones are not read again."""

    def read(file: File) -> Footer | DataError:
        try:
            return known.get(file) or footers.read(file, column)
        except RemoteError:
            raise
        except DataError as error:
            if not skip_bad:
                raise
            return error

    unread = len(found) - len(known.keys() & set(found))
    if footers.at_once > 1 and unread > _SAID_FILES:
        log.warning("Reading the footers of %s files below %s, once", f"{unread:,}", root)
    readable: dict[File, Footer] = {}
    first_error = ""
    one_by_one = footers.at_once == 1
    read_all = map(read, found) if one_by_one else map_ahead(read, found, footers.at_once)
    for file, footer in zip(found, read_all, strict=True):
        if isinstance(footer, DataError):
            log.warning("skipped: %s", footer)
            first_error = first_error or str(footer)
        else:
            readable[file] = footer
    if not readable:
        raise DataError(
            f"{root}: none of its {len(found)} parquet files can be read: {first_error}"
        )
    return readable


def _to_arrays(footers: dict[File, Footer]) -> dict[str, Any]:
    """Returns files and footers as arrays for the cache."""
    names = os.fsencode("\0".join(file.path for file in footers))
    return {
        "stats": np.array([(file.size, file.mtime_ns) for file in footers], dtype=np.int64),
        "counts": np.array([len(each.groups) for each in footers.values()], dtype=np.int64),
        "groups": np.concatenate([each.groups for each in footers.values()]),
        "unprotected": np.array([each.unprotected for each in footers.values()], dtype=np.bool_),
        "footer_bytes": np.array([each.bytes for each in footers.values()], dtype=np.int64),
        "names": np.frombuffer(names, dtype=np.uint8),
    }


def _cached_files(arrays: dict[str, Any]) -> list[File]:
    names = os.fsdecode(arrays["names"].tobytes()).split("\0")
    return [File(name, *stats) for name, stats in zip(names, arrays["stats"].tolist(), strict=True)]


def _cached_footers(arrays: dict[str, Any]) -> Iterator[Footer]:
    groups = np.split(arrays["groups"], np.cumsum(arrays["counts"])[:-1])
    return map(Footer, groups, arrays["unprotected"].tolist(), arrays["footer_bytes"].tolist())


def text_column(path: str) -> str:
    """Returns the column of a file that holds the text; raises DataError if none is known to."""
    try:
        with pa.OSFile(path) as file:
            return find_column(pq.read_metadata(file), path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(_diagnose_file(path, error)) from None


def read_footer(path: str, column: str) -> Footer:
    """Reads the footer of one file; raises DataError, which says why it cannot be read."""
    try:
        with pa.OSFile(path) as file:  # given a path, Arrow would look for its file system: 15 us
            groups, size = footer_of(pq.read_metadata(file), column, path)
            # The first page stands for all: writers protect all pages of a file or none.
            first_page = int(groups[0, -1]) if len(groups) else 0
            header = file.read_at(_PAGE_HEADER_BYTES, first_page) if first_page else b""
    except (OSError, pa.ArrowException) as error:
        raise DataError(_diagnose_file(path, error)) from None
    return Footer(groups, bool(header) and not _has_checksum(header), size)


def footer_of(metadata: Any, column: str, place: str) -> tuple[Integers, int]:
    """Returns the row groups (n, GROUP_FIELDS) of a file's metadata and the size of its footer;
    raises DataError, which names `place`, unless the column holds strings."""
    number = column_number(metadata, column, place)
    rows = []
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        chunk = row_group.column(number)
        statistics = chunk.statistics
        nulls = statistics.null_count if statistics and statistics.has_null_count else -1
        sizes = chunk.total_compressed_size, chunk.total_uncompressed_size
        start = chunk.dictionary_page_offset or chunk.data_page_offset
        rows.append((row_group.num_rows, *sizes, nulls, start))
    groups = np.array(rows, dtype=np.int64).reshape(-1, len(GROUP_FIELDS))
    return groups, metadata.serialized_size + FOOTER_END_BYTES


def _has_checksum(header: bytes) -> bool:
    """Returns whether the header of a page (in Thrift's compact encoding) has field 4, its CRC-32.

    Fields 1 to 3, all required, are 32-bit integers: the byte 0x15 (the next field, an integer) and
    a number of up to five bytes, of which all but the last have their high bit set.
    """
    at = 0
    for _ in range(3):
        at += 1
        while at < len(header) and header[at] & 0x80:
            at += 1
        at += 1
    return header[at : at + 1] == b"\x15"


def _diagnose_file(path: str, error: Exception) -> str:
    """Returns why a local file is not parquet."""
    try:
        with open(path, "rb") as file:
            head = file.read(512)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 4))
            tail = file.read(4)
    except OSError as unreadable:
        return f"{path}: cannot be read: {unreadable.strerror}. Check the file and its permissions."
    return diagnose(path, head, size, tail, error)


def diagnose(path: str, head: bytes, size: int, tail: bytes, error: Exception) -> str:
    """Returns why a file is not parquet, from its first bytes, its size and its last four bytes."""
    start = head.lstrip()[:40].splitlines()[:1]
    shown = start[0].decode("utf-8", "replace") if start else ""
    if size == 0:
        return f"{path}: empty (interrupted download?). {REMEDY}"
    if head.startswith(b"version https://git-lfs"):
        return f"{path} is a Git LFS pointer, not the data; run 'git lfs pull'."
    if shown.startswith(("<", "{", "[")):
        return f"{path} starts with '{shown}': a download error page. {REMEDY}"
    if head.startswith(b"PAR1") and tail != b"PAR1":
        return f"{path}: no footer; {size / 1e6:.1f} MB present (interrupted download?). {REMEDY}"
    if head.startswith(b"PARE") or tail == b"PARE":
        return f"{path}: encrypted parquet, which is not supported. Decrypt it."
    reason = "its footer is damaged" if head.startswith(b"PAR1") else "not a parquet file"
    return f"{path}: {reason} ({first_line(error)}). {REMEDY}"


def first_line(error: Exception) -> str:
    """Returns the first line of an Arrow message, without its full stop."""
    return str(error).split("\n", 1)[0].rstrip(". ")
