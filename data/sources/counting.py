"""How many tokens the units of a folder give: counted once, or estimated from a sample.

The sizes in footers are of encoded pages (what is repeated is stored once), so the text itself is
read: a folder of up to READ_BYTES whole, a larger one here and there. Of text that is not to be
bytes up to ENCODE_BYTES are encoded, from all over it. What was found is kept in the cache, so only
the first start takes the time.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from config import DatasetConfig
from data.loading.order import Integers
from data.sources.parquet_index import (
    Index,
    Units,
    cache_path,
    index_digest,
    load_arrays,
    save_arrays,
)
from data.sources.parquet_reader import DocumentReader
from data.tokenizers.base import Tokenizer
from data.tokenizers.simple import ByteTokenizer

log = logging.getLogger(__name__)

READ_BYTES = 4 << 30  # encoded; about ten seconds of one core
ENCODE_BYTES = 16 << 20  # about as long
_SAMPLE_UNITS = 256
_LEAST_BYTES = 1 << 10  # of a unit of which a part is encoded
_LEAST_ERROR = 0.001  # of an estimate
_THREADS = 8
_CHUNKS = 64
_QUIET_S, _LINE_EVERY_S = 2.0, 5.0


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """The tokens of each unit; their sum may be off by the share `error`, 0 where it is counted."""

    tokens: Integers
    error: float


def count_tokens(
    index: Index, units: Units, tokenizer: Tokenizer, config: DatasetConfig
) -> TokenCounts:
    """Count or estimate the tokens of all units; raises DataError for text that cannot be read."""
    chosen = np.arange(len(units))
    if int(units.bytes.sum()) > READ_BYTES and len(units) > _SAMPLE_UNITS:
        chosen = np.linspace(0, len(units) - 1, _SAMPLE_UNITS).astype(np.int64)
    count = _Counter(index, units, config, chosen)
    sizes = count("text", DocumentReader.measure, 2)
    tokens, share = sizes.sum(axis=1), 1.0
    if not isinstance(tokenizer, ByteTokenizer):
        share = min(1.0, ENCODE_BYTES / max(1, int(sizes[:, 1].sum())))
        identity = f"{tokenizer.fingerprint} {share}"

        def encoded(documents: DocumentReader, unit: int) -> tuple[int]:
            return (_encoded_tokens(documents, unit, tokenizer, share),)

        tokens = count(identity, encoded, 1)[:, 0]
    if len(chosen) < len(units):
        weights = units.bytes[chosen]
        ratio = tokens.sum() / max(1, weights.sum())
        every = np.ceil(units.bytes * ratio).astype(np.int64)
    elif share < 1.0:
        every, weights = tokens, sizes[:, 1]
    else:
        return TokenCounts(tokens, 0.0)
    # A unit of an estimated 0 tokens may have some, and could not be cut.
    return TokenCounts(np.maximum(every, 1), _error(tokens, weights))


def _error(tokens: Integers, sizes: Integers) -> float:
    """The share by which a sum of sampled units may be off: two standard errors of their ratio."""
    ratio = tokens.sum() / max(1, sizes.sum())
    residuals = (tokens - ratio * sizes) / max(1.0, float(tokens.mean()))
    return max(_LEAST_ERROR, 2 * float(np.sqrt(np.mean(residuals**2) / max(1, len(tokens)))))


def _encoded_tokens(
    documents: DocumentReader, unit: int, tokenizer: Tokenizer, share: float
) -> int:
    """The tokens of a unit, of which about that share of the text is encoded."""
    texts, _ = documents.read(unit, 0, 0, share < 1.0)
    if share == 1.0:
        return len(tokenizer.encode_documents(texts.to_pylist()))
    total = sum(len(text.as_py().encode()) for text in texts)
    budget, tokens, size = max(_LEAST_BYTES, int(share * total)), 0, 0
    for text in texts:
        if size >= budget:
            break
        part = text.as_py()[
            :budget
        ]  # what is cut has a token too many, so documents mostly are not
        tokens, size = tokens + len(tokenizer.encode(part)), size + len(part.encode())
    ends = 0 if tokenizer.separator is None else len(texts)
    return -(-total * tokens // max(1, size)) + ends


class _Counter:
    """Calls a function for each chosen unit, in threads, and keeps what it found in the cache."""

    def __init__(self, index: Index, units: Units, config: DatasetConfig, chosen: Integers) -> None:
        self._index, self._units, self._config, self._chosen = index, units, config, chosen

    def __call__(
        self, what: str, measure: Callable[[DocumentReader, int], Sequence[int]], width: int
    ) -> Integers:
        """(n, width) figures of the chosen units; `what` tells what of them."""
        rule = f"{what} {len(self._chosen)} of {len(self._units)}"
        root = os.path.realpath(self._index.root)
        cache = cache_path("tokens", root, self._index.column, index_digest(self._index), rule)
        known = load_arrays(cache)
        if known is not None:
            return known["figures"]
        parts: list[list[Sequence[int]]] = []
        skipped = 0

        def part(units: Integers) -> tuple[list[Sequence[int]], int]:
            documents = DocumentReader(self._index, self._units, self._config)
            try:
                found = [measure(documents, unit) for unit in units.tolist()]
            finally:
                documents.close()
            return found, len(documents.skipped)

        began = shown = time.monotonic()
        chunks = np.array_split(self._chosen, min(_CHUNKS, len(self._chosen)))
        threads = min(_THREADS, os.cpu_count() or 1)
        with ThreadPoolExecutor(threads, thread_name_prefix="count") as pool:
            try:
                for number, (found, left_out) in enumerate(pool.map(part, chunks), 1):
                    parts.append(found)
                    skipped += left_out
                    now = time.monotonic()
                    if now - began > _QUIET_S and now - shown > _LINE_EVERY_S:
                        shown = now
                        done = number * 100 // len(chunks)
                        log.warning("Counting the tokens of %s, once: %d %%", root, done)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        rows = [figures for found in parts for figures in found]
        result = np.array(rows, dtype=np.int64).reshape(-1, width)
        if not skipped:  # what could not be read may be readable at the next start
            save_arrays(cache, {"figures": result})
        return result
