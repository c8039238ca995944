"""Writes token files so that an interrupted conversion can be continued.

Tokens are appended to files in a hidden workspace, and once a second a checkpoint (state.json) of
how far they are is written after they have reached the disk. A conversion that goes on cuts off
what was appended after the checkpoint, so an interruption at any moment, also of the power, costs
at most a second of work. Finished files are renamed to their places, the description last.
"""

from __future__ import annotations

import contextlib
import json
import operator
import os
import shutil
import time
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from config import DataError
from data.preparation.errors import writing
from data.sources.tokens.checksums import file_checksums
from data.sources.tokens.meta import FileRecord, meta_path, write_json, write_meta
from data.tokenizers.base import Ids, Tokenizer
from files.atomic import durable_rename

FORMATS = (".bin", ".ids", ".npy")
SAVE_EVERY_S = 1.0
_STATE = "state.json"
_NPY_HEADER_BYTES = 128


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """Where tokens are written: a folder with train, maybe val, and meta.json, or a single file."""

    path: Path
    ending: str = ".bin"
    """Of the files in a folder."""
    has_val: bool = True
    """Whether a folder gets a held-out file."""

    @property
    def is_single(self) -> bool:
        """Whether all tokens go to one file."""
        return self.path.suffix in FORMATS

    @property
    def workspace(self) -> Path:
        """The hidden folder of unfinished work."""
        name = f".{self.path.name}.partial"
        return self.path.with_name(name) if self.is_single else self.path / ".partial"

    @property
    def targets(self) -> dict[str, Path]:
        """The token files by their role: "train" and maybe "val"."""
        if self.is_single:
            return {"train": self.path}
        roles = ("train", "val") if self.has_val else ("train",)
        return {role: self.path / f"{role}{self.ending}" for role in roles}

    @property
    def meta(self) -> Path:
        """The description of the token files."""
        return meta_path(self.path) if self.is_single else self.path / "meta.json"

    def existing(self) -> list[Path]:
        """Returns the files that a conversion would replace or delete."""
        if self.is_single:
            found = [self.path]
        else:
            found = [self.path / f"{role}{end}" for role in ("train", "val") for end in FORMATS]
        return [path for path in [*found, self.meta] if path.exists()]


@dataclass(frozen=True, slots=True)
class Counts:
    """Totals of some pieces: bytes of the source, tokens of train and val, documents."""

    pieces: int = 0
    bytes: int = 0
    train: int = 0
    val: int = 0
    documents: int = 0
    empty: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*map(operator.add, astuple(self), astuple(other)))

    def of(self, role: str) -> int:
        """Returns the tokens of "train" or "val"."""
        return self.train if role == "train" else self.val


@dataclass(frozen=True, slots=True)
class EncodedPiece:
    """The tokens of a piece."""

    train: Ids
    val: Ids
    counts: Counts


