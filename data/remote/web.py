"""Web servers, by fsspec and aiohttp. A folder is what its index page links to."""

from __future__ import annotations

import contextlib
import html
import re
from collections.abc import Iterator
from functools import partial
from typing import Any
from urllib.parse import urljoin

import aiohttp
from fsspec.asyn import sync
from fsspec.implementations.http import HTTPFileSystem
from fsspec.utils import glob_translate

from config import DataError
from data.remote.access import (
    CONNECT_S,
    IN_FLIGHT,
    SILENCE_S,
    Ask,
    Failure,
    RemoteFile,
    check_range,
    failure_of_status,
    failure_without_answer,
    glob_root,
    has_magic,
    timeout_s,
)
from data.remote.threads import map_ahead

_LINK = re.compile(r"""<a\s[^>]*?href\s*=\s*["']([^"']+)["']""", re.IGNORECASE)
_MOST_SLASHES = 24


class Web:
    """All web servers."""

    login = "Web addresses are read without a login: make it public, or copy it to a bucket."

    def __init__(self) -> None:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENCE_S)
        self._files = HTTPFileSystem(
            simple_links=False,
            skip_instance_cache=True,
            client_kwargs={"timeout": timeout, "trust_env": True},  # HTTPS_PROXY
        )

    def read(self, url: str, tag: str, start: int, stop: int) -> bytes:
        """Returns bytes [start, stop) of a file, if it still has this tag."""
        headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        if tag:
            headers["If-Match" if tag.startswith('"') else "If-Unmodified-Since"] = tag
        timeout = aiohttp.ClientTimeout(timeout_s(stop - start), sock_read=SILENCE_S)

        async def get() -> bytes:
            session = await self._files.set_session()
            address = self._files.encode_url(url)
            async with session.get(address, headers=headers, timeout=timeout) as answer:
                answer.raise_for_status()
                name = "ETag" if tag.startswith('"') else "Last-Modified"
                if tag and answer.headers.get(name, tag) != tag:  # some servers ignore If-Match
                    raise aiohttp.ClientResponseError(
                        answer.request_info, answer.history, status=412, headers=answer.headers
                    )
                check_range(answer.status, answer.headers, start, stop)
                body: bytes = await answer.read()
                return body

        data: bytes = sync(self._files.loop, get)
        return data

    def find(self, url: str, endings: tuple[str, ...], ask: Ask) -> list[RemoteFile]:
        """Returns the files that an address means."""
        if has_magic(url):
            fixed, pattern = glob_root(url), re.compile(glob_translate(url))
            depth = None if "**" in url else url[len(fixed) + 1 :].count("/")
            below = dict.fromkeys(self._below(fixed, depth, ask))
            names = [name for name in below if pattern.match(name)]
        elif url.endswith(endings):
            names = [url]
        else:
            names = list(dict.fromkeys(self._below(url.rstrip("/"), None, ask)))
        wanted = [name for name in names if name.endswith(endings)]
        # One question for each file, so that a bad moment does not begin the listing anew.
        found = map_ahead(lambda name: ask(name, partial(self._file, name)), wanted, IN_FLIGHT)
        return [*found, *(RemoteFile(name, 0, "") for name in sorted(set(names) - set(wanted)))]

    def _below(self, folder: str, depth: int | None, ask: Ask) -> Iterator[str]:
        """Yields the files that index pages link to, from that of a folder on."""
        if folder.count("/") > _MOST_SLASHES:
            raise DataError(f"{folder}: too deep; is a folder above it a link to itself?")
        for name in ask(f"{folder}/", partial(self._links, folder)):
            if not name.endswith("/"):
                yield name
            elif depth != 0:
                yield from self._below(name.rstrip("/"), depth and depth - 1, ask)

    def _links(self, folder: str) -> list[str]:
        """Returns the addresses below a folder that its index page links to, with the folder as it
        was written and what follows quoted."""
        base: Any = self._files.encode_url(f"{folder}/")

        async def get() -> str:
            session = await self._files.set_session()
            async with session.get(base) as answer:
                answer.raise_for_status()
                is_page = "html" in answer.headers.get("Content-Type", "html")
                return await answer.text(errors="ignore") if is_page else ""

        found = dict[str, None]()
        for link in _LINK.findall(sync(self._files.loop, get)):
            with contextlib.suppress(ValueError):  # no address
                to = self._files.encode_url(urljoin(str(base), html.unescape(link)))
                below = to.raw_path.removeprefix(base.raw_path)
                # Not those that sort the page, by a query, nor those of folders above.
                if to.host == base.host and below not in ("", to.raw_path) and not to.query_string:
                    found[f"{folder}/{below}"] = None
        return sorted(found)

    def _file(self, url: str) -> RemoteFile:
        entry = self._files.info(url)
        if entry["size"] is None:
            raise DataError(f"{url}: the server does not tell its size. Copy it to this machine.")
        tag = entry.get("ETag", "")
        if not tag.startswith('"'):  # a weak one (W/) may be equal for files of different bytes
            tag = entry.get("Last-Modified", "")
        return RemoteFile(url, entry["size"], tag)

    def explain(self, error: Exception) -> Failure:
        """Returns what an error of aiohttp or fsspec means."""
        # fsspec hides what went wrong with a HEAD request behind "not found".
        cause = error.__cause__ if isinstance(error, FileNotFoundError) else None
        if isinstance(cause or error, aiohttp.ClientResponseError):
            answer: Any = cause or error
            return failure_of_status(answer.status, answer.headers or {})
        if cause is None and isinstance(error, FileNotFoundError):
            return Failure(404, "HTTP 404")
        return failure_without_answer(cause or error)


def connect() -> Web:
    """Returns a new access."""
    return Web()
