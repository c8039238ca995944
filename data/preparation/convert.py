"""Converts text to token files.

Workers encode pieces of the text, and the main process appends their tokens in order. So the result
does not depend on the number of workers, memory is bounded, and an interrupted conversion continues
after the last piece that was written (`token_writer`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from config import ConfigError, DataError
from data.preparation.raw_text import (
    PIECE_BYTES,
    Piece,
    file_sample,
    is_text,
    plan_pieces,
    read_records,
    read_text,
)
from data.preparation.token_writer import Counts, EncodedPiece, TokenOutput, TokenWriter
from data.preparation.worker_pool import starmap_in_order
from data.tokenizers.base import Ids, Tokenizer
from data.tokenizers.simple import ByteTokenizer, CharTokenizer, char_tokenizer

_VERSION = 1
_NO_TEXT = "no text found in the source: nothing was written"


@dataclass(frozen=True, slots=True)
class Job:
    """What to convert, how, and where to write it."""

    files: Sequence[Path]
    output: TokenOutput
    column: str
    tokenizer: Tokenizer | None
    """None: the characters of the text."""
    dtype: np.dtype[Any] | None
    """None: uint16 if the ids fit, else uint32."""
    val_fraction: float
    workers: int
    restart: bool
    """Delete unfinished work of another job."""

    @property
    def splits_by_position(self) -> bool:
        """Whether val is the end of one text; otherwise each document's hash decides.

        Characters have no separator, so their documents are one text.
        """
        one_text = len(self.files) == 1 and is_text(self.files[0])
        return one_text or self.tokenizer is None or isinstance(self.tokenizer, CharTokenizer)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a conversion is; `resumed_bytes` of `total_bytes` were done by an earlier one."""

    stage: str
    counts: Counts
    total_bytes: int
    resumed_bytes: int


def convert(job: Job) -> Generator[Progress, None, None]:
    """Writes the token files; yields after each piece, and at the end.

    If the generator is closed or killed, the work so far stays in `job.output.workspace`, and the
    same job continues it. Raises DataError for text that cannot be read or encoded, WriteError if
    files cannot be written.
    """
    pieces = plan_pieces(job.files, job.column)
    total = sum(piece.bytes for piece in pieces)
    tokenizer = job.tokenizer
    n_train: list[int | None] = [None] * len(pieces)
    # Val begins after a share of all characters, and the vocabulary of characters is all that
    # occur: both are known only after the whole text was read once, before anything is encoded.
    if tokenizer is None or (job.splits_by_position and job.output.has_val):
        lengths, characters = yield from _survey(job, pieces, total)
        tokenizer = tokenizer or char_tokenizer(characters)
        if job.output.has_val:
            n_train = _train_characters(lengths, job.val_fraction)
    encoder = _PieceEncoder(job, tokenizer)
    identity = _identity(job, tokenizer, encoder.dtype)
    with contextlib.closing(
        TokenWriter(job.output, encoder.dtype, identity, job.restart)
    ) as writer:
        resumed = writer.counts.bytes
        yield Progress("encoding", writer.counts, total, resumed)
        todo = list(zip(pieces, n_train, strict=True))[writer.counts.pieces :]
        with contextlib.closing(starmap_in_order(encoder.encode, todo, job.workers)) as results:
            for encoded in results:
                writer.add(encoded)
                yield Progress("encoding", writer.counts, total, resumed)
        counts = writer.counts
        problem = _missing_tokens(counts, job)
        if problem:
            writer.discard()
            raise DataError(problem)
        writer.publish(tokenizer)
    yield Progress("done", counts, total, resumed)


def _missing_tokens(counts: Counts, job: Job) -> str:
    if not counts.train + counts.val:
        return _NO_TEXT
    for role in job.output.targets:
        if not counts.of(role):
            return (
                f"{counts.documents} documents with --val-fraction {job.val_fraction:g}: none of "
                f"them is in {role}. Give another fraction (0: no val), or one text file"
            )
    return ""


def _survey(
    job: Job, pieces: list[Piece], total: int
) -> Generator[Progress, None, tuple[list[int], set[str]]]:
    """Reads all text once; returns each piece's number of characters and all distinct ones."""
    counts, lengths, characters = Counts(), [], set[str]()
    measure = partial(_measure, column=job.column, tokenizer=job.tokenizer)
    items = [(piece,) for piece in pieces]
    with contextlib.closing(starmap_in_order(measure, items, job.workers)) as measured:
        for piece, (length, found) in zip(pieces, measured, strict=True):
            lengths.append(length)
            characters |= found
            counts += Counts(bytes=piece.bytes)
            yield Progress("reading", counts, total, 0)
    if not sum(lengths):
        raise DataError(_NO_TEXT)
    return lengths, characters


