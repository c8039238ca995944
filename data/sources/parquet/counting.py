"""How many tokens the segments of a folder have: counted once, or estimated from a sample.

The sizes in footers are of encoded pages, which store repeated text once. So the text itself is
read: a folder of up to READ_BYTES whole, of a larger one a sample of segments; of remote text
REMOTE_BYTES. Of text whose tokens are not bytes up to ENCODE_BYTES are encoded, from every segment
that is read. The counts are kept in the cache, so only the first start takes this time.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from config import DatasetConfig
from data.loading.order import Integers
from data.sources.cache import cache_path, load_arrays, save_arrays
from data.sources.parquet.index import Index
from data.sources.parquet.reader import WHOLE_GROUP_BYTES, DocumentReader
from data.sources.parquet.segments import SegmentTable
from data.tokenizers.base import Tokenizer
from data.tokenizers.simple import ByteTokenizer

log = logging.getLogger(__name__)

READ_BYTES = 4 << 30  # compressed; about ten seconds of one core
REMOTE_BYTES = 64 << 20  # of text
ENCODE_BYTES = 16 << 20  # takes about as long
SAMPLE_SEGMENTS = 256
MIN_REMOTE_SEGMENTS = 8
_MIN_ENCODED_BYTES = 1 << 10  # of a segment of which a part is encoded
_MIN_ERROR = 0.001  # of an estimate
_THREADS = 8
_TASKS = 64
_QUIET_S, _LINE_EVERY_S = 2.0, 5.0


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """The tokens of each segment; their sum may be off by the fraction `error`, 0 if counted."""

    tokens: Integers
    error: float


def count_tokens(
    index: Index, table: SegmentTable, tokenizer: Tokenizer, config: DatasetConfig
) -> TokenCounts:
    """Counts or estimates the tokens of all segments; raises DataError for unreadable text."""
    chosen = _choose_segments(index, table)
    measure = partial(_measure_cached, index, table, config, chosen)
    sizes = measure("text", DocumentReader.measure, columns=2)  # documents, bytes
    tokens, fraction = sizes.sum(axis=1), 1.0  # of bytes: one each, and one separator a document
    if not isinstance(tokenizer, ByteTokenizer):
        fraction = min(1.0, ENCODE_BYTES / max(1, int(sizes[:, 1].sum())))

        def encoded(documents: DocumentReader, segment: int) -> tuple[int]:
            return (_encoded_tokens(documents, segment, tokenizer, fraction),)

        tokens = measure(f"{tokenizer.fingerprint} {fraction}", encoded, columns=1)[:, 0]
    if len(chosen) < len(table):
        weights = table.bytes[chosen]
        ratio = tokens.sum() / max(1, weights.sum())
        estimates = np.ceil(table.bytes * ratio).astype(np.int64)
    elif fraction < 1.0:
        estimates, weights = tokens, sizes[:, 1]
    else:
        return TokenCounts(tokens, 0.0)
    # A segment of an estimated 0 tokens may have some, and lanes could not share it.
    return TokenCounts(np.maximum(estimates, 1), _error(tokens, weights))


def _choose_segments(index: Index, table: SegmentTable) -> Integers:
    """Returns every segment, or evenly spread ones: text often changes from file to file."""
    among, total, count = np.arange(len(table)), int(table.bytes.sum()), SAMPLE_SEGMENTS
    if index.tags and total > REMOTE_BYTES:
        # Those that begin their row groups: all that is before a segment has to be fetched too.
        among = np.flatnonzero(table.first == 0)
        fetched = np.minimum(index.groups[table.group[among], 2], WHOLE_GROUP_BYTES)
        count = min(count, max(MIN_REMOTE_SEGMENTS, REMOTE_BYTES // int(fetched.mean())))
    elif total <= READ_BYTES:
        return among
    if len(among) <= count:
        return among
    return among[np.linspace(0, len(among) - 1, count).astype(np.int64)]


def _error(tokens: Integers, sizes: Integers) -> float:
    """Returns the fraction by which a sum over sampled segments may be off.

    Two standard errors of the ratio of tokens to sizes.
    """
    ratio = tokens.sum() / max(1, sizes.sum())
    residuals = (tokens - ratio * sizes) / max(1.0, float(tokens.mean()))
    return max(_MIN_ERROR, 2 * float(np.sqrt(np.mean(residuals**2) / max(1, len(tokens)))))


def _encoded_tokens(
    documents: DocumentReader, segment: int, tokenizer: Tokenizer, fraction: float
) -> int:
    """Returns the tokens of a segment, estimated from about that fraction of its text."""
    texts, _ = documents.read(segment, 0, 0, fraction < 1.0)
    if fraction == 1.0:
        return len(tokenizer.encode_documents(texts.to_pylist()))
    total = sum(len(text.as_py().encode()) for text in texts)
    budget, tokens, size = max(_MIN_ENCODED_BYTES, int(fraction * total)), 0, 0
    for text in texts:
        if size >= budget:
            break
        # A cut may add a token, so documents are encoded whole unless one exceeds the budget.
        part = text.as_py()[:budget]
        tokens, size = tokens + len(tokenizer.encode(part)), size + len(part.encode())
    separators = 0 if tokenizer.separator is None else len(texts)
    return -(-total * tokens // max(1, size)) + separators


def _measure_cached(
    index: Index,
    table: SegmentTable,
    config: DatasetConfig,
    chosen: Integers,
    what: str,
    measure: Callable[[DocumentReader, int], Sequence[int]],
    *,
    columns: int,
) -> Integers:
    """Returns figures (n, columns) of the chosen segments, from the cache if they are there.

    Args:
        what: identifies the figures in the cache.
        measure: returns the figures of one segment; called in several threads.
    """
    root = index.place
    rule = f"{what} {len(chosen)} of {len(table)}"
    cache = cache_path("tokens", root, index.column, index.digest(), rule)
    known = load_arrays(cache)
    if known is not None:
        return known["figures"]

    def measure_some(segments: Integers) -> tuple[list[Sequence[int]], int]:
        documents = DocumentReader(index, table, config)
        try:
            found = []
            for i, segment in enumerate(segments.tolist()):
                documents.prefetch(0, map(int, segments[i:]))
                found.append(measure(documents, segment))
        finally:
            documents.close()
        return found, len(documents.unreadable)

    figures: list[Sequence[int]] = []
    unreadable = 0
    began = shown = time.monotonic()
    # Successive segments to a task: parts of one row group are decoded in order.
    tasks = np.array_split(chosen, min(_TASKS, len(chosen)))
    threads = min(_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads, thread_name_prefix="count") as pool:
        try:
            for number, (found, skipped) in enumerate(pool.map(measure_some, tasks), 1):
                figures += found
                unreadable += skipped
                now = time.monotonic()
                if now - began > _QUIET_S and now - shown > _LINE_EVERY_S:
                    shown = now
                    done = number * 100 // len(tasks)
                    log.warning("Counting the tokens of %s, once: %d %%", root, done)
        except BaseException:
            # Ctrl-C would otherwise wait until all of the text is read.
            pool.shutdown(cancel_futures=True)
            raise
    result = np.array(figures, dtype=np.int64).reshape(-1, columns)
    if not unreadable:  # what cannot be read now may be readable at the next start
        save_arrays(cache, {"figures": result})
    return result
