"""Runs a piece of a test in a forked child, which may lower its limits, die or hold a lock."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable


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
