"""Runs a piece of a test in a forked child, which may lower its limits, die or hold a lock."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial


def in_child(work: Callable[[], object]) -> tuple[int, str]:
    """Exit status of the child (0 unless it died) and the text `work` returned, or its error."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            text = str(work())
        except BaseException:
            text = traceback.format_exc()
        os.write(writing, text.encode()[-60_000:])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as pipe:
        text = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


def in_processes(count: int, work: Callable[[], object]) -> list[str]:
    """What `work` returns in each of `count` processes that a launcher would have started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def as_rank(rank: int) -> object:
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
        os.environ.update({name: str(number) for name, number in numbers.items()})
        return work()

    with ThreadPoolExecutor(count) as pool:
        found = list(pool.map(in_child, [partial(as_rank, rank) for rank in range(count)]))
    assert [status for status, _ in found] == [0] * count, found
    return [text for _, text in found]
