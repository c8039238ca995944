"""Files that are one long array of tokens: .bin, .ids, .npy.

A file is mapped once and read in small parts, whose pages go back to the system soon, so files of
many gigabytes take no memory. The dtype of a file without a header is stated, or detected from its
size and samples; the samples also tell one file from another of the same size. Tokens are compared
with the vocabulary and, if there are any, with checksums before they are returned.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from config import DataError
from data.loading.order import Tokens
from data.sources.dataset import check_file_unchanged
from data.sources.tokens.checksums import BLOCK_BYTES, Checksums
from data.sources.tokens.meta import Meta

ENDINGS = (".bin", ".ids", ".npy")
SAMPLE_BYTES = 1 << 16
SAMPLES, _MANY_FILES = 8, 64  # samples of a file; 2 each of more files than that
MAPPED_FILES = 128  # at a time; each takes a file descriptor
# Files are checked again after so many reads or bytes: a read may map 2 MB around its bytes.
RECHECK_READS, _RECHECK_BYTES = 32, 16 << 20
CHECKED_AT_START_BYTES = 32 << 20  # up to this sum files are checked whole, in 50 ms
_DETECTION_PAIRS = 16  # of 32-bit words, at least, to tell 64-bit tokens from 32-bit ones
_PREPARE = "Correct the path, or make it: python prepare.py --help"


def find_files(path: str, option: str) -> tuple[str, ...]:
    """Returns the token file, or those of a folder in bytewise order.

    `option` names the path in errors. Raises DataError if there is no token file, and if one holds
    text.
    """
    found = _find_files(path, option)
    for name in found:
        _refuse_text(name)
    return found


def _find_files(path: str, option: str) -> tuple[str, ...]:
    if os.path.isfile(path):
        if os.path.splitext(path)[1] not in ENDINGS:
            raise DataError(
                f"{option} '{path}': not a token file ({', '.join(ENDINGS)}). Parquet files go "
                "into dataset.parquet_dir; other text becomes tokens with: python prepare.py"
            )
        return (path,)
    if not os.path.isdir(path):
        where = f"not found (working directory: {os.getcwd()})"
        raise DataError(f"{option} '{path}': {where}. {_PREPARE}")
    names = [name for name in os.listdir(path) if not name.startswith((".", "_"))]
    endings = Counter(os.path.splitext(name)[1] for name in names)
    kinds = [ending for ending in ENDINGS if endings[ending]]
    if len(kinds) != 1:
        found = ", ".join(f"{count} *{ending}" for ending, count in endings.most_common(5))
        raise DataError(
            f"{option} '{path}': {'several kinds of' if kinds else 'no'} token files (found "
            f"{found or 'nothing'}). Name one of them, or a folder with files of one kind."
        )
    chosen = (name for name in names if name.endswith(kinds[0]))
    return tuple(os.path.join(path, name) for name in sorted(chosen, key=os.fsencode))


@dataclass(frozen=True, slots=True)
class TokenFile:
    """An array of tokens in a file, from byte `start` on."""

    path: str
    size: int
    mtime_ns: int
    dtype: np.dtype[Any]
    start: int
    count: int
    digest: str
    """Of some samples of the file."""
    checksums: Checksums | None = None

    def map(self) -> mmap.mmap:
        """Maps the whole file, read-only; raises DataError if it is gone or has changed."""
        self.check()
        try:
            with open(self.path, "rb") as file:
                return mmap.mmap(file.fileno(), self.size, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: it is shorter now
            raise DataError(
                f"{self.path}: cannot be read: {error}. Resume from the last checkpoint."
            ) from None

    def check(self) -> None:
        """Raises DataError if the file is gone or no longer the one that was opened."""
        check_file_unchanged(self.path, self.size, self.mtime_ns)


class TokenMaps:
    """The tokens of files, each mapped when it is first read; used by one thread.

    Damaged tokens and those outside the vocabulary are errors.

    After every few reads the pages go back to the system and the files are checked for changes. If
    a file is truncated in between, reading a missing page kills the process with SIGBUS, which
    Python cannot catch; bytes that are overwritten in place may be read until the next check.
    """

    def __init__(self, files: Sequence[TokenFile], vocab_size: int) -> None:
        self._files, self._vocab_size = files, vocab_size
        self._maps: dict[int, tuple[mmap.mmap, Tokens]] = {}
        self._touched: set[int] = set()
        self._reads = self._bytes = 0

    def read(self, number: int, first: int, count: int) -> Tokens:
        """Returns tokens [first, first + count) of a file as a view, to be copied at once.

        Raises DataError if the file is gone, changed or damaged, and for a token outside the
        vocabulary.
        """
        # Not at every read: os.stat costs as much as the read itself.
        if self._reads >= RECHECK_READS or self._bytes >= _RECHECK_BYTES:
            self._recheck()
        pages, tokens = self._maps.get(number) or self._map(number)
        tokens = tokens[first : first + count]
        self._touched.add(number)
        self._reads, self._bytes = self._reads + 1, self._bytes + tokens.nbytes
        file = self._files[number]
        if file.checksums is not None:
            begin = file.start + first * file.dtype.itemsize
            end = begin + tokens.nbytes
            self._bytes += file.checksums.verify(file.path, pages, begin, end)
        self._check_vocabulary(tokens, file, first)
        return tokens

    def _check_vocabulary(self, tokens: Tokens, file: TokenFile, first: int) -> None:
        # Unsigned types need one pass, not two.
        below = tokens.dtype.kind == "i" and int(tokens.min()) < 0
        if int(tokens.max()) < self._vocab_size and not below:
            return
        wrong = int(np.flatnonzero((tokens < 0) | (tokens >= self._vocab_size))[0])
        value, number = int(tokens[wrong]), first + wrong
        fault = "is below 0" if value < 0 else f"is not below the vocabulary's {self._vocab_size}"
        raise DataError(
            f"{file.path}: token {value} at offset {file.start + number * file.dtype.itemsize} "
            f"(token number {number}) {fault}. Set tokenizer.name or model.vocab_size to what made "
            f"the file; if its tokens are not {file.dtype}, set dataset.token_dtype."
        )

    def _map(self, number: int) -> tuple[mmap.mmap, Tokens]:
        while len(self._maps) >= MAPPED_FILES:
            oldest = next(iter(self._maps))
            del self._maps[oldest]
            self._touched.discard(oldest)
        file = self._files[number]
        pages = file.map()
        self._maps[number] = pages, np.frombuffer(pages, file.dtype, file.count, file.start)
        return self._maps[number]

    def _recheck(self) -> None:
        for number in self._touched:
            self._files[number].check()
            if hasattr(mmap, "MADV_DONTNEED"):
                self._maps[number][0].madvise(mmap.MADV_DONTNEED)
        self._touched.clear()
        self._reads = self._bytes = 0

    def close(self) -> None:
        """Unmaps all files."""
        self._maps.clear()


def open_files(
    paths: Sequence[str],
    dtypes: Sequence[np.dtype[Any] | None],
    metas: Sequence[Meta | None],
) -> tuple[TokenFile, ...]:
    """Opens token files.

    `dtypes` are those of .bin and .ids, and of .npy files if stated. Raises DataError for files
    that contradict `metas`, their descriptions.
    """
    samples = _samples_per_file(paths)
    return tuple(
        _open_file(path, dtype, meta, samples)
        for path, dtype, meta in zip(paths, dtypes, metas, strict=True)
    )


def _open_file(
    path: str, dtype: np.dtype[Any] | None, meta: Meta | None, samples: int
) -> TokenFile:
    stat = os.stat(path)
    if not stat.st_size:
        raise DataError(f"{path}: empty (interrupted copy?). {_PREPARE}")
    checksums = None if meta is None else _stated_contents(path, stat.st_size, meta)
    if path.endswith(".npy"):
        dtype, start, count = _npy_header(path, dtype)
    else:
        assert dtype is not None, "files without a header have a stated or detected dtype"
        start, (count, rest) = 0, divmod(stat.st_size, dtype.itemsize)
        if rest:
            raise DataError(
                f"{path}: {stat.st_size} bytes are not a multiple of {dtype.itemsize} ({dtype}). "
                "Set dataset.token_dtype, or copy the file again."
            )
    digest = hashlib.blake2b(b"".join(_read_samples(path, samples)), digest_size=16).hexdigest()
    return TokenFile(path, stat.st_size, stat.st_mtime_ns, dtype, start, count, digest, checksums)


def _stated_contents(path: str, size: int, meta: Meta) -> Checksums | None:
    """Returns the checksums of a file, after comparing the first, which covers a header.

    Raises DataError if the file has not the size that its description states.
    """
    record = meta.record(path)
    if record is None:
        return None
    if size != record.size:
        raise DataError(
            f"{path}: {size} bytes, and {meta.path} states {record.size}: the file was cut, or is "
            "another one (interrupted copy?). Copy both again, or make both again: "
            "python prepare.py SOURCE OUT --tokenizer NAME --overwrite"
        )
    if record.crcs is None:
        return None
    checksums = Checksums(record.crcs, meta.path)
    # The header of .npy lies in the first block and decides how all others are read.
    checksums.verify(path, _bytes_at(path, 0, BLOCK_BYTES), 0, 1)
    return checksums


def check_at_start(files: Sequence[TokenFile], vocab_size: int) -> int:
    """Checks all tokens of small files, else samples of each, as `TokenMaps.read` does.

    Returns how many tokens were checked.
    """
    maps, checked = TokenMaps(files, vocab_size), 0
    is_whole, most = (
        sum(file.size for file in files) <= CHECKED_AT_START_BYTES,
        _samples_per_file(files),
    )
    for number, file in enumerate(files):
        step = SAMPLE_BYTES // file.dtype.itemsize
        pieces = -(-file.count // step)
        spread = sorted({(pieces - 1) * i // (most - 1) for i in range(most)})
        for piece in range(pieces) if is_whole else spread:
            checked += len(maps.read(number, piece * step, step))
    maps.close()
    return checked


def _read_samples(path: str, samples: int) -> list[bytes]:
    """Returns bytes from the begin, the end and evenly between, each from a multiple of 8 on."""
    size = os.path.getsize(path)
    last = max(0, size - SAMPLE_BYTES)
    starts = sorted({last * i // (samples - 1) // 8 * 8 for i in range(samples)})
    return [_bytes_at(path, start) for start in starts]


def _bytes_at(path: str, start: int, count: int = SAMPLE_BYTES + 8) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(count)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror}. Check the file and its permissions."
        ) from None


def _samples_per_file(files: Sequence[object]) -> int:
    return SAMPLES if len(files) <= _MANY_FILES else 2


def _refuse_text(path: str) -> None:
    """Raises DataError for text: two letters would pass for a token id of most vocabularies."""
    head = _bytes_at(path, 0, count=64)
    if head.startswith(b"version https://git-lfs"):
        raise DataError(f"{path} is a Git LFS pointer, not the data; run 'git lfs pull'.")
    if head.lstrip()[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise DataError(f"{path}: a download error page, not tokens. Download it again.")


def _npy_header(path: str, stated: np.dtype[Any] | None) -> tuple[np.dtype[Any], int, int]:
    """Returns dtype, byte offset and number of the tokens; raises DataError for other arrays."""
    try:
        with open(path, "rb") as file:
            np.lib.format.read_magic(file)  # refuses an archive of arrays
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, TypeError, OverflowError, SyntaxError) as error:
        reason = str(error).split("\n")[0].rstrip(".")
        raise DataError(f"{path}: not a readable .npy file ({reason}). Write it anew.") from None
    dtype = mapped.dtype
    big = dtype.newbyteorder("<") != dtype
    if mapped.ndim != 1 or dtype.kind not in "iu" or big:
        order = "big-endian " if big else ""
        raise DataError(
            f"{path}: {order}{dtype.name} of shape {mapped.shape}; tokens are one row of "
            "little-endian integers. Save it again: numpy.save(path, ids.ravel().astype('<u4'))"
        )
    if stated is not None and stated != dtype:
        raise DataError(
            f"{path}: holds {dtype} by its header, and dataset.token_dtype is {stated}. "
            "Set dataset.token_dtype: auto"
        )
    if not len(mapped):
        raise DataError(f"{path}: holds no tokens. {_PREPARE}")
    return dtype, mapped.offset, len(mapped)


def detect_dtype(paths: Sequence[str], vocab_size: int) -> np.dtype[Any] | None:
    """Returns the dtype of files without a header, from the vocabulary, sizes and samples.

    Tokens of 32 or 64 bits are recognized by their upper halves, which are 0. None if all samples
    are 0. Raises DataError if files differ, or if a size fits no type.
    """
    found = {path: _detect(path, vocab_size, _samples_per_file(paths)) for path in paths}
    kinds = {kind: path for path, kind in found.items() if kind is not None}
    if "uint8" in kinds:  # an odd size can only be bytes; bytes of even size may look like uint16
        return np.dtype(np.uint8)
    if len(kinds) > 1:
        (kind, path), (other, second) = list(kinds.items())[:2]
        raise DataError(
            f"{path} looks like {kind}, {second} like {other}: files that are read together hold "
            "tokens of one type. State dataset.token_dtype, or name one of the files."
        )
    return np.dtype(next(iter(kinds))) if kinds else None


def _detect(path: str, vocab_size: int, samples: int) -> str | None:
    size, is_small = os.path.getsize(path), vocab_size <= 1 << 16
    if is_small and size % 2:
        if vocab_size > 1 << 8:
            raise DataError(
                f"{path}: {size} bytes, an odd number, and a vocabulary of {vocab_size:,} tokens "
                "needs two bytes for each. Copy the file again, or state dataset.token_dtype."
            )
        return "uint8"
    if size % 4:
        return "uint16" if is_small else "uint32"
    words = np.frombuffer(b"".join(_read_samples(path, samples)), dtype="<u4")
    if not words.any():
        return None
    # numpy.save and tofile write int64 unless told otherwise. Read as uint32, every second token
    # would be 0, which no text is; negative ones are refused when they are read.
    limit, pairs = 1 << (16 if is_small else 31), len(words) // 2
    if size % 8 == 0 and pairs >= _DETECTION_PAIRS:
        longs = words.view("<i8")
        if ((longs > -limit) & (longs < limit)).all():
            return "int64"
    return "uint16" if is_small and (words >> 16).any() else "uint32"
