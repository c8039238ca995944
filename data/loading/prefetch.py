"""A thread that keeps items ready, with or without worker processes behind it.

The thread, not the training loop, waits for torch's DataLoader, and the consumer watches the
workers itself. So a worker that is killed is named within a second, one that hangs ends in an error
after TIMEOUT_S, and no signal handler raises in the middle of a training step.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import queue
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Generic, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset

from config import STOP_EXIT_CODES, DataError

TIMEOUT_S = 300.0
_POLL_S = 0.5

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """A bounded queue of items, each joined from one item of every worker.

    Args:
        source: yields the items of a worker; without workers, of the thread.
        join: makes one item of those of all workers, in their order.
        workers: processes; 0 reads in the thread.
        ahead: items kept ready by each worker, or by the thread.
        pin: whether DataLoader moves items to page-locked memory.
    """

    def __init__(
        self,
        source: IterableDataset[T],
        join: Callable[[list[T]], T],
        *,
        workers: int,
        ahead: int,
        pin: bool,
    ) -> None:
        self._source, self._join = source, join
        self._workers, self._ahead, self._pin = workers, ahead, pin
        self._gpu = torch.cuda.current_device() if pin else None
        # Workers keep `ahead` items each in DataLoader's own queue.
        self._ready: queue.Queue[T | BaseException] = queue.Queue(1 if workers else ahead)
        self._stop = threading.Event()
        self._started = threading.Event()
        self._processes: list[BaseProcess] = []
        # Daemon: a process that dies without closing must not wait for it.
        self._thread = threading.Thread(target=self._run, name="data prefetch", daemon=True)

    def start(self) -> None:
        """Starts the thread and waits until workers are forked, while the caller holds no lock."""
        self._thread.start()
        self._started.wait()

    def get(self) -> T:
        """Returns the next item; raises what the thread raised, or DataError for a lost worker."""
        deadline = time.monotonic() + TIMEOUT_S
        while not self._stop.is_set():
            with contextlib.suppress(queue.Empty):
                # A short timeout: Ctrl-C and lost workers are noticed while waiting.
                item = self._ready.get(timeout=_POLL_S)
                if isinstance(item, BaseException):
                    self.close()
                    raise item
                return item
            lost = self._lost_worker()
            if lost is not None:
                self.close()
                raise lost
            if time.monotonic() > deadline:
                self._stop.set()  # not close(): it would wait for the thread that hangs
                raise DataError(
                    f"no batch within {TIMEOUT_S:.0f} s: reading the data hangs. Check the disk or "
                    "network folder that holds it, and resume from the last checkpoint."
                )
        raise DataError("the loader is closed")

    def close(self) -> None:
        """Ends the thread and the workers; safe to call twice."""
        self._stop.set()
        with contextlib.suppress(queue.Empty):
            while True:  # makes room for the item that the thread may be waiting to put
                self._ready.get_nowait()
        if self._thread.is_alive():
            self._thread.join(timeout=5)
        for process in self._processes:
            if process.is_alive():
                process.kill()  # workers ignore SIGTERM
            process.join()
        self._processes.clear()

    def _run(self) -> None:
        items: Iterator[T] | None = None
        try:
            if self._gpu is not None:
                # A new thread begins on GPU 0. Pinning memory there would give the process of
                # every rank a CUDA context on GPU 0, half a gigabyte each.
                torch.cuda.set_device(self._gpu)
            items = self._open()
            self._started.set()
            while not self._stop.is_set():
                self._put(self._join([next(items) for _ in range(max(1, self._workers))]))
        except BaseException as error:  # the consumer raises it, whatever it is
            if self._processes and not isinstance(error, DataError):
                # A dying worker breaks its connection a moment before it is seen to be dead.
                wait([process.sentinel for process in self._processes], timeout=1)
            # A lost worker is the cause; the broken connection it leaves is only what torch saw.
            self._put(self._lost_worker() or error)
        finally:
            del items  # ends the workers
            self._started.set()

    def _open(self) -> Iterator[T]:
        """Starts the DataLoader; its own generator leaves torch's global one alone."""
        others = set(multiprocessing.active_children())
        with warnings.catch_warnings():
            # More workers than cores is the user's choice, and workers use no lock held at a fork.
            warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
            warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)
            items = iter(
                DataLoader(
                    self._source,
                    batch_size=None,
                    num_workers=self._workers,
                    # Of several workers the joined copy is pinned, not each part.
                    pin_memory=self._pin and self._workers < 2,
                    prefetch_factor=self._ahead if self._workers else None,
                    generator=torch.Generator(),
                    worker_init_fn=_ignore_signals,
                    multiprocessing_context=_start_method() if self._workers else None,
                )
            )
        # DataLoader does not tell its processes; they are the children that are new.
        self._processes = [p for p in multiprocessing.active_children() if p not in others]
        return items

    def _put(self, item: T | BaseException) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                # Never for ever: after close() nobody takes items any more.
                return self._ready.put(item, timeout=_POLL_S)
        return None

    def _lost_worker(self) -> DataError | None:
        for process in self._processes:
            if not process.is_alive() and process.exitcode != 0:
                code = process.exitcode or 0
                how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
                return DataError(
                    f"data worker {process.pid} was lost ({how}; out of memory?). Resume from the "
                    "last checkpoint; fewer dataloader.num_workers need less memory."
                )
        return None


def _start_method() -> str | None:
    """Forked workers start in milliseconds; elsewhere the platform's default is safe."""
    return "fork" if sys.platform == "linux" else None


def _ignore_signals(worker: int) -> None:
    """Leaves signals to the process group to the training loop, which saves, then ends workers."""
    del worker
    for number in STOP_EXIT_CODES:
        signal.signal(number, signal.SIG_IGN)
