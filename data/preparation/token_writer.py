"""Token files in the making, beside a note of how far they are.

The one idea: tokens are appended, and the note is written after they have reached the disk. What
stands behind that is cut off when the work goes on, so a stop at any moment, of the power too,
costs at most what was done since the last note.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from config import DataError, WriteError
from data.sources.checksums import file_checksums
from data.sources.meta import FileRecord, write_json, write_meta
from data.tokenizers.base import Ids, Tokenizer

_NOTE = "state.json"
_NOTE_EVERY_S = 1.0
_NPY_HEADER_BYTES = 128


@dataclass(frozen=True, slots=True)
class Encoded:
    """The tokens of a piece, and how many documents they are."""

    train: Ids
    val: Ids
    documents: int
    empty: int


@dataclass(frozen=True, slots=True)
class Counts:
    """What the first `pieces` pieces amount to; `bytes` are of the source."""

    pieces: int = 0
    bytes: int = 0
    train: int = 0
    val: int = 0
    documents: int = 0
    empty: int = 0

    def plus(self, encoded: Encoded, size: int) -> Counts:
        """With one more piece, of `size` bytes."""
        return Counts(
            self.pieces + 1,
            self.bytes + size,
            self.train + len(encoded.train),
            self.val + len(encoded.val),
            self.documents + encoded.documents,
            self.empty + encoded.empty,
        )


class TokenWriter:
    """Appends tokens to files in `workspace`, which become `targets` ("train" and maybe "val").

    `identity` tells whether what is there already belongs to the same work; if not, that is a
    DataError, or dropped where `restart` is true. OSErrors become WriteErrors.
    """

    def __init__(
        self,
        workspace: Path,
        targets: Mapping[str, Path],
        dtype: np.dtype[Any],
        identity: str,
        restart: bool,
    ) -> None:
        self._workspace, self._targets, self._identity = workspace, targets, identity
        self._dtype = dtype
        self.counts = Counts()
        self._files: dict[str, BinaryIO] = {}
        self._noted = time.monotonic()
        self._made = [path for path in (workspace, workspace.parent) if not path.exists()]
        with _writing(workspace):
            workspace.mkdir(parents=True, exist_ok=True)
            self._read_note(restart)
            for name, path in targets.items():
                self._files[name] = self._open(name, path)

    def _read_note(self, restart: bool) -> None:
        """Take up what was done, if all of it is there."""
        try:
            note = json.loads((self._workspace / _NOTE).read_bytes())
            identity, counts = note["identity"], Counts(**note["counts"])
        except (OSError, ValueError, KeyError, TypeError):
            return
        if identity == self._identity:
            ends = (self._end(name, counts) for name in self._targets)
            files = (self._workspace / path.name for path in self._targets.values())
            if all(f.exists() and f.stat().st_size >= e for f, e in zip(files, ends, strict=True)):
                self.counts = counts
        elif not restart:
            raise DataError(
                f"{self._workspace} holds unfinished work of another source, tokenizer or options: "
                "finish that with its own command, or add --overwrite to drop it"
            )

    def _open(self, name: str, path: Path) -> BinaryIO:
        file = open(self._workspace / path.name, "r+b" if self.counts.pieces else "wb")  # noqa: SIM115
        end = self._end(name, self.counts)
        file.truncate(end)
        file.seek(end)
        return file

    def _end(self, name: str, counts: Counts) -> int:
        """The size of a file in bytes."""
        header = _NPY_HEADER_BYTES if self._targets[name].suffix == ".npy" else 0
        tokens: int = getattr(counts, name)
        return header + tokens * self._dtype.itemsize

    def add(self, encoded: Encoded, size: int) -> None:
        """Append the tokens of the next piece, of `size` bytes."""
        with _writing(self._workspace):
            for name, file in self._files.items():
                file.write(getattr(encoded, name).tobytes())
            self.counts = self.counts.plus(encoded, size)
            if time.monotonic() - self._noted >= _NOTE_EVERY_S:
                self._note()

    def _note(self) -> None:
        for file in self._files.values():
            if not file.closed:
                file.flush()
                os.fsync(file.fileno())
        note = {"identity": self._identity, "counts": asdict(self.counts)}
        write_json(self._workspace / _NOTE, note)
        self._noted = time.monotonic()

    def publish(self, meta: Path, tokenizer: Tokenizer, stale: list[Path]) -> None:
        """Give the files their places, the description last; `stale` ones are deleted."""
        with _writing(meta.parent):
            self._note()
            for name, file in self._files.items():
                if self._targets[name].suffix == ".npy":
                    file.seek(0)
                    file.write(_npy_header(self._dtype, getattr(self.counts, name)))
                    file.flush()
                    os.fsync(file.fileno())
                file.close()
            records = {name: self._record(path) for name, path in self._targets.items()}
            for path in [meta, *stale]:
                if path not in self._targets.values():
                    path.unlink(missing_ok=True)
            for path in self._targets.values():
                (self._workspace / path.name).replace(path)
            tokens = {name: getattr(self.counts, name) for name in self._targets}
            write_meta(meta, tokenizer, self._dtype, tokens, records)
            shutil.rmtree(self._workspace)

    def _record(self, target: Path) -> FileRecord:
        """Size and checksums, read back: work that was stopped and goes on knows none so far."""
        path = self._workspace / target.name
        return FileRecord((path.suffix,), path.stat().st_size, file_checksums(path))

    def close(self) -> None:
        """Note how far the work is; leave nothing where nothing was done."""
        with _writing(self._workspace), contextlib.ExitStack() as stack:
            for file in self._files.values():
                stack.callback(file.close)
            if self._workspace.exists() and self.counts.pieces:
                self._note()
        if not self.counts.pieces:
            self.discard()

    def discard(self) -> None:
        """Delete the work, and the folder if it was made for it."""
        self.counts = replace(self.counts, pieces=0)
        shutil.rmtree(self._workspace, ignore_errors=True)
        if self._workspace.parent in self._made:
            with contextlib.suppress(OSError):  # not empty
                self._workspace.parent.rmdir()


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WriteError(f"{path}: cannot be written: {error.strerror or error}") from None


def _npy_header(dtype: np.dtype[Any], count: int) -> bytes:
    """Of one size whatever the count, so that it can be written when that is known."""
    text = repr({"descr": dtype.str, "fortran_order": False, "shape": (count,)})
    size = _NPY_HEADER_BYTES - 10
    return b"\x93NUMPY\x01\x00" + size.to_bytes(2, "little") + text.ljust(size - 1).encode() + b"\n"
