"""Text to token files: `train.bin`, `val.bin` and `meta.json` in a folder, or one file of tokens.

The one idea: pieces of the text are encoded by any number of processes and appended in order, and a
small file says how many pieces the rest stands for. So the result does not depend on the number of
processes, memory is bounded, and a conversion that was stopped goes on where it was. What is ready
is renamed into place, the description last.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import hashlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from config import ConfigError, DataError, UserError
from data.preparation.raw_text import (
    PIECE_BYTES,
    Piece,
    head,
    is_text,
    plan_pieces,
    read_piece,
    read_text,
)
from data.preparation.token_writer import Counts, Encoded, TokenWriter
from data.sources.meta import meta_path
from data.tokenizers.base import Ids, Tokenizer
from data.tokenizers.simple import ByteTokenizer, CharTokenizer, char_tokenizer

FORMATS = (".bin", ".ids", ".npy")
_VERSION = 1
_ALL = -1  # of a piece's characters

_PIECES_PER_PROCESS = 4  # fewer take less time than the start of a process
_NO_TEXT = "no text found in the source: nothing was written"
_CUT_ANYWHERE = (ByteTokenizer, CharTokenizer)  # no token of theirs spans characters

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Job:
    """What to make of which files; `out` is a folder, or a file where its name ends so."""

    files: Sequence[Path]
    out: Path
    column: str
    tokenizer: Tokenizer | None  # None: characters, those of the text
    ending: str
    dtype: np.dtype[Any] | None  # None: uint16 where the ids fit, else uint32
    val_fraction: float
    workers: int
    restart: bool  # drop unfinished work of another kind

    @property
    def is_single(self) -> bool:
        """Whether all tokens go to one file."""
        return self.out.suffix in FORMATS

    @property
    def is_running_text(self) -> bool:
        """Whether the text is one, cut once into train and val, instead of many documents."""
        one_text = len(self.files) == 1 and is_text(self.files[0])
        return one_text or self.tokenizer is None or isinstance(self.tokenizer, CharTokenizer)

    @property
    def workspace(self) -> Path:
        """Where unfinished work is kept."""
        name = f".{self.out.name}.partial"
        return self.out.with_name(name) if self.is_single else self.out / ".partial"

    @property
    def targets(self) -> dict[str, Path]:
        """The token files by what they hold."""
        if self.is_single:
            return {"train": self.out}
        names = ("train", "val") if self.val_fraction else ("train",)
        return {name: self.out / f"{name}{self.ending}" for name in names}

    @property
    def meta(self) -> Path:
        """The description."""
        return meta_path(self.out) if self.is_single else self.out / "meta.json"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a conversion is; of its `total` bytes, `kept` were done before it was stopped."""

    stage: str
    counts: Counts
    total: int
    kept: int


@dataclass(frozen=True, slots=True)
class _Work:
    """What a process needs to know besides the pieces."""

    column: str
    tokenizer: Tokenizer | None
    dtype: np.dtype[Any]
    val_fraction: float
    is_running_text: bool


def existing(job: Job) -> list[Path]:
    """The files that a conversion would replace."""
    if job.is_single:
        found = [job.out, job.meta]
    else:
        found = [job.out / f"{name}{ending}" for name in ("train", "val") for ending in FORMATS]
        found.append(job.meta)
    return [path for path in found if path.exists()]


