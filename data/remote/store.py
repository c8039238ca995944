"""Reads of remote files that survive a bad network: tried again, for a stated total time.

Only reads are made here, so repeating one is always safe. What a library says of an error is never
shown: redirects of the Hub and of some buckets are signed, which makes their addresses secrets.
"""

from __future__ import annotations

import itertools
import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from config import DataError, UserError
from data.remote.access import Access, Failure, NoRangesError, WrongAnswerError, access_to

log = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 20.0
_LINE_EVERY_S = 30.0
_GONE, _CHANGED, _REFUSED = (404, 410), (412, 416), (401, 403, 407)
_RETRIED = (408, 425, 429)  # besides 500 and above, and no answer at all
_BUGS = (AssertionError, AttributeError, NameError, TypeError)
_AGAIN = "and repeat the command; a run that had begun goes on with resume_from_checkpoint=auto"

T = TypeVar("T")


class RemoteError(DataError):
    """A server does not give what is asked for. Unlike a damaged file, it is never passed over by
    on_bad_shard: skip, or a bad moment of the network would decide what a run is trained on."""

    def __init__(self, text: str = "", status: int | None = None) -> None:
        super().__init__(text)
        self.status = status
        """Of HTTP; None if there was no answer."""


@dataclass(frozen=True, slots=True)
class RemoteStore:
    """Reads remote files; made anywhere, used by any thread of any process.

    Args:
        retry_seconds: the total time in which a failed read is tried again; 0: it is not.
    """

    retry_seconds: float
    closed: threading.Event = field(default_factory=threading.Event)
    """Once set, nothing is tried again: nobody waits for the answers any more."""

    def read(self, url: str, tag: str, start: int, stop: int) -> bytes:
        """Returns bytes [start, stop) of a file.

        Raises RemoteError if the server stays away, the file is gone or has another tag, or the
        login is refused; ConfigError if a package for such addresses is missing.
        """
        access = access_to(url)
        read = partial(_read_whole, access, url, tag, start, stop)
        return self.ask(url, read) if stop > start else b""

    def ask(self, url: str, question: Callable[[], T]) -> T:
        """Returns the answer to a question to the server of `url`; asks again as `read` does."""
        access = access_to(url)
        began = time.monotonic()
        for attempt in itertools.count(1):
            try:
                return question()
            except (UserError, *_BUGS):
                raise
            except NoRangesError:
                raise RemoteError(
                    f"{url}: the server sends whole files only (no HTTP ranges). Copy them to this "
                    "machine, or to a server that has ranges."
                ) from None
            except WrongAnswerError as error:
                failure = Failure(None, str(error))
            except Exception as error:  # each library has dozens, and a read does nothing else
                failure = access.explain(error)
            _raise_if_final(url, failure, access)
            pause = random.uniform(0.5, 1.5) * _FIRST_PAUSE_S * 2 ** min(attempt, 10)
            pause = max(min(pause, _LONGEST_PAUSE_S), failure.wait_s or 0.0)
            waited = time.monotonic() - began
            left = self.retry_seconds - waited
            if left <= 0 or self.closed.is_set():
                break
            _retries.tell(url, failure, left)
            self.closed.wait(min(pause, left))  # the last attempt is at the end of the time
        raise RemoteError(
            f"{url}: the server does not answer ({failure.reason}; {attempt} attempts in "
            f"{waited:.0f} s, dataset.retry_seconds={self.retry_seconds:g}). Check the network and "
            f"the server, {_AGAIN}."
        )


def _read_whole(access: Access, url: str, tag: str, start: int, stop: int) -> bytes:
    data = access.read(url, tag, start, stop)
    if len(data) > stop - start:
        raise NoRangesError
    if len(data) < stop - start:
        raise WrongAnswerError(f"{len(data)} of {stop - start} bytes came")
    return data


def _raise_if_final(url: str, failure: Failure, access: Access) -> None:
    """Raises RemoteError for a failure that asking again cannot mend."""
    status = failure.status
    if status is None or status >= 500 or status in _RETRIED:
        return
    what = f"{url}: {failure.reason}: "
    if status in _GONE:
        is_page = url.startswith("http") and url.endswith("/")
        web = " (folders of web servers need an index page)" if is_page else ""
        remedy = f"Correct the address{web}, or put back what was there."
        raise RemoteError(f"{what}not found. {remedy}", status)
    if status in _CHANGED:
        remedy = f"Start anew with what is there now, or restore it {_AGAIN}."
        raise RemoteError(f"{what}the file has changed since it was listed. {remedy}", status)
    if status in _REFUSED:
        raise RemoteError(f"{what}no permission to read it. {access.login}", status)
    raise RemoteError(f"{what}the request is refused. Check the address.")


class _RetryLog:
    """Tells of reads that are tried again: the first at once, later ones in sums."""

    def __init__(self) -> None:
        self._count, self._told_at = 0, -_LINE_EVERY_S

    def tell(self, url: str, failure: Failure, left_s: float) -> None:
        """Counts a read, and logs a line if the last one is long ago."""
        # No lock: one held by another thread at a fork would never be released in the child. Two
        # threads at once cost at most a line too many.
        self._count += 1
        now = time.monotonic()
        if now - self._told_at >= _LINE_EVERY_S:
            times = f"; {self._count} times since the last line" if self._count > 1 else ""
            line = "%s: %s; trying again for %.0f s (a run goes on while text read ahead lasts%s)"
            log.warning(line, url, failure.reason, left_s, times)
            self._count, self._told_at = 0, now


_retries = _RetryLog()
