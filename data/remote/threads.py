"""Threads for requests, which a process does not wait for when it ends."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def map_ahead(work: Callable[[T], R], items: Iterable[T], at_once: int) -> Iterator[R]:
    """Yields work(item) of each item in order, while other threads work on the items after it.

    Raises what `work` raises. At most `at_once` items are begun and not yielded.
    """
    waiting = deque[Future[R]]()
    for item in items:
        if len(waiting) == at_once:
            yield waiting.popleft().result()
        waiting.append(_begin(work, item))
    while waiting:
        yield waiting.popleft().result()


def _begin(work: Callable[[T], R], item: T) -> Future[R]:
    future = Future[R]()

    def run() -> None:
        try:
            future.set_result(work(item))
        except BaseException as error:  # `result` raises it, whatever it is
            future.set_exception(error)

    # Daemons, unlike the threads of an executor: after a signal nobody waits until a server that
    # stays away has been asked for retry_seconds.
    threading.Thread(target=run, name="request", daemon=True).start()
    return future