def convert(job: Job) -> Generator[Progress, None, None]:
    """Write the token files; yields after each piece, the last time when all is in place.

    Raises DataError for text that cannot be read or encoded, WriteError where files cannot be
    written. What is done until then, or until the generator is closed, is kept in
    `job.workspace`, and the same job goes on from there.
    """
    pieces = plan_pieces(job.files, job.column)
    total = sum(piece.bytes for piece in pieces)
    tokenizer, train = job.tokenizer, [_ALL] * len(pieces)
    if tokenizer is None or (job.is_running_text and len(job.targets) > 1):
        lengths, characters = yield from _survey(job, pieces, total)
        tokenizer = tokenizer or char_tokenizer(characters)
        if len(job.targets) > 1:
            train = _train_characters(lengths, job.val_fraction)
    work = _work(job, tokenizer)
    identity = _identity(job, tokenizer, work.dtype)
    store = TokenWriter(job.workspace, job.targets, work.dtype, identity, job.restart)
    with contextlib.ExitStack() as stack:
        stack.callback(store.close)
        kept = store.counts.bytes
        yield Progress("encoding", store.counts, total, kept)
        todo = list(zip(pieces, train, strict=True))[store.counts.pieces :]
        for encoded in stack.enter_context(_in_order(_encode, todo, work, job.workers)):
            store.add(encoded, pieces[store.counts.pieces].bytes)
            yield Progress("encoding", store.counts, total, kept)
        _check_counts(store, job)
        store.publish(job.meta, tokenizer, existing(job))
    yield Progress("done", store.counts, total, kept)


def _check_counts(store: TokenWriter, job: Job) -> None:
    """Every file holds tokens; what cannot become one is not kept."""
    counts = store.counts
    if not counts.train + counts.val:
        store.discard()
        raise DataError(_NO_TEXT)
    for name in job.targets:
        if not getattr(counts, name):
            store.discard()
            raise DataError(
                f"{counts.documents} documents with --val-fraction {job.val_fraction:g}: none of "
                f"them is in {name}. Give another fraction (0: no val), or one text file"
            )


def _work(job: Job, tokenizer: Tokenizer) -> _Work:
    size = tokenizer.vocab_size
    dtype = job.dtype or np.dtype(np.uint16 if size <= 1 << 16 else np.uint32)
    if size - 1 > np.iinfo(dtype).max:
        raise ConfigError(f"--dtype {dtype}: ids go up to {size - 1}; choose a wider one, or auto")
    fraction = job.val_fraction if len(job.targets) > 1 else 0.0
    return _Work(job.column, tokenizer, dtype, fraction, job.is_running_text)


def _survey(
    job: Job, pieces: list[Piece], total: int
) -> Generator[Progress, None, tuple[list[int], set[str]]]:
    """The characters of each piece, and those that occur where they are the tokens."""
    work = _Work(job.column, job.tokenizer, np.dtype(np.uint8), 0.0, job.is_running_text)
    counts, lengths, characters = Counts(), [], set[str]()
    with _in_order(_measure, pieces, work, job.workers) as measured:
        for piece, (length, found) in zip(pieces, measured, strict=True):
            lengths.append(length)
            characters |= found
            counts = replace(counts, bytes=counts.bytes + piece.bytes)
            yield Progress("reading", counts, total, 0)
    if not sum(lengths):
        raise DataError(_NO_TEXT)
    return lengths, characters


def _measure(piece: Piece, work: _Work) -> tuple[int, set[str]]:
    texts = _texts(piece, work)
    found = set[str]() if work.tokenizer else set[str]().union(*texts)
    return sum(map(len, texts)), found


def _train_characters(lengths: list[int], val_fraction: float) -> list[int]:
    """How many characters of each piece come before the place where val begins."""
    left, train = int(sum(lengths) * (1 - val_fraction)), []
    for length in lengths:
        train.append(min(length, left))
        left -= train[-1]
    return train


def _texts(piece: Piece, work: _Work) -> list[str]:
    """The documents of a piece."""
    if not is_text(piece.path):
        return list(read_piece(piece, work.column))
    cuts_anywhere = work.tokenizer is None or isinstance(work.tokenizer, _CUT_ANYWHERE)
    return [read_text(piece, None if cuts_anywhere else work.tokenizer)]


