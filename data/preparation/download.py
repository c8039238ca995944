"""Files from the web, into a folder: resumable, whole or not there.

The one idea: bytes go to NAME.part and the file gets its name when its size is right. What the
server said of it (NAME.http) tells whether a part can be continued.
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from config import DataError, WriteError
from data.preparation.raw_text import unreadable
from data.sources.meta import write_json

_ATTEMPTS = 5
_PAUSE_S = 1.0  # before the second attempt, then twice as long each time
_TIMEOUT_S = 30.0
_BLOCK_BYTES = 1 << 18
_PACKED = (".gz", ".tgz", ".zip", ".zst", ".bz2", ".xz", ".tar", ".7z", ".rar", ".pdf")
_AGAIN = {408, 416, 425, 429}  # and 500 and above: another attempt may succeed

Fetched = tuple[int, int]
"""(bytes there, bytes in all; 0 where the server does not say)"""


def is_url(text: str) -> bool:
    """Whether this is an address that can be downloaded."""
    return text.startswith(("http://", "https://"))


def read_url_list(path: Path) -> list[str]:
    """The addresses in a file, one per line; blank lines and # comments are left out."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise unreadable(path, error) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start}), so not a list of URLs") from None
    urls = []
    for number, line in enumerate(lines, 1):
        url = line.strip()
        if not url or url.startswith("#"):
            continue
        if not is_url(url):
            raise DataError(f"{path}:{number}: {ascii(url[:80])} is not http:// or https://")
        urls.append(url)
    if not urls:
        raise DataError(f"{path}: no URLs; write one per line")
    return urls


def local_paths(urls: Sequence[str], folder: Path) -> list[Path]:
    """Where each address is downloaded to; raises DataError for those of archives."""
    paths = []
    for number, url in enumerate(urls):
        name = Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name
        if name.lower().endswith(_PACKED):
            raise DataError(f"{url}: not text but packed; download and unpack it, give the file")
        paths.append(folder / f"{number:05d}-{name}")
    return paths


def download(url: str, target: Path) -> Iterator[Fetched]:
    """Fetch a file, from where an earlier attempt stopped; yields how far it is.

    Raises DataError where the server does not give it, WriteError where it cannot be kept.
    """
    if target.exists() and _said(target).get("url") == url:
        return
    reason = ""
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE_S * 2 ** (attempt - 1))
        try:
            yield from _attempt(url, target)
            return
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code} {error.reason}"
            error.close()
            if error.code < 500 and error.code not in _AGAIN:
                raise DataError(f"{url}: {reason}") from None
            if error.code == 416:
                _part(target).unlink(missing_ok=True)
        except (OSError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
    raise DataError(
        f"{url}: {reason} ({_ATTEMPTS} attempts). The same command goes on where it stopped."
    )


def _attempt(url: str, target: Path) -> Iterator[Fetched]:
    part, said = _part(target), _said(target)
    there = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "hatchery"}
    if there and said.get("url") == url and said.get("version"):
        headers |= {"Range": f"bytes={there}-", "If-Range": said["version"]}
    with urllib.request.urlopen(
        urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_S
    ) as response:
        goes_on = response.status == 206
        if goes_on and not response.headers.get("Content-Range", "").startswith(f"bytes {there}-"):
            raise OSError("the server sent another range than asked for")
        there = there if goes_on else 0
        length = response.headers.get("Content-Length")
        total = there + int(length) if length else 0
        if not goes_on:
            _keep(target, url, response.headers)
        for block in iter(lambda: response.read(_BLOCK_BYTES), b""):
            _write(part, block, there)
            there += len(block)
            yield there, total
        if not there:
            _write(part, b"", 0)
    if total and there != total:
        raise OSError(f"the connection ended after {there} of {total} bytes")
    _finish(part, target)


def _part(target: Path) -> Path:
    return target.with_name(f"{target.name}.part")


def _note(target: Path) -> Path:
    return target.with_name(f"{target.name}.http")


def _said(target: Path) -> dict[str, Any]:
    """What is known of the file that was begun."""
    try:
        values = json.loads(_note(target).read_bytes())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _keep(target: Path, url: str, headers: Any) -> None:
    """Remember what identifies this version of the file; a weak ETag does not."""
    tag = headers.get("ETag") or ""
    version = headers.get("Last-Modified") if not tag or tag.startswith("W/") else tag
    write_json(_note(target), {"url": url, "version": version})


def _write(part: Path, block: bytes, at: int) -> None:
    try:
        with part.open("r+b" if at else "wb") as file:
            file.seek(at)
            file.write(block)
    except OSError as error:
        raise WriteError(f"{part}: cannot be written: {error.strerror or error}") from None


def _finish(part: Path, target: Path) -> None:
    try:
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(target)
    except OSError as error:
        raise WriteError(f"{target}: cannot be written: {error.strerror or error}") from None
