"""Ranges of remote files read before they are needed, by threads.

Reading a range takes a request, so tens of milliseconds, however short it is. The plan knows the
next segments of every lane; their ranges are asked for while the rows before them are trained on.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from itertools import zip_longest
from queue import SimpleQueue

from data.remote.access import IN_FLIGHT
from data.remote.range_cache import Range, RangeCache
from data.remote.store import RemoteStore

READ_AHEAD_BYTES = 64 << 20
"""Ranges that one reader holds before they are needed, at most."""


class RangeReader:
    """Reads ranges from memory, the disk or the server; used by one thread.

    In memory are the ranges that `expect` named, up to READ_AHEAD_BYTES, and the last one read.
    """

    def __init__(self, store: RemoteStore, cache: RangeCache) -> None:
        self._store, self._cache = store, cache
        self._expected: dict[int, Sequence[Range]] = {}
        self._held: dict[Range, Future[bytes]] = {}
        self._queue: SimpleQueue[tuple[Range, Future[bytes]] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    def expect(self, lane: int, ranges: Sequence[Range]) -> None:
        """States what a lane reads next, in order; replaces what was stated for it before."""
        self._expected[lane] = ranges
        self._drop_unexpected()
        held_bytes = sum(each.stop - each.start for each in self._held)
        for wanted in self._by_need():
            if wanted in self._held:
                continue
            held_bytes += wanted.stop - wanted.start
            if held_bytes > READ_AHEAD_BYTES:
                break
            self._held[wanted] = future = Future[bytes]()
            self._start_thread()
            self._queue.put((wanted, future))

    def read(self, wanted: Range) -> bytes:
        """Returns the bytes of a range; raises DataError, also one that reading ahead met."""
        future = self._held.get(wanted)
        if future is None or future.cancel():  # not asked for yet, or no thread was free
            self._drop_unexpected()
            data = self._load(wanted)
            self._held[wanted] = future = Future[bytes]()
            future.set_result(data)
        return future.result()

    def forget(self, damaged: Range) -> None:
        """Drops a range from memory and disk, so that it is read from the server again."""
        self._held.pop(damaged, None)
        self._cache.remove(damaged)

    def close(self) -> None:
        """Ends the threads, each after the request that it waits for."""
        self._store.closed.set()
        self._expected.clear()
        self._drop_unexpected()
        for _ in self._threads:
            self._queue.put(None)
        self._threads.clear()

    def _by_need(self) -> Iterator[Range]:
        """Yields the first range of every lane, then the second of every lane, and so on."""
        for ranges in zip_longest(*self._expected.values()):
            yield from (each for each in ranges if each is not None)

    def _drop_unexpected(self) -> None:
        expected = set().union(*self._expected.values())
        for each in self._held.keys() - expected:
            self._held.pop(each).cancel()

    def _start_thread(self) -> None:
        if len(self._threads) < IN_FLIGHT:
            # Daemons, unlike the threads of an executor: a process that ends must not wait until
            # a server that stays away has been asked for retry_seconds.
            thread = threading.Thread(target=self._work, name="remote read", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            wanted, future = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self._load(wanted))
            except BaseException as error:  # `read` raises it, whatever it is
                future.set_exception(error)
            del item, future  # would hold the bytes until the next range comes

    def _load(self, wanted: Range) -> bytes:
        data = self._cache.load(wanted)
        if data is None:
            data = self._store.read(*wanted)
            self._cache.save(wanted, data)
        return data