def _measure(piece: Piece, column: str, tokenizer: Tokenizer | None) -> tuple[int, set[str]]:
    texts = _read_texts(piece, column, tokenizer)
    # Only a missing tokenizer asks for the characters: a set of each piece travels to the parent.
    characters = set[str]() if tokenizer else set[str]().union(*texts)
    return sum(map(len, texts)), characters


def _read_texts(piece: Piece, column: str, tokenizer: Tokenizer | None) -> list[str]:
    """Returns the documents of a piece, or the part of a text file that it is."""
    if not is_text(piece.path):
        return list(read_records(piece, column))
    cuts_anywhere = tokenizer is None or isinstance(tokenizer, ByteTokenizer | CharTokenizer)
    return [read_text(piece, None if cuts_anywhere else tokenizer)]


def _train_characters(lengths: list[int], val_fraction: float) -> list[int | None]:
    """Returns how many characters of each piece come before the beginning of val."""
    left = int(sum(lengths) * (1 - val_fraction))
    train: list[int | None] = []
    for length in lengths:
        train.append(min(length, left))
        left -= min(length, left)
    return train


class _PieceEncoder:
    """Encodes pieces in a worker process, and assigns their text to train or val."""

    def __init__(self, job: Job, tokenizer: Tokenizer) -> None:
        self._column, self._tokenizer = job.column, tokenizer
        self._val_fraction = job.val_fraction if job.output.has_val else 0.0
        self._splits_by_position = job.splits_by_position
        size = tokenizer.vocab_size
        self.dtype = job.dtype or np.dtype(np.uint16 if size <= 1 << 16 else np.uint32)
        if size - 1 > np.iinfo(self.dtype).max:
            message = f"--dtype {self.dtype}: ids go up to {size - 1}; choose a wider one, or auto"
            raise ConfigError(message)

    def encode(self, piece: Piece, n_train: int | None) -> EncodedPiece:
        """Returns the tokens of a piece; `n_train` characters of a split text are train."""
        texts = _read_texts(piece, self._column, self._tokenizer)
        try:
            if self._splits_by_position:
                # Split before it is encoded: no token may reach from train into val.
                text = "".join(texts)
                at = len(text) if n_train is None else n_train
                train, val = self._tokenizer.encode(text[:at]), self._tokenizer.encode(text[at:])
            elif is_text(piece.path):
                train, val = self._encode_part(texts[0], piece)
            else:
                train, val = self._encode_documents(texts)
        except DataError as error:
            raise DataError(f"{piece.path}: {error}") from None
        documents, empty = len(texts), texts.count("")
        if is_text(piece.path):  # a document that may consist of many pieces
            documents, empty = int(piece.is_end), 0
        train, val = train.astype(self.dtype), val.astype(self.dtype)
        counts = Counts(
            pieces=1,
            bytes=piece.bytes,
            train=len(train),
            val=len(val),
            documents=documents - empty,
            empty=empty,
        )
        return EncodedPiece(train, val, counts)

    def _encode_part(self, text: str, piece: Piece) -> tuple[Ids, Ids]:
        """Encodes a part of a text file, all of which is one document."""
        ids, separator = self._tokenizer.encode(text), self._tokenizer.separator
        if piece.is_end and separator is not None:
            ids = np.append(ids, np.array([separator], dtype=ids.dtype))
        # The side is decided by the file, not by this part: all pieces must come to the same one.
        none = ids[:0]
        return (none, ids) if self._is_val(file_sample(piece.path)) else (ids, none)

    def _encode_documents(self, texts: list[str]) -> tuple[Ids, Ids]:
        train: list[str] = []
        val: list[str] = []
        for text in filter(None, texts):
            (val if self._is_val(text.encode("utf-8", "replace")) else train).append(text)
        return self._tokenizer.encode_documents(train), self._tokenizer.encode_documents(val)

    def _is_val(self, data: bytes) -> bool:
        # By the hash of the content: equal documents are on one side, so that no text of train is
        # held out, and the split depends neither on the order of the documents nor on workers.
        if not self._val_fraction:
            return False
        number = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
        return number < self._val_fraction * 2**64


def _identity(job: Job, tokenizer: Tokenizer, dtype: np.dtype[Any]) -> str:
    """Returns a hash of everything that must be equal for a conversion to be continued."""
    stats = [(os.fspath(path), path.stat()) for path in job.files]
    files = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    # PIECE_BYTES, because the state counts pieces; size and time of each file instead of a hash of
    # its content, which would read everything again.
    rules = _VERSION, PIECE_BYTES, job.column, tokenizer.fingerprint, dtype.name
    data = repr((files, rules, job.output.ending, job.val_fraction)).encode()
    return hashlib.blake2b(data, digest_size=16).hexdigest()
