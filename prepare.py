"""Turn text into what a run reads: a folder of parquet files, or token files.

    python prepare.py python-stdlib data/python-stdlib
    python prepare.py SOURCE OUT                           # parquet, for dataset.parquet_dir
    python prepare.py SOURCE data/NAME --tokenizer gpt2    # train.bin, val.bin and meta.json
    python prepare.py SOURCE train.ids --tokenizer gpt2    # all tokens in one file
    python prepare.py train-tokenizer SOURCE OUT.json --vocab-size 10000

SOURCE is a text file of any ending, .jsonl or .parquet: a file, a folder of them, a URL or (--urls)
a list of URLs. Of a folder that holds .txt, .jsonl or .parquet only those are taken. For parquet
each text file is cut at line ends where it is longer than 16 KiB, so that it can be shuffled and
split; a .jsonl line or a parquet row is one document. Where the making of token files is stopped,
the same command goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

import numpy as np

from config import DataError, TokenizerConfig, UserError, WriteError
from data.preparation import corpus
from data.preparation.convert import FORMATS, Job, Progress, convert, existing
from data.preparation.download import download, is_url, local_paths, read_url_list
from data.preparation.raw_text import ENDINGS, check_readable, is_text, not_text_at, unreadable
from data.preparation.raw_text import documents as documents_of
from data.preparation.token_writer import Counts
from data.sources.meta import read_meta_file, write_json
from data.tokenizers.base import Tokenizer
from data.tokenizers.bpe import train_bpe
from data.tokenizers.build import build_tokenizer
from settings.formatting import format_plural

_FILES = 8
_SMALLEST_FILE_BYTES, _LARGEST_FILE_BYTES = 1 << 20, 256 << 20
_LINE_EVERY_S, _REDRAW_EVERY_S = 5.0, 0.2  # plain lines, and the one on a terminal
_SAMPLE_CHARACTERS = 1 << 20
_SMALL_TOKENS, _MIDDLE_TOKENS = 50_000_000, 1_000_000_000  # for which a recipe is right
_SMALLEST_BPE = 257  # the bytes and the separator
_SOURCE = (
    "python-stdlib (the library of this Python), a text, .jsonl or .parquet file, a folder of such "
    "files, or the URL of one"
)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    parser, run = _parser(), _run
    if arguments[:1] == ["train-tokenizer"]:
        parser, run, arguments = _tokenizer_parser(), _train_tokenizer, arguments[1:]
    args = parser.parse_args(arguments)
    try:
        problem = run(args)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if problem:
        parser.error(problem)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prepare.py",
        description="Turn text into a folder of parquet files for dataset.parquet_dir, or with "
        "--tokenizer into token files.",
        epilog="python prepare.py train-tokenizer --help: make a vocabulary of your own.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help=_SOURCE)
    out = "the folder to write; with --tokenizer also one file ending in " + ", ".join(FORMATS)
    add("out", metavar="OUT", type=Path, help=out)
    column = "key or column of the text in .jsonl and .parquet (default: text)"
    add("--text-column", default="text", metavar="NAME", help=column)
    add("--urls", action="store_true", help="SOURCE is a text file with one URL per line")
    add("--overwrite", action="store_true", help="replace what OUT holds of an earlier conversion")
    tokens = parser.add_argument_group("token files")
    add = tokens.add_argument
    names = "bytes, char, gpt2, a tokenizer.json, a Hub name, or a meta.json (its tokenizer)"
    add("--tokenizer", metavar="NAME", help=f"write tokens: {names}")
    add("--format", choices=[e[1:] for e in FORMATS], help="of train and val (default: bin)")
    fraction = "share of val (default: 0.1; 0: none). One .txt file, or characters: its end; else "
    add("--val-fraction", type=_fraction, metavar="F", help=fraction + "documents by their hash")
    dtype = "default auto: uint16 where the ids fit, as nanoGPT writes, else uint32"
    add("--dtype", choices=["auto", "uint8", "uint16", "uint32"], help=dtype)
    add("--workers", type=_count, metavar="N", help="processes (default: one per core)")
    return parser


def _tokenizer_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prepare.py train-tokenizer",
        description="Make a vocabulary of byte pairs from a text; every text can be encoded in it.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help=_SOURCE)
    add("out", metavar="OUT.json", type=Path, help="the tokenizer.json to write")
    size = "tokens (default: 10000), of which 256 are the bytes and one ends documents"
    add("--vocab-size", type=_count, default=10_000, metavar="N", help=size)
    add("--text-column", default="text", metavar="NAME", help="key or column of the text")
    add("--overwrite", action="store_true", help="replace OUT.json")
    return parser


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be >= 0 and < 1, got {text}")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be >= 1, got {text}")
    return value


_fraction.__name__, _count.__name__ = "number", "whole number"  # argparse names them in errors


def _run(args: argparse.Namespace) -> str | None:
    """Write parquet or tokens; returns what is wrong with the command line, if something is."""
    given = [
        o for o in ("format", "val_fraction", "dtype", "workers") if getattr(args, o) is not None
    ]
    if args.tokenizer is None:
        if given:
            return f"--{given[0].replace('_', '-')} is for token files: add --tokenizer NAME"
        if args.out.suffix in FORMATS:
            return f"OUT: '{args.out}' is a token file: add --tokenizer NAME (bytes, char, gpt2)"
        problem = _refuse_out(args.out, args.overwrite)
        if problem is None:
            _write_parquet(args)
        return problem
    if args.out.suffix in FORMATS and (args.format or args.val_fraction is not None):
        return f"OUT: '{args.out}' is one file, so there is no --format and no --val-fraction"
    return _write_tokens(args)


def _refuse_out(out: Path, overwrite: bool) -> str | None:
    """Why a parquet folder may not be written, if so."""
    if not out.exists():
        return None
    if not out.is_dir():
        return f"OUT: '{out}' is a file; name a folder"
    names = sorted(path.name for path in out.iterdir())
    if names and not overwrite:
        return f"OUT: '{out}' is not empty; name another folder or add --overwrite"
    foreign = [name for name in names if not name.endswith(".parquet")]
    if foreign:
        return f"OUT: '{out}' holds '{foreign[0]}', which --overwrite would delete; empty it first"
    return None


def _write_parquet(args: argparse.Namespace) -> None:
    if args.source == corpus.NAME and not os.path.exists(args.source):
        written = corpus.build(args.out, args.overwrite)
    else:
        files = _files(args, _beside(args.out, "download"))
        try:
            size = sum(path.stat().st_size for path in files)
        except OSError as error:
            raise unreadable(error.filename, error) from None
        file_bytes = min(max(size // _FILES, _SMALLEST_FILE_BYTES), _LARGEST_FILE_BYTES)
        texts = _named_documents(files, args.text_column)
        written = corpus.write_folder(texts, args.out, file_bytes, args.overwrite)
    print(
        f"Wrote {written.documents} documents, {written.bytes / 1e6:.1f} MB of text, in "
        f"{written.files} files to {args.out} ({written.seconds:.1f} s)\n"
        f"Next: python train.py {_recipe(written.bytes)}dataset.parquet_dir={args.out}"
    )


def _beside(out: Path, kind: str) -> Path:
    """A hidden folder next to OUT, for what OUT is made of."""
    return out.with_name(f".{out.name}.{kind}")


def _files(args: argparse.Namespace, folder: Path) -> list[Path]:
    """The text files; those of URLs are downloaded to a folder first, and stay there."""
    listed = getattr(args, "urls", False)
    if not listed and not is_url(args.source):
        return _source_files(Path(args.source))
    urls = read_url_list(Path(args.source)) if listed else [args.source]
    paths = local_paths(urls, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"{folder}: cannot be written: {error.strerror}") from None
    for number, (url, path) in enumerate(zip(urls, paths, strict=True), 1):
        line: _Line | None = None
        for there, total in download(url, path):
            line = line or _Line(f"download {number} of {len(urls)}", there)
            line.show(there, total, 0)
        if line:
            line.end()
        check_readable(path)
    return paths


def _source_files(source: Path) -> list[Path]:
    """The text files, in bytewise order of their paths."""
    if source.is_file():
        check_readable(source)
        return [source]
    if not source.is_dir():
        raise DataError(f"SOURCE '{source}': not found (working directory: {os.getcwd()})")
    found = [path for path in source.rglob("*") if _is_visible(path, source) and path.is_file()]
    files = [path for path in found if path.suffix.lower() in ENDINGS]
    files = files or [path for path in found if is_text(path) and not_text_at(path) is None]
    left_out = Counter(path.suffix for path in set(found).difference(files))
    kinds = ", ".join(f"{count} *{ending}" for ending, count in left_out.most_common(5))
    if not files:
        raise DataError(
            f"SOURCE '{source}' holds no text (found {kinds or 'nothing'}). Name a file with text, "
            ".jsonl or .parquet, or a folder of such files."
        )
    if kinds:
        print(f"Left out of {source}: {kinds}", file=sys.stderr)
    return sorted(files, key=os.fsencode)


def _is_visible(path: Path, source: Path) -> bool:
    return not any(part.startswith(".") for part in path.relative_to(source).parts)


def _named_documents(files: Sequence[Path], column: str) -> Iterator[corpus.Document]:
    for path in files:
        name = os.fsencode(path).decode("utf-8", "replace")
        yield from ((text, name) for text in documents_of(path, column))


def _write_tokens(args: argparse.Namespace) -> str | None:
    is_single = args.out.suffix in FORMATS
    job = Job(
        files=(),
        out=args.out,
        column=args.text_column,
        tokenizer=None if args.tokenizer == "char" else _tokenizer(args.tokenizer),
        ending=f".{args.format or 'bin'}",
        dtype=None if args.dtype in (None, "auto") else np.dtype(args.dtype),
        val_fraction=0.1 if args.val_fraction is None else args.val_fraction,
        workers=args.workers or _cores(),
        restart=args.overwrite,
    )
    if args.out.exists() and args.out.is_dir() == is_single:
        kind = "a folder; name a file" if is_single else "a file; name a folder"
        return f"OUT: '{args.out}' is {kind}"
    found = existing(job)
    if found and not args.overwrite:
        return f"OUT: '{found[0]}' exists; name another place or add --overwrite"
    began = time.monotonic()
    folder = _beside(args.out, "download") if is_single else args.out / ".download"
    try:
        job = replace(job, files=_token_sources(args, folder))
        counts = _show(convert(job))
    except (SystemExit, KeyboardInterrupt):
        kept = [path for path in (job.workspace, folder) if path.exists()]
        if kept:
            print(f"\nStopped. The same command goes on from {kept[0]}", file=sys.stderr)
        raise
    _say_tokens(job, counts, time.monotonic() - began)
    if folder.exists():
        print(f"What it was made from is kept in {folder}; delete it if you need it no more")
    print(f"Next: python train.py {_next_arguments(job, counts.train + counts.val)}")
    return None


def _tokenizer(name: str) -> Tokenizer:
    """By its name, or that of token files made before."""
    if not name.endswith(("meta.json", "meta.pkl")):
        return build_tokenizer(TokenizerConfig(name=name))
    tokenizer = read_meta_file(Path(name)).tokenizer
    if tokenizer is None:
        raise DataError(f"{name}: names no tokenizer")
    return tokenizer


def _cores() -> int:
    """The cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _token_sources(args: argparse.Namespace, folder: Path) -> list[Path]:
    if args.source != corpus.NAME or os.path.exists(args.source):
        return _files(args, folder)
    if not (folder / corpus.NAME).exists():
        corpus.build(folder / corpus.NAME)
    return _source_files(folder / corpus.NAME)


