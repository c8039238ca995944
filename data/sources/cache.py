"""Arrays kept in the user's cache folder between runs: what was found out about files of text.

A cache file holds a digest of its name and content. It is compared before anything is parsed, so a
damaged or foreign file is noticed and made again; without a cache a start is only slower.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from files.atomic import atomic_write
from files.regular import open_regular

log = logging.getLogger(__name__)

_VERSION = 2
_DIGEST_BYTES = 16


def cache_folder() -> Path:
    """Returns our folder in the user's cache folder; it may not be there yet."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base, "hatchery")


def cache_path(kind: str, *identity: str) -> Path:
    """Returns the cache file for something of that kind and identity."""
    what = "\0".join((str(_VERSION), *identity))
    key = hashlib.blake2b(os.fsencode(what), digest_size=12).hexdigest()
    return cache_folder() / f"{kind}-{key}.npz"


def load_arrays(path: Path) -> dict[str, npt.NDArray[Any]] | None:
    """Returns what `save_arrays` wrote; None without a file and, with a warning, for another."""
    try:
        with os.fdopen(open_regular(path, os.O_RDONLY), "rb") as file:
            digest, content = file.read(_DIGEST_BYTES), file.read()
        # Before np.load: it must not parse what another program or a broken disk wrote.
        if digest != _digest(path, content):
            raise ValueError("not as it was written")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return dict(arrays)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        log.warning("Cache %s: %s; it is made again from the data", path, reason)
        return None


def save_arrays(path: Path, arrays: dict[str, Any]) -> None:
    """Writes arrays to a cache file; does nothing if that is not possible."""
    content = io.BytesIO()
    np.savez(content, **arrays)
    body = content.getvalue()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, lambda file: file.write(_digest(path, body) + body))
    except OSError as error:
        log.debug("no cache: %s", error)


def _digest(path: Path, content: bytes) -> bytes:
    """Returns a digest of the content and of the name, which tells what the cache is about."""
    digest = hashlib.blake2b(os.fsencode(path.name), digest_size=_DIGEST_BYTES)
    digest.update(content)
    return digest.digest()