def _encode(item: tuple[Piece, int], work: _Work) -> Encoded:
    """The tokens of a piece; of running text the first characters, as many as given, are train."""
    piece, train = item
    assert work.tokenizer is not None
    texts = _texts(piece, work)
    documents, empty = len(texts), sum(not text for text in texts)
    try:
        if work.is_running_text:
            text = "".join(texts)
            at = len(text) if train == _ALL else train
            parts = [work.tokenizer.encode(part) for part in (text[:at], text[at:])]
        elif is_text(piece.path):
            parts = _part_of_document(texts[0], piece, work)
        else:
            sides = _sides(texts, work.val_fraction)
            parts = [work.tokenizer.encode_documents(side) for side in sides]
    except DataError as error:
        raise DataError(f"{piece.path}: {error}") from None
    if is_text(piece.path):
        documents, empty = int(piece.is_end), 0
    first, second = (part.astype(work.dtype) for part in parts)
    return Encoded(first, second, documents - empty, empty)


def _part_of_document(text: str, piece: Piece, work: _Work) -> list[Ids]:
    """A piece of a text file, which is one document; its head tells where it belongs."""
    assert work.tokenizer is not None
    ids, end = work.tokenizer.encode(text), work.tokenizer.separator
    if piece.is_end and end is not None:
        ids = np.append(ids, np.array([end], dtype=ids.dtype))
    nothing = ids[:0]
    return [nothing, ids] if _is_val(head(piece.path), work.val_fraction) else [ids, nothing]


def _sides(texts: list[str], val_fraction: float) -> tuple[list[str], list[str]]:
    """The documents of train and of val; equal documents are on one side."""
    sides: tuple[list[str], list[str]] = [], []
    for text in texts:
        if text:
            sides[_is_val(text.encode("utf-8", "replace"), val_fraction)].append(text)
    return sides


def _is_val(data: bytes, val_fraction: float) -> bool:
    if not val_fraction:
        return False
    number = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
    return number < val_fraction * 2**64


def _identity(job: Job, tokenizer: Tokenizer, dtype: np.dtype[Any]) -> str:
    """What must be the same for a conversion to go on."""
    stats = [(os.fspath(path), path.stat()) for path in job.files]
    files = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    rules = _VERSION, PIECE_BYTES, job.column, tokenizer.fingerprint, dtype.name
    data = repr((files, rules, job.ending, job.val_fraction)).encode()
    return hashlib.blake2b(data, digest_size=16).hexdigest()


@contextlib.contextmanager
def _in_order(
    function: Callable[[T, _Work], R], items: Sequence[T], work: _Work, workers: int
) -> Iterator[Iterator[R]]:
    """The results for the items, in their order, from so many processes; few are held at once.

    Processes are started anew, not forked: they inherit no thread and no lock.
    """
    workers = min(workers, len(items) // _PIECES_PER_PROCESS)
    if workers <= 1:
        yield (function(item, work) for item in items)
        return
    with _no_interrupt():  # processes inherit that Ctrl-C is for the first one
        pool = concurrent.futures.ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), _begin, (work,)
        )
        first = [pool.submit(_call, function, item) for item in items[: 2 * workers]]
    waiting = collections.deque(first)
    try:
        yield _results(pool, function, waiting, items[2 * workers :])
    finally:
        pool.shutdown(cancel_futures=True)


def _results(
    pool: concurrent.futures.ProcessPoolExecutor,
    function: Callable[[T, _Work], R],
    waiting: collections.deque[concurrent.futures.Future[R]],
    items: Sequence[T],
) -> Iterator[R]:
    rest = iter(items)
    try:
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(_call, function, item) for item in itertools.islice(rest, 1))
            yield result
    except BrokenProcessPool:
        raise UserError(
            "a worker process was ended from outside (too little memory?). The same command goes "
            "on where it stopped; --workers N with a smaller N needs less memory"
        ) from None


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_of_process: list[_Work] = []


def _begin(work: _Work) -> None:
    """Start of a process: it ends with the first one, however that ends."""
    _of_process[:] = [work]
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _call(function: Callable[[T, _Work], R], item: T) -> R:
    return function(item, _of_process[0])
