"""Which parquet files there are, what their footers say, and the units they are read in.

The one idea: the footers of all files are read once into a small table (rows and bytes of every row
group, kept between runs in the user's cache folder), so everything about the data that does not
need the text itself (units, split, order, size) follows without opening a file again.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import io
import logging
import os
import stat
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from config import DataError
from data.loading.order import MIN_UNITS, Integers, Keys, combine, path_keys

log = logging.getLogger(__name__)

REMEDY = "Download it again, delete it, or set dataset.on_bad_shard: skip."
GROUP_FIELDS = ("rows", "compressed_bytes", "bytes", "nulls")  # nulls: -1 where not recorded
UNIT_BYTES = 4 << 20  # of text whose bytes are its tokens
ENCODED_UNIT_BYTES = 1 << 19  # of text to be encoded, which takes 50 times as long
UNIT_ROWS = 16_384
File: TypeAlias = tuple[str, int, int]
"""(relative path, size, mtime in ns)"""
Footer: TypeAlias = tuple[Integers, bool]
"""(row groups as rows of GROUP_FIELDS, whether pages carry no checksum)"""
_CACHE_VERSION = 2
_DIGEST_BYTES = 16
_PAGE_HEADER_BYTES = 32  # hold the first four fields


@dataclass(frozen=True, slots=True)
class Index:
    """The files of a directory and their row groups; the columns of `groups` are GROUP_FIELDS.

    `unprotected` tells which files carry no page checksums, so that a flipped bit in their text
    cannot be noticed.
    """

    root: str
    column: str
    paths: tuple[str, ...]
    sizes: Integers
    mtimes_ns: Integers
    group_counts: Integers
    groups: Integers
    unprotected: npt.NDArray[np.bool_]
    skipped: tuple[str, ...] = ()

    @property
    def group_file(self) -> Integers:
        """The file of each row group."""
        return np.repeat(np.arange(len(self.paths)), self.group_counts)

    @property
    def group_number(self) -> Integers:
        """The number of each row group inside its file."""
        starts = np.cumsum(self.group_counts) - self.group_counts
        return np.arange(len(self.groups)) - np.repeat(starts, self.group_counts)

    def path(self, file: int) -> str:
        """The path of a file as the user can open it."""
        return os.path.join(self.root, self.paths[file])

    def group_name(self, group: int) -> str:
        """File and number of a row group, for messages."""
        return f"{self.path(int(self.group_file[group]))} row group {self.group_number[group]}"

    def check_file(self, file: int) -> None:
        """Raises DataError where a file is gone or no longer the one that was indexed."""
        path = self.path(file)
        try:
            stat = os.stat(path)
        except OSError as error:
            raise DataError(
                f"{path}: there at the start of the run, now {error.strerror}. "
                "Put it back and resume from the last checkpoint."
            ) from None
        then = int(self.sizes[file]), int(self.mtimes_ns[file])
        if (stat.st_size, stat.st_mtime_ns) != then:
            raise DataError(
                f"{path}: changed during the run ({then[0]} bytes at the start, now "
                f"{stat.st_size}). Restore it and resume from the last checkpoint."
            )


def build_index(root: str, column: str, skip_bad: bool = False) -> Index:
    """Read (or take from the cache) the footers of all parquet files below `root`.

    Files are sorted by the bytes of their relative path; names that start with '.' or '_' are
    passed over. Raises DataError for a missing or empty directory and for a file that is not a
    readable parquet file with that text column, or skips such files with a warning.
    """
    found = _find_files(root)
    cache = cache_path("index", os.path.realpath(root), column)
    cached = _load_cached(cache)
    skipped: list[str] = []
    if cached is None or cached.files != found:
        known = {} if cached is None else cached.footers()
        footers, skipped = _read_footers(root, column, found, known, skip_bad)
        cached = _Cached.of(footers)
        _save_cached(cache, cached)
    names, sizes, mtimes = zip(*cached.files, strict=True)
    return Index(
        root,
        column,
        names,
        np.array(sizes, dtype=np.int64),
        np.array(mtimes, dtype=np.int64),
        cached.counts,
        cached.groups,
        cached.unprotected,
        tuple(skipped),
    )


def _find_files(root: str) -> list[File]:
    """Every parquet file, in bytewise order."""
    if not os.path.isdir(root):
        if os.path.exists(root):
            parent = os.path.dirname(root) or "."
            raise DataError(f"dataset.parquet_dir '{root}' is a file; give its folder: {parent}")
        raise DataError(
            f"dataset.parquet_dir '{root}': not found (working directory: {os.getcwd()}). "
            "Correct the path, or make it: python prepare.py SOURCE OUT"
        )
    found: list[File] = []
    others: collections.Counter[str] = collections.Counter()
    try:
        _walk(root, "", found, others, set())
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be listed: {error.strerror}") from None
    if not found:
        listed = ", ".join(f"{count} *{ending}" for ending, count in others.most_common(5))
        raise DataError(
            f"dataset.parquet_dir '{root}' holds no *.parquet (found {listed or 'nothing'}). "
            f"Convert text with: python prepare.py {root} OUT"
        )
    return sorted(found, key=lambda entry: os.fsencode(entry[0]))


def _walk(
    root: str,
    prefix: str,
    found: list[File],
    others: collections.Counter[str],
    visited: set[str],
) -> None:
    """Collect below root/prefix; a linked folder is entered once, so loops end."""
    real = os.path.realpath(os.path.join(root, prefix))
    if real in visited:
        return
    visited.add(real)
    with os.scandir(os.path.join(root, prefix)) as entries:
        for entry in entries:
            if entry.name.startswith((".", "_")):
                continue
            ending = os.path.splitext(entry.name)[1]
            if entry.is_dir():
                _walk(root, prefix + entry.name + "/", found, others, visited)
            elif ending == ".parquet":
                stat = entry.stat()
                found.append((prefix + entry.name, stat.st_size, stat.st_mtime_ns))
            else:
                others[ending] += 1


def _read_footers(
    root: str, column: str, found: list[File], known: dict[File, Footer], skip_bad: bool
) -> tuple[dict[File, Footer], list[str]]:
    """The footer of each readable file, and a message for each other one."""
    footers: dict[File, Footer] = {}
    skipped: list[str] = []
    for entry in found:
        if entry in known:
            footers[entry] = known[entry]
            continue
        try:
            footers[entry] = read_footer(os.path.join(root, entry[0]), column)
        except DataError as error:
            if not skip_bad:
                raise
            log.warning("skipped: %s", error)
            skipped.append(str(error))
    if not footers:
        raise DataError(f"{root}: none of its {len(found)} parquet files can be read: {skipped[0]}")
    return footers, skipped


def read_footer(path: str, column: str) -> Footer:
    """What the footer of one file says; raises DataError that says why it cannot be read."""
    try:
        with pa.OSFile(path) as file:  # a path would cost 15 us more, for a look at file systems
            metadata = pq.read_metadata(file)
            number = _column_number(metadata, column, path)
            rows, first_page = [], 0
            for group in range(metadata.num_row_groups):
                row_group = metadata.row_group(group)
                chunk = row_group.column(number)
                statistics = chunk.statistics
                nulls = statistics.null_count if statistics and statistics.has_null_count else -1
                sizes = chunk.total_compressed_size, chunk.total_uncompressed_size
                rows.append((row_group.num_rows, *sizes, nulls))
                first_page = first_page or chunk.dictionary_page_offset or chunk.data_page_offset
            header = file.read_at(_PAGE_HEADER_BYTES, first_page) if first_page else b""
    except (OSError, pa.ArrowException) as error:
        raise DataError(_diagnose(path, error)) from None
    groups = np.array(rows, dtype=np.int64).reshape(-1, len(GROUP_FIELDS))
    return groups, bool(header) and not _has_checksum(header)


def _has_checksum(header: bytes) -> bool:
    """Whether the header of a page (Thrift's compact encoding) has field 4, its CRC-32.

    Fields 1 to 3, all required, are 32-bit integers: the byte 0x15 (the next field, an integer) and
    a number of up to five bytes, of which all but the last have their high bit set.
    """
    place = 0
    for _ in range(3):
        place += 1
        while place < len(header) and header[place] & 0x80:
            place += 1
        place += 1
    return header[place : place + 1] == b"\x15"


def _column_number(metadata: Any, column: str, path: str) -> int:
    """Where the text column is; it must be a plain column of strings."""
    schema = metadata.schema
    for number in range(metadata.num_columns):
        leaf = schema.column(number)
        if leaf.path == column and leaf.physical_type == "BYTE_ARRAY":
            if leaf.logical_type.type == "STRING" and leaf.max_repetition_level == 0:
                return number
            break
    arrow = schema.to_arrow_schema()
    if column not in arrow.names:
        names = ", ".join(arrow.names[:20]) or "none"
        raise DataError(f"{path}: no column '{column}'; columns: {names}. Set dataset.text_column.")
    strings = ", ".join(field.name for field in arrow if _is_string(field.type)) or "none"
    kind, name = arrow.field(column).type, repr(column)
    remedy = "Name one of these: dataset.text_column=NAME, with prepare.py --text-column NAME"
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        remedy += f"; or store strings, in pandas: df[{name}] = df[{name}].str.decode('utf-8')"
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        remedy += f"; or store one string in each row, in pandas: df = df.explode({name})"
    raise DataError(
        f"{path}: column '{column}' is {kind}, not string; string columns: {strings}. {remedy}"
    )


def _is_string(kind: Any) -> bool:
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def _diagnose(path: str, error: Exception) -> str:
    """Why this is not a parquet file, from its first and last bytes."""
    try:
        with open(path, "rb") as file:
            head = file.read(512)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 4))
            tail = file.read(4)
    except OSError as unreadable:
        return f"{path}: cannot be read: {unreadable.strerror}. Check the file and its permissions."
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
    """The first line of an Arrow message, without its full stop."""
    return str(error).split("\n", 1)[0].rstrip(". ")


@dataclass(frozen=True, slots=True)
class _Cached:
    """What the cache file holds: the footers of files by name, size and mtime."""

    files: list[File]
    counts: Integers
    groups: Integers
    unprotected: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, footers: dict[File, Footer]) -> _Cached:
        """These footers."""
        groups = [groups for groups, _ in footers.values()]
        counts = np.array([len(each) for each in groups], dtype=np.int64)
        flags = np.array([flag for _, flag in footers.values()], dtype=np.bool_)
        return cls(list(footers), counts, np.concatenate(groups), flags)

    def footers(self) -> dict[File, Footer]:
        """The footer of each file."""
        parts = np.split(self.groups, np.cumsum(self.counts)[:-1])
        footers = zip(parts, self.unprotected.tolist(), strict=True)
        return dict(zip(self.files, footers, strict=True))


def _load_cached(path: str) -> _Cached | None:
    arrays = load_arrays(path)
    if arrays is None:
        return None
    names = os.fsdecode(arrays["names"].tobytes()).split("\0")
    stats = arrays["stats"].tolist()
    files = [(name, size, mtime) for name, (size, mtime) in zip(names, stats, strict=True)]
    return _Cached(files, arrays["counts"], arrays["groups"], arrays["unprotected"])


def _save_cached(path: str, cached: _Cached) -> None:
    names = os.fsencode("\0".join(name for name, _, _ in cached.files))
    stats = np.array([file[1:] for file in cached.files], dtype=np.int64)
    table = {"stats": stats, "counts": cached.counts, "groups": cached.groups}
    flags = {"unprotected": cached.unprotected, "names": np.frombuffer(names, dtype=np.uint8)}
    save_arrays(path, table | flags)


def cache_path(kind: str, *identity: str) -> str:
    """The file in the user's cache folder for something of that kind and identity."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    what = "\0".join((str(_CACHE_VERSION), *identity))
    key = hashlib.blake2b(os.fsencode(what), digest_size=12).hexdigest()
    return os.path.join(base, "hatchery", f"{kind}-{key}.npz")


def load_arrays(path: str) -> dict[str, npt.NDArray[Any]] | None:
    """What `save_arrays` wrote; None where there is none, and where it is anything else, aloud.

    The digest is compared before anything is parsed, so what passes is as it was written.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("not a regular file")
        with open(path, "rb") as file:
            digest, content = file.read(_DIGEST_BYTES), file.read()
        if digest != _digest(path, content):
            raise ValueError("not as it was written")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return dict(arrays)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        log.warning("Cache %s: %s; it is made again from the data", path, reason)
        return None


def save_arrays(path: str, arrays: dict[str, Any]) -> None:
    """Write it beside and rename; a cache that cannot be written is only slower."""
    temporary = f"{path}.{os.getpid()}.tmp"
    content = io.BytesIO()
    np.savez(content, **arrays)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(_digest(path, content.getbuffer()))
            file.write(content.getbuffer())
        os.replace(temporary, path)
    except OSError as error:
        log.debug("no cache: %s", error)
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def _digest(path: str, content: bytes | memoryview) -> bytes:
    """Of the content and of the name, which tells what it is the cache of."""
    digest = hashlib.blake2b(os.fsencode(os.path.basename(path)), digest_size=_DIGEST_BYTES)
    digest.update(content)
    return digest.digest()


def index_digest(index: Index) -> str:
    """Identity of the files of an index, for caches of what was found in their text."""
    digest = hashlib.blake2b(os.fsencode("\0".join(index.paths)))
    for table in (index.sizes, index.mtimes_ns, index.group_counts):
        digest.update(np.ascontiguousarray(table, dtype="<i8").tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Units:
    """Runs of rows, as arrays of one entry per unit.

    `group` counts row groups over all files; `key` names a unit and `block` names a run of units
    of one row group that is read in turn, for the hashes of `data.order`.
    """

    group: Integers
    first: Integers
    rows: Integers
    bytes: Integers
    key: Keys
    block: Keys

    def __len__(self) -> int:
        return len(self.group)


def cut_units(index: Index, unit_bytes: int) -> Units:
    """Cut every row group into units of equally many rows, of about `unit_bytes` on average.

    The footer does not tell how long each document is, so a unit with a long one is that much
    larger.

    A block is one unit where row groups are small. A row group above 1 / MIN_UNITS of the data
    becomes several blocks of that size, as its front has to be decoded to reach its end.
    """
    rows, sizes = index.groups[:, 0], index.groups[:, 2]
    share = max(1, int(sizes.sum()) // MIN_UNITS)
    slices = _parts(rows, np.maximum(-(-sizes // min(share, unit_bytes)), -(-rows // UNIT_ROWS)))
    height = -(-rows // np.maximum(slices, 1))
    slices = np.where(rows > 0, -(-rows // np.maximum(height, 1)), 0)
    blocks = _parts(slices, -(-sizes // max(share, 1)))
    group = np.repeat(np.arange(len(rows)), slices)
    number = np.arange(len(group)) - np.repeat(np.cumsum(slices) - slices, slices)
    first = number * height[group]
    count = np.minimum(height[group], rows[group] - first)
    group_keys = combine(path_keys(index.paths)[index.group_file], index.group_number)[group]
    return Units(
        group=group,
        first=first,
        rows=count,
        bytes=sizes[group] * count // rows[group],
        key=combine(group_keys, number + (1 << 32)),
        block=combine(group_keys, number * blocks[group] // slices[group]),
    )


def _parts(most: Integers, wanted: Integers) -> Integers:
    """At least one part and at most `most`; none of nothing."""
    return np.minimum(np.maximum(wanted, 1), most)
