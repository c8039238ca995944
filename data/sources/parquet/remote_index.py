"""The index of parquet files on a server, from two small reads of each file at most."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from config import DataError
from data.remote.access import IN_FLIGHT
from data.remote.listing import list_files
from data.remote.store import RemoteStore
from data.sources.parquet.index import (
    FOOTER_END_BYTES,
    File,
    Footer,
    Index,
    check_listed,
    diagnose,
    footer_of,
    index_files,
)
from data.sources.parquet.text_column import find_column
from data.sources.prepare_command import TEXT_ENDINGS, prepare_remedy
from data.sources.tokens.file import ENDINGS

log = logging.getLogger(__name__)

_TAIL_BYTES = 1 << 16  # most footers are shorter, so that one read is enough
_HEAD_BYTES = 512


def build_remote_index(
    store: RemoteStore, address: str, column: str, skip_bad: bool, saved: Mapping[str, Any]
) -> Index:
    """Lists the parquet files of an address and reads their footers, or takes them from the cache.

    The cache holds as long as sizes and tags stay the same. Errors are those of `build_index`;
    `skip_bad` leaves out damaged files only, not those that the server does not give.

    Args:
        saved: the `summary` of a checkpoint: its commit of the Hub is taken.
    """
    is_text = address.lower().endswith(TEXT_ENDINGS) and not address.endswith(".parquet")
    if is_text or address.endswith(ENDINGS):
        remedy = prepare_remedy(address, column)
        raise DataError(f"dataset.parquet_dir '{address}' is no parquet. {remedy}")
    listing = list_files(store, address, (".parquet",), saved.get("pins", {}).get(address, ""))
    if not listing.files:
        others = listing.others
        remedy = prepare_remedy(address, column, others) if others else "Correct the address."
        raise DataError(
            f"dataset.parquet_dir '{address}' holds no *.parquet (found {others or 'nothing'}). "
            f"{remedy}"
        )
    tags = {file.path: file.tag for file in listing.files}
    found = [File(file.path, file.size, _stamp(file.tag)) for file in listing.files]
    check_listed(listing.root, found, saved, listing)
    footers = RemoteFooters(store, listing.root, tags)
    index = index_files(listing.root, found, footers, column, skip_bad)
    kept = tuple(tags[path] for path in index.paths)
    return replace(index, tags=kept, listing=listing)


def _stamp(tag: str) -> int:
    """Returns a number that changes with a tag, in the place of a time."""
    return int.from_bytes(hashlib.blake2b(tag.encode(), digest_size=7).digest(), "little")


class RemoteFooters:
    """Reads the footers of files below an address."""

    at_once = IN_FLIGHT

    def __init__(self, store: RemoteStore, root: str, tags: dict[str, str]) -> None:
        self._store, self._root, self._tags = store, root, tags

    def read(self, file: File, column: str) -> Footer:
        """Reads one footer; raises DataError, which says why it cannot be read."""
        # Whether pages have checksums would take another read of each file. Servers keep checksums
        # of their own, so files are not said to be unprotected.
        groups, size = footer_of(self._metadata(file), column, self._url(file))
        return Footer(groups, unprotected=False, bytes=size)

    def column(self, file: File) -> str:
        """Returns the column of the text."""
        return find_column(self._metadata(file), self._url(file))

    def _url(self, file: File) -> str:
        return f"{self._root}/{file.path}"

    def _metadata(self, file: File) -> Any:
        tail = self._bytes(file, max(0, file.size - _TAIL_BYTES), file.size)
        length = int.from_bytes(tail[-FOOTER_END_BYTES:-4], "little") + FOOTER_END_BYTES
        try:
            if len(tail) < length < file.size and tail.endswith(b"PAR1"):
                tail = self._bytes(file, file.size - length, file.size - len(tail)) + tail
            # A footer tells where it begins by its own length: it need not be in its file.
            return pq.read_metadata(pa.BufferReader(b"PAR1" + tail[-length:]))
        except (OSError, pa.ArrowException) as error:
            head = self._bytes(file, 0, min(file.size, _HEAD_BYTES))
            raise DataError(diagnose(self._url(file), head, file.size, tail[-4:], error)) from None

    def _bytes(self, file: File, start: int, stop: int) -> bytes:
        return self._store.read(self._url(file), self._tags[file.path], start, stop)
