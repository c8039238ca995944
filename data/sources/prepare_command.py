"""Text that is not parquet yet: which files hold some, and the command that makes parquet of it."""

from __future__ import annotations

import os
import re
import shlex
from itertools import count
from pathlib import PurePosixPath

from data.remote.access import has_magic
from data.sources.parquet.text_column import AUTO
from data.sources.tokens.file import ENDINGS

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
"""Arrow's names of them, by the ending that follows a file's own: a.jsonl.gz."""
TEXT_ENDINGS = (
    *(".txt", ".jsonl", ".ndjson", ".parquet"),
    # Settings are .json, compressed ones hardly.
    *(f"{kind}{c}" for kind in (".txt", ".jsonl", ".ndjson", ".json") for c in COMPRESSIONS),
)
"""Files with these, in small letters, are taken from a folder that holds others too."""


def uncompressed_name(name: str) -> str:
    """Returns a file's name without the ending of a compression."""
    stem, ending = os.path.splitext(name)
    return stem if ending.lower() in COMPRESSIONS else name


def prepare_remedy(source: str, column: str = AUTO, found: str = "") -> str:
    """Returns what to do with a path or URL that holds no parquet: the command that prepares text,
    quoted for a shell, and the option to set then; of token files, their option.

    Args:
        column: dataset.text_column.
        found: what a folder holds, as `Listing.others` tells it.
    """
    kinds = [ending for ending in ENDINGS if f"*{ending}" in found]
    if source.endswith(ENDINGS) or (kinds and not any(f"*{e}" in found for e in TEXT_ENDINGS)):
        path = f"{source.rstrip('/')}/train{kinds[0]}" if kinds else source
        return f"For token files set dataset.train_data_path={shlex.quote(path)}"
    is_folder = not (has_magic(source) or source.lower().endswith(TEXT_ENDINGS))
    if source.startswith(("http://", "https://")) and is_folder:
        # Without the slash prepare.py would take the page of the folder for the text.
        source = f"{source.rstrip('/')}/"
    name = uncompressed_name(PurePosixPath(os.path.abspath(source)).name)
    stem = re.sub(r"[^\w.-]+", "-", os.path.splitext(name)[0]).strip("-.") or "text"
    # prepare.py writes into no folder that is there already.
    numbered = (f"data/{stem}-parquet{f'-{n}' if n else ''}" for n in count())
    out = next(path for path in numbered if not os.path.exists(path))
    named = [] if column == AUTO else ["--text-column", column]
    then = f"dataset.parquet_dir={out}" + (" dataset.text_column=auto" if named else "")
    command = shlex.join(["python", "prepare.py", source, out, *named])
    return f"Prepare it, then set {then}: {command}"
