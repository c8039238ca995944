"""From SOURCE on the command line to local text files: a file, a folder, addresses, the corpus."""

from __future__ import annotations

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

import pyarrow as pa

from config import DataError, DatasetConfig
from data.preparation import stdlib_corpus
from data.preparation.download import (
    download,
    is_url,
    local_paths,
    read_url_list,
    without_query,
)
from data.preparation.errors import writing
from data.preparation.progress import ProgressLine
from data.preparation.raw_text import check_readable, file_size, find_non_text, is_text
from data.remote.access import has_magic
from data.remote.copies import copy_file
from data.remote.listing import list_files as list_remote_files
from data.remote.store import RemoteStore
from data.sources.prepare_command import COMPRESSIONS, TEXT_ENDINGS, uncompressed_name
from files.atomic import durable_rename
from settings.addresses import address_fault, is_remote

RETRY_S = DatasetConfig().retry_seconds
_BLOCK_BYTES = 1 << 20
_HEAD_BYTES = 1 << 12


def is_corpus(source: str) -> bool:
    """Returns whether SOURCE names the embedded corpus; a file of this name has precedence."""
    return source == stdlib_corpus.NAME and not os.path.exists(source)


def local_files(source: str, is_url_list: bool, folder: Path) -> list[Path]:
    """Returns the files to read; what must be downloaded, built or unpacked goes to `folder` and
    stays."""
    files = _found_files(source, is_url_list, folder)
    paths = [_unpacked(path, folder, number) for number, path in enumerate(files)]
    for path in paths:
        check_readable(path)
    if not is_url_list and paths == [Path(source)]:
        _warn_of_addresses(paths[0])
    return paths


def _warn_of_addresses(path: Path) -> None:
    """Prints a warning if a file looks like a list for --urls."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES).decode("utf-8", "replace")
    # The last line may be cut.
    lines = [line.strip() for line in head.splitlines()[: -1 if len(head) == _HEAD_BYTES else None]]
    addresses = [line for line in lines if line and not line.startswith("#")]
    if addresses and all(map(is_remote, addresses)):
        print(f"{path}: every line is an address; did you mean --urls?", file=sys.stderr)


def _found_files(source: str, is_url_list: bool, folder: Path) -> list[Path]:
    if is_corpus(source):
        corpus = folder / stdlib_corpus.NAME
        if not corpus.exists():
            stdlib_corpus.build(corpus)
        return list_files(corpus)
    if is_url_list:
        return _fetched(read_url_list(Path(source)), folder)
    if is_remote(source):
        return _fetched([source], folder)
    return list_files(Path(source))


def _fetched(addresses: Sequence[str], folder: Path) -> list[Path]:
    """Downloads to `folder` what remote addresses mean, each file once."""
    for address in addresses:
        # Signed addresses of web servers are downloaded as they are; their query is never shown.
        fault = address_fault(without_query(address) if is_url(address) else address)
        if fault:
            raise DataError(f"SOURCE {fault}")
    paths = local_paths(addresses, folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    found = []
    for number, (address, path) in enumerate(zip(addresses, paths, strict=True), 1):
        is_listed = has_magic(address) or address.endswith("/")
        if not is_url(address) or (is_listed and "?" not in address):
            found += _copied(address, folder)
            continue
        line: ProgressLine | None = None
        for done, total in download(address, path):
            line = line or ProgressLine(f"download {number} of {len(addresses)}", done)
            line.show(done, total)
        if line:
            line.end()
        found.append(path)
    return found


def _copied(address: str, folder: Path) -> list[Path]:
    """Copies to `folder` the text files at an address that is listed first, each once."""
    store = RemoteStore(RETRY_S)
    own = PurePosixPath(address).suffix  # a file or a glob may have any ending
    listing = list_remote_files(store, address, (*TEXT_ENDINGS, own) if own else TEXT_ENDINGS)
    _check_found(address, len(listing.files), listing.others)
    paths = []
    for number, file in enumerate(listing.files, 1):
        url = listing.url(file)
        # The name tells the version: one that has changed since an interruption is another file.
        version = hashlib.blake2b(f"{url} {file.tag} {file.size}".encode(), digest_size=8)
        path = folder / f"{version.hexdigest()}-{PurePosixPath(file.path).name}"
        paths.append(path)
        if not path.exists():
            line = ProgressLine(f"copy {number} of {len(listing.files)}")
            copy_file(store, url, file.tag, file.size, path, partial(line.show, total=file.size))
            line.end()
    return paths


def _check_found(source: str, n_files: int, others: str) -> None:
    """Prints what else a source holds; raises DataError if it holds no text."""
    if not n_files:
        raise DataError(
            f"SOURCE '{source}' holds no text (found {others or 'nothing'}). Name a file with "
            "text, .jsonl or .parquet, or a folder of such files."
        )
    if others:
        print(f"Skipped in {source}: {others}", file=sys.stderr)


def _unpacked(path: Path, folder: Path, number: int) -> Path:
    """Returns the file or, of a compressed one, its content in a file in `folder`."""
    name = uncompressed_name(path.name)
    if name == path.name:
        return path
    size, mtime_ns = file_size(path), path.stat().st_mtime_ns
    target = folder / f"unpacked-{number:05d}-{name}"
    # It carries the time of the source: another version of that is unpacked again.
    if target.exists() and target.stat().st_mtime_ns == mtime_ns:
        return target
    line, part = ProgressLine(f"unpack {path.name}"), target.with_name(f"{target.name}.part")
    with writing(part):
        folder.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as out:
            for block, done in _uncompressed_blocks(path):
                out.write(block)
                line.show(done, size)
        os.utime(part, ns=(mtime_ns, mtime_ns))
        durable_rename(part, target)
    line.end()
    return target


def _uncompressed_blocks(path: Path) -> Iterator[tuple[bytes, int]]:
    """Yields the content of a compressed file in blocks, each with the bytes read for it so far."""
    codec = COMPRESSIONS[path.suffix.lower()]
    try:
        with pa.OSFile(str(path)) as packed, pa.CompressedInputStream(packed, codec) as content:
            while block := content.read(_BLOCK_BYTES):
                yield block, packed.tell()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: no whole {codec} file ({error}). Download it again.") from None


def list_files(source: Path) -> list[Path]:
    """Returns a text file, or those of a folder in bytewise order of their paths.

    Hidden files are skipped. If a folder has files with the endings of `TEXT_ENDINGS`, the others
    are skipped, and their endings are printed.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise DataError(f"SOURCE '{source}': not found (working directory: {os.getcwd()})")
    found = [path for path in source.rglob("*") if _is_visible(path, source) and path.is_file()]
    files = [path for path in found if path.name.lower().endswith(TEXT_ENDINGS)]
    files = files or [path for path in found if is_text(path) and find_non_text(path) is None]
    files = files or [path for path in found if path.suffix.lower() == ".json"]
    skipped = Counter(path.suffix for path in set(found).difference(files))
    kinds = ", ".join(f"{count} *{ending}" for ending, count in skipped.most_common(5))
    _check_found(str(source), len(files), kinds)
    # Bytewise, whatever the locale: the order of the files is the order of the tokens.
    return sorted(files, key=os.fsencode)


def _is_visible(path: Path, source: Path) -> bool:
    return not any(part.startswith(".") for part in path.relative_to(source).parts)