class TokenWriter:
    """Appends the tokens of pieces to files in a workspace, and publishes them when all are there.

    Unfinished work there is continued if it has the same `identity`. Other work raises DataError,
    or is deleted if `restart` is true. An OSError becomes a WriteError.
    """

    def __init__(
        self, output: TokenOutput, dtype: np.dtype[Any], identity: str, restart: bool
    ) -> None:
        self._output, self._dtype, self._identity = output, dtype, identity
        self._workspace = output.workspace
        self._is_new_folder = not self._workspace.parent.exists()
        self.counts = Counts()
        self._files: dict[str, BinaryIO] = {}
        self._saved = time.monotonic()
        with writing(self._workspace):
            self._workspace.mkdir(parents=True, exist_ok=True)
            self._load_state(restart)
            for role, path in output.targets.items():
                self._files[role] = self._open(role, path)

    def _load_state(self, restart: bool) -> None:
        try:
            state = json.loads((self._workspace / _STATE).read_bytes())
            identity, counts = state["identity"], Counts(**state["counts"])
        except (OSError, ValueError, KeyError, TypeError):
            return
        if identity == self._identity:
            # A file that is shorter than the state says is not ours any more: begin again.
            if all(
                (self._workspace / path.name).exists()
                and (self._workspace / path.name).stat().st_size >= self._file_bytes(role, counts)
                for role, path in self._output.targets.items()
            ):
                self.counts = counts
        elif not restart:
            raise DataError(
                f"{self._workspace} holds unfinished work of another source, tokenizer or options: "
                "finish that with its own command, or add --overwrite to drop it"
            )

    def _open(self, role: str, path: Path) -> BinaryIO:
        # Room for the header of an .npy file is left at its beginning: see _npy_header.
        file = open(self._workspace / path.name, "r+b" if self.counts.pieces else "wb")  # noqa: SIM115
        end = self._file_bytes(role, self.counts)
        file.truncate(end)  # tokens after the last saved state would be written twice
        file.seek(end)
        return file

    def _file_bytes(self, role: str, counts: Counts) -> int:
        is_npy = self._output.targets[role].suffix == ".npy"
        return (_NPY_HEADER_BYTES if is_npy else 0) + counts.of(role) * self._dtype.itemsize

    def add(self, encoded: EncodedPiece) -> None:
        """Appends the tokens of the next piece."""
        with writing(self._workspace):
            self._files["train"].write(encoded.train.tobytes())
            if "val" in self._files:
                self._files["val"].write(encoded.val.tobytes())
            self.counts += encoded.counts
            if time.monotonic() - self._saved >= SAVE_EVERY_S:
                self._save_state()

    def _save_state(self) -> None:
        # The tokens first: a state that counts tokens which a power loss took would leave a gap.
        for file in self._files.values():
            if not file.closed:
                file.flush()
                os.fsync(file.fileno())
        state = {"identity": self._identity, "counts": asdict(self.counts)}
        write_json(self._workspace / _STATE, state)
        self._saved = time.monotonic()

    def publish(self, tokenizer: Tokenizer) -> None:
        """Moves the files to their places, deletes older ones, and writes the description."""
        targets = self._output.targets
        with writing(self._output.meta.parent):
            self._save_state()
            for role, file in self._files.items():
                if targets[role].suffix == ".npy":
                    file.seek(0)
                    file.write(_npy_header(self._dtype, self.counts.of(role)))
                file.close()
            records = {role: self._record(path) for role, path in targets.items()}
            # The old description goes first: between here and the end the files do not fit it.
            for path in {self._output.meta, *self._output.existing()} - set(targets.values()):
                path.unlink(missing_ok=True)
            for path in targets.values():
                durable_rename(self._workspace / path.name, path)
            tokens = {role: self.counts.of(role) for role in targets}
            write_meta(self._output.meta, tokenizer, self._dtype, tokens, records)
            shutil.rmtree(self._workspace)

    def _record(self, target: Path) -> FileRecord:
        # Checksums are read back from the file: a continued conversion has not seen its beginning.
        path = self._workspace / target.name
        return FileRecord((path.suffix,), path.stat().st_size, file_checksums(path))

    def close(self) -> None:
        """Closes the files and keeps unfinished work; without any, the workspace is deleted."""
        with writing(self._workspace), contextlib.ExitStack() as stack:
            for file in self._files.values():
                stack.callback(file.close)
            if self._workspace.exists() and self.counts.pieces:
                self._save_state()
        if not self.counts.pieces:
            self.discard()

    def discard(self) -> None:
        """Deletes the workspace, and its folder if it was made for it."""
        self.counts = replace(self.counts, pieces=0)
        shutil.rmtree(self._workspace, ignore_errors=True)
        if self._is_new_folder:
            with contextlib.suppress(OSError):  # it is not empty
                self._workspace.parent.rmdir()


def _npy_header(dtype: np.dtype[Any], count: int) -> bytes:
    # numpy pads its header to the length of the count. This one has a fixed size, so that the
    # tokens can be written before their number is known.
    text = repr({"descr": dtype.str, "fortran_order": False, "shape": (count,)})
    size = _NPY_HEADER_BYTES - 10
    return b"\x93NUMPY\x01\x00" + size.to_bytes(2, "little") + text.ljust(size - 1).encode() + b"\n"
