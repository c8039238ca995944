"""A map over worker processes that keeps the order of its items."""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from itertools import islice, starmap
from typing import Any, TypeVar

from config import UserError

_MIN_ITEMS_PER_WORKER = 4  # fewer take less time than the start of a process

T = TypeVar("T")


def starmap_in_order(
    function: Callable[..., T], items: Sequence[tuple[Any, ...]], workers: int
) -> Generator[T, None, None]:
    """Yields function(*item) of each item, in order; close it to stop the processes.

    `function` is sent to each worker once, so it may be a method of a large object. Raises
    UserError if a worker is killed.
    """
    workers = min(workers, len(items) // _MIN_ITEMS_PER_WORKER)
    if workers <= 1:
        yield from starmap(function, items)
        return
    # Not multiprocessing.Pool: it waits for ever for the result of a worker that was killed, and
    # its imap holds all results that are not taken yet. "spawn": a forked child inherits the locks
    # that threads of this process held at that moment, and would wait for them for ever.
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (function,))
    waiting = iter(items)
    try:
        # Two tasks for each worker: none waits while the caller writes a result, and no more than
        # these results are in memory.
        with _sigint_blocked():
            futures = deque(pool.submit(_call, item) for item in islice(waiting, 2 * workers))
        while futures:
            result = futures.popleft().result()
            futures.extend(pool.submit(_call, item) for item in islice(waiting, 1))
            yield result
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed (out of memory?). The same command continues where it "
            "stopped; --workers N with a smaller N needs less memory"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _sigint_blocked() -> Iterator[None]:
    # Ctrl-C reaches every process of the terminal. Workers started in this block inherit the mask,
    # so only the main process is interrupted: it saves its work and stops them.
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


_worker: dict[str, Callable[..., Any]] = {}
"""The function of a worker process, set when it starts."""


def _start_worker(function: Callable[..., Any]) -> None:
    _worker["function"] = function
    # A worker waits for tasks on a pipe that its siblings hold open too, so it would outlive a main
    # process that is killed.
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(item: tuple[Any, ...]) -> Any:
    return _worker["function"](*item)