def _show(steps: Generator[Progress, None, None]) -> Counts:
    """Follow a conversion to its end on standard error; returns what was written."""
    lines: dict[str, _Line] = {}
    counts = Counts()
    with contextlib.closing(steps):
        for step in steps:
            counts = step.counts
            if step.stage not in lines:
                for line in lines.values():
                    line.end()
                lines[step.stage] = _Line(step.stage, step.kept)
            lines[step.stage].show(counts.bytes, step.total, counts.train + counts.val)
    return counts


class _Line:
    """One progress line on a terminal, a plain line every few seconds elsewhere."""

    def __init__(self, stage: str, kept: int = 0) -> None:
        self._stage, self._kept = stage, kept
        self._began = self._shown = time.monotonic()
        self._is_terminal = sys.stderr.isatty()
        self._drawn = False

    def show(self, done: int, total: int, tokens: int) -> None:
        """Bytes done, of how many (0: unknown), and the tokens they became (0: left out)."""
        now = time.monotonic()
        if now - self._shown < (_REDRAW_EVERY_S if self._is_terminal else _LINE_EVERY_S):
            return
        self._shown = now
        rate = (done - self._kept) / max(now - self._began, 1e-9)
        parts = [self._stage, f"{done / 1e6:.1f} MB", f"{rate / 1e6:.1f} MB/s"]
        if total:
            parts[1] = f"{100 * done / total:.0f} % of {total / 1e6:.1f} MB"
            minutes, seconds = divmod(int((total - done) / max(rate, 1)), 60)
            parts.append(f"ETA {minutes}m{seconds:02d}s")
        if tokens:
            parts.insert(2, f"{tokens:,} tokens")
        self._drawn = self._is_terminal
        frame = "\r{}\033[K" if self._is_terminal else "{}\n"
        print(frame.format(" | ".join(parts)), end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Leave the line."""
        if self._drawn:
            print(file=sys.stderr)


def _say_tokens(job: Job, counts: Counts, seconds: float) -> None:
    numbers = {"train": counts.train, "val": counts.val}
    files = [f"{path} ({numbers[name]:,} tokens)" for name, path in job.targets.items()]
    meta = read_meta_file(job.meta)
    assert meta.tokenizer is not None
    documents = format_plural(counts.documents, "document")
    left_out = f" ({counts.empty:,} empty ones left out)" if counts.empty else ""
    print(
        f"Wrote {' and '.join(files)} and {job.meta} ({seconds:.1f} s)\n"
        f"{documents}{left_out}, tokenizer {meta.tokenizer.name}, "
        f"vocabulary {meta.vocab_size:,}, {meta.dtype}"
    )


def _recipe(text_bytes: int) -> str:
    """A config that a text of this size is enough for: without one, a run of hours on a CPU."""
    return "configs/quickstart.yaml " if text_bytes < _SMALL_TOKENS else ""


def _next_arguments(job: Job, tokens: int) -> str:
    """A run that so many tokens are enough for; without a config file it is GPT-2's, of days."""
    if tokens < _SMALL_TOKENS:
        return f"configs/quickstart.yaml {_next_overrides(job)}"
    if tokens < _MIDDLE_TOKENS:
        no_val = "" if "val_data_path" in _next_paths(job) else " val_data_path=null"
        return f"configs/cs336-tinystories.yaml vocab_size=null {_next_paths(job)}{no_val}"
    return _next_overrides(job)


def _next_overrides(job: Job) -> str:
    """How a run names these files."""
    if len(job.targets) == 2 and job.ending == ".bin" and job.out.parent == Path("data"):
        return f"dataset={job.out.name}"
    return _next_paths(job)


def _next_paths(job: Job) -> str:
    targets = list(job.targets.values())
    if job.is_single:
        train = job.out.with_name(f"train{job.out.suffix}")
        is_val = job.out.stem in ("val", "valid", "validation", "test") and train.exists()
        targets = [train, job.out] if is_val else targets
    names = ("train_data_path", "val_data_path")
    return " ".join(f"{name}={path}" for name, path in zip(names, targets, strict=False))


def _train_tokenizer(args: argparse.Namespace) -> str | None:
    if args.out.suffix != ".json":
        return f"OUT.json: '{args.out}' does not end in .json"
    if args.out.exists() and not args.overwrite:
        return f"OUT.json: '{args.out}' exists; name another file or add --overwrite"
    if args.vocab_size < _SMALLEST_BPE:
        return f"--vocab-size: must be >= {_SMALLEST_BPE}, got {args.vocab_size}"
    began = time.monotonic()
    sample: list[str] = []
    texts = _sampled(_files(args, _beside(args.out, "download")), args.text_column, sample)
    tokenizer = train_bpe(str(args.out), texts, args.vocab_size)
    if not sample:
        raise DataError("no text found in the source: nothing was written")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, json.loads(tokenizer.to_dict()["json"]))
    size = sum(len(text.encode()) for text in sample)
    count = sum(len(tokenizer.encode(text)) for text in sample)
    few = " (the text has no more pairs that occur twice)"
    print(
        f"Wrote {args.out} ({time.monotonic() - began:.1f} s): {tokenizer.vocab_size:,} tokens"
        f"{few if tokenizer.vocab_size < args.vocab_size else ''}; "
        f"{size / count:.2f} bytes per token on {size / 1e6:.1f} MB of the text\n"
        f"Next: python prepare.py {args.source} data/NAME --tokenizer {args.out}"
    )
    return None


def _sampled(files: Sequence[Path], column: str, sample: list[str]) -> Iterator[str]:
    """All documents; the first of them are also kept in `sample`."""
    size = 0
    for path in files:
        for text in documents_of(path, column):
            if size < _SAMPLE_CHARACTERS:
                sample.append(text)
                size += len(text)
            yield text


def _stop(number: int, frame: FrameType | None) -> None:
    """Leaves through the blocks that delete what is half done."""
    del frame
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)
    if hasattr(signal, "SIGPIPE"):  # ends quietly where `| head` has read enough
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
