"""What all kinds of servers have in common: how they are asked, and how a failure is told.

One module for each kind (s3.py, gcs.py, web.py, hub.py) wraps the library that knows it.
"""

from __future__ import annotations

import importlib
import os
import socket
import threading
from collections.abc import Callable, Mapping
from functools import cache
from json import JSONDecodeError
from typing import Any, NamedTuple, Protocol, TypeAlias

from config import ConfigError

CONNECT_S, SILENCE_S = 15.0, 30.0
"""A request fails if nobody answers the call for so long, or nothing comes for so long."""
_SLOWEST_BYTES_PER_S = 50_000  # slower than this counts as a server that stays away
IN_FLIGHT = 32
"""Requests at a time, where many files are asked for."""

_MODULES = {"s3": "s3", "gs": "gcs", "http": "web", "https": "web", "hf": "hub"}
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
_making: dict[int, threading.Lock] = {}
"""By process, what keeps two threads from making the same access."""


class RemoteFile(NamedTuple):
    """A file as its server lists it."""

    path: str
    """Below the listing's root."""
    size: int
    """Bytes."""
    tag: str
    """Changes with the content: an ETag, a generation, a date; '' where the server has none."""


class Failure(NamedTuple):
    """Why a request failed, without anything that may be secret."""

    status: int | None
    """Of HTTP; None if there was no answer."""
    reason: str
    wait_s: float | None = None
    """How long the server asks to wait."""


class NoRangesError(Exception):
    """A server that answers with the whole file where a part is asked for."""


class WrongAnswerError(Exception):
    """An answer that is not what was asked for; its text may be shown."""


Ask: TypeAlias = Callable[[str, Callable[[], Any]], Any]


class Access(Protocol):
    """One kind of server, with connections that all threads of a process share."""

    login: str
    """What to do about a refused login, for messages."""

    def read(self, url: str, tag: str, start: int, stop: int) -> bytes:
        """Returns bytes [start, stop) of a file, if it still has this tag."""

    def find(self, url: str, endings: tuple[str, ...], ask: Ask) -> list[RemoteFile]:
        """Returns the files that an address means, by their full addresses: one, those below a
        folder, or those that match a glob. Sizes and tags may be given for these endings only.

        ask: puts a question on an address to its server, as `RemoteStore.ask` does.
        """

    def explain(self, error: Exception) -> Failure:
        """Returns what an error of the other two means."""


def access_to(url: str) -> Access:
    """Returns the access to the server of an address; ConfigError if a package is missing."""
    # By process: a forked child must not use connections, threads and locks of its parent. One
    # thread makes it: a client of S3 takes half a second of a core.
    process = os.getpid()
    with _making.setdefault(process, threading.Lock()):
        return _access(url.split("://", 1)[0], process)


@cache
def _access(scheme: str, process: int) -> Access:
    del process
    try:
        module: Any = importlib.import_module(f"data.remote.{_MODULES[scheme]}")
    except ImportError as error:
        raise ConfigError(
            f"{scheme}:// needs {_PACKAGES.get(scheme, 'huggingface_hub')}, which cannot be "
            f"imported here ({error}). Install it: pip install -r requirements-remote.txt"
        ) from None
    access: Access = module.connect()
    return access


def timeout_s(count: int) -> float:
    """Returns how long a read of `count` bytes may take."""
    return SILENCE_S + count / _SLOWEST_BYTES_PER_S


def failure_of_status(status: int, headers: Mapping[str, str]) -> Failure:
    """Returns the failure that an HTTP answer means."""
    wait = headers.get("Retry-After", headers.get("retry-after", ""))
    # It may also be a date, which the growing pauses do as well as.
    return Failure(status, f"HTTP {status}", float(wait) if wait.isdigit() else None)


def failure_without_answer(error: BaseException) -> Failure:
    """Returns the failure of a request that brought no answer."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, socket.gaierror):
            return Failure(None, "host name not found")
        cause = cause.__cause__ or cause.__context__
    # The addresses and options that a library refuses by itself; no later attempt is another.
    # Certificates are of OSError, and a body that is cut is no JSON: both may get well.
    final = isinstance(error, ValueError) and not isinstance(
        error, (OSError, JSONDecodeError, UnicodeError)
    )
    return Failure(400 if final else None, type(error).__name__)


def check_range(status: int, headers: Mapping[str, str], start: int, stop: int) -> None:
    """Checks by its headers that an answer holds the bytes [start, stop) of a file.

    Raises NoRangesError for a whole file, WrongAnswerError for other bytes.
    """
    if status != 206:
        if start or int(headers.get("Content-Length", -1)) != stop - start:
            raise NoRangesError  # before all of a large file has come
        return
    wanted = f"bytes {start}-"
    if not headers.get("Content-Range", wanted).startswith(wanted):
        raise WrongAnswerError("other bytes came than were asked for")


def glob_root(url: str) -> str:
    """Returns the folder that all files of a glob are below."""
    fixed = url[: min(url.index(wildcard) for wildcard in "*[" if wildcard in url)]
    return fixed.rsplit("/", 1)[0]


def has_magic(path: str) -> bool:
    """Returns whether a path is a glob."""
    return any(character in path for character in "*[")
