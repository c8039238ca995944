"""Turns text into what a run reads: a folder of parquet files, or token files.

    python prepare.py python-stdlib data/python-stdlib
    python prepare.py SOURCE OUT                           # parquet, for dataset.parquet_dir
    python prepare.py SOURCE data/NAME --tokenizer gpt2    # train.bin, val.bin and meta.json
    python prepare.py SOURCE train.ids --tokenizer gpt2    # all tokens in one file
    python prepare.py train-tokenizer SOURCE OUT.json --vocab-size 10000

SOURCE is a text file of any ending, .jsonl or .parquet, also compressed (.gz, .zst, .bz2): a file,
a folder of them, an address (https://, s3://, gs://, hf://; a folder of a web server ends in /) or
(--urls) a list of addresses. If a folder holds .txt, .jsonl or .parquet files, only those are
taken. For parquet, a text file longer than 16 KiB is cut at line ends, so that it can be shuffled
and split; a .jsonl line or a parquet row is one document. If a download or the writing of token
files is interrupted, the same command continues.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

import numpy as np

from config import DataError, TokenizerConfig
from data.preparation import stdlib_corpus
from data.preparation.convert import Job, Progress, convert
from data.preparation.download import without_query
from data.preparation.errors import naming_own_options, writing
from data.preparation.next_command import train_on_parquet, train_on_tokens
from data.preparation.parquet_writer import Document, write_folder
from data.preparation.progress import ProgressLine
from data.preparation.raw_text import file_size, find_text_column, read_documents
from data.preparation.source_files import is_corpus, local_files
from data.preparation.token_writer import FORMATS, Counts, TokenOutput
from data.sources.parquet.text_column import AUTO, USUAL_NAMES
from data.sources.tokens.meta import read_meta_file, write_json
from data.tokenizers.base import Tokenizer
from data.tokenizers.bpe import train_bpe
from data.tokenizers.build import build_tokenizer
from settings.addresses import is_remote
from settings.cli import exit_on_signals, number_type, run_command
from settings.formatting import format_plural

_N_PARQUET_FILES = 8
_MIN_FILE_BYTES, _MAX_FILE_BYTES = 1 << 20, 256 << 20
_SAMPLE_CHARACTERS = 1 << 20
_MIN_VOCAB_SIZE = 257  # 256 bytes and the separator
_SOURCE = (
    "python-stdlib (the library of this Python), a text, .jsonl or .parquet file, a folder of such "
    "files, or the address of one: https://, s3://, gs://, hf://datasets/OWNER/NAME"
)
_COLUMN = (
    "key or column of the text in .jsonl and .parquet (default: auto, the only one of strings, or "
    f"one named {', '.join(USUAL_NAMES)})"
)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["train-tokenizer"]:
        args = read_tokenizer_arguments(arguments[1:])
        return run_command(lambda: train_tokenizer(args))
    args = read_arguments(arguments)
    return run_command(
        lambda: write_parquet(args) if args.tokenizer is None else write_tokens(args)
    )


def read_arguments(argv: list[str]) -> argparse.Namespace:
    """Returns the arguments of a conversion; exits with code 2 and one line if they are wrong."""
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
    add("--text-column", default=AUTO, metavar="NAME", help=_COLUMN)
    add("--urls", action="store_true", help="SOURCE is a text file with one address per line")
    add("--overwrite", action="store_true", help="replace what OUT holds of an earlier conversion")
    tokens = parser.add_argument_group("token files")
    add = tokens.add_argument
    names = "bytes, char, gpt2, a tokenizer.json, a Hub name, or a meta.json (its tokenizer)"
    add("--tokenizer", metavar="NAME", help=f"write tokens: {names}")
    add("--format", choices=[e[1:] for e in FORMATS], help="of train and val (default: bin)")
    fraction = "share of val (default: 0.1; 0: none). One .txt file, or characters: its end; else "
    share = number_type(float, 0, below=1)
    add("--val-fraction", type=share, metavar="F", help=fraction + "documents by their hash")
    dtype = "default auto: uint16 where the ids fit, as nanoGPT writes, else uint32"
    add("--dtype", choices=["auto", "uint8", "uint16", "uint32"], help=dtype)
    count = number_type(int, 1)
    add("--workers", type=count, metavar="N", help="processes (default: one per core)")
    args = parser.parse_args(argv)
    _check_arguments(parser, args)
    return args


def _check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exits with a message if options contradict each other or OUT must not be written."""
    is_file = args.out.suffix in FORMATS
    if args.tokenizer is None:
        for option in ("format", "val_fraction", "dtype", "workers"):
            if getattr(args, option) is not None:
                name = option.replace("_", "-")
                parser.error(f"--{name} is for token files: add --tokenizer NAME")
        if is_file:
            parser.error(
                f"OUT: '{args.out}' is a token file: add --tokenizer NAME (bytes, char, gpt2)"
            )
        _check_parquet_folder(parser, args.out, args.overwrite)
        return
    if is_file and (args.format or args.val_fraction is not None):
        parser.error(
            f"OUT: '{args.out}' is one file, so there is no --format and no --val-fraction"
        )
    if args.out.exists() and args.out.is_dir() == is_file:
        kind = "a folder; name a file" if is_file else "a file; name a folder"
        parser.error(f"OUT: '{args.out}' is {kind}")
    found = _token_output(args).existing()
    if found and not args.overwrite:
        parser.error(f"OUT: '{found[0]}' exists; name another place or add --overwrite")


def _check_parquet_folder(parser: argparse.ArgumentParser, out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        parser.error(f"OUT: '{out}' is a file; name a folder")
    names = sorted(path.name for path in out.iterdir())
    if names and not overwrite:
        parser.error(f"OUT: '{out}' is not empty; name another folder or add --overwrite")
    for name in names:
        if not name.endswith(".parquet"):
            parser.error(
                f"OUT: '{out}' holds '{name}', which --overwrite would delete; empty it first"
            )


def read_tokenizer_arguments(argv: list[str]) -> argparse.Namespace:
    """Returns the arguments of train-tokenizer; exits with code 2 if they are wrong."""
    parser = argparse.ArgumentParser(
        prog="prepare.py train-tokenizer",
        description="Make a vocabulary of byte pairs from a text; every text can be encoded in it.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help=_SOURCE)
    add("out", metavar="OUT.json", type=Path, help="the tokenizer.json to write")
    size = "tokens (default: 10000), of which 256 are the bytes and one ends documents"
    count = number_type(int, 1)
    add("--vocab-size", type=count, default=10_000, metavar="N", help=size)
    add("--text-column", default=AUTO, metavar="NAME", help=_COLUMN)
    add("--overwrite", action="store_true", help="replace OUT.json")
    args = parser.parse_args(argv)
    if args.out.suffix != ".json":
        parser.error(f"OUT.json: '{args.out}' does not end in .json")
    if args.out.exists() and not args.overwrite:
        parser.error(f"OUT.json: '{args.out}' exists; name another file or add --overwrite")
    if args.vocab_size < _MIN_VOCAB_SIZE:
        parser.error(f"--vocab-size: must be >= {_MIN_VOCAB_SIZE}, got {args.vocab_size}")
    return args


@naming_own_options()
def write_parquet(args: argparse.Namespace) -> None:
    """Writes a folder of parquet files."""
    if is_corpus(args.source):
        written = stdlib_corpus.build(args.out, args.overwrite)
    else:
        folder = _hidden_beside(args.out)
        files = local_files(args.source, args.urls, folder)
        size = sum(map(file_size, files))
        file_bytes = min(max(size // _N_PARQUET_FILES, _MIN_FILE_BYTES), _MAX_FILE_BYTES)
        documents = _named_documents(files, _text_column(args, files))
        written = write_folder(documents, args.out, file_bytes, args.overwrite)
        _print_kept(folder)
    print(
        f"Wrote {format_plural(written.documents, 'document')}, {written.bytes / 1e6:.1f} MB of "
        f"text, in {format_plural(written.files, 'file')} to {args.out} ({written.seconds:.1f} s)\n"
        f"Next: {train_on_parquet(args.out, written.bytes)}"
    )


def _text_column(args: argparse.Namespace, files: Sequence[Path]) -> str:
    """Returns the key or column of the text; says which one was found for `auto`."""
    column: str = args.text_column
    found = find_text_column(files) if column == AUTO else None
    if found is not None:
        print(f"Text column: {found}")
    return found or column


def _named_documents(files: Sequence[Path], column: str) -> Iterator[Document]:
    for path in files:
        name = os.fsencode(path).decode("utf-8", "replace")
        yield from ((text, name) for text in read_documents(path, column))


def _hidden_beside(out: Path) -> Path:
    """Returns the hidden folder next to OUT that downloads are kept in."""
    return out.with_name(f".{out.name}.download")


def _print_kept(folder: Path) -> None:
    if folder.exists():
        print(f"The source is kept in {folder}; delete it if you no longer need it")


@naming_own_options()
def write_tokens(args: argparse.Namespace) -> None:
    """Writes token files and their description."""
    start = time.monotonic()
    output = _token_output(args)
    folder = _hidden_beside(args.out) if output.is_single else args.out / ".download"
    tokenizer = None if args.tokenizer == "char" else _load_tokenizer(args.tokenizer)
    try:
        files = local_files(args.source, args.urls, folder)
        job = Job(
            files=files,
            output=output,
            column=_text_column(args, files),
            tokenizer=tokenizer,
            dtype=None if args.dtype in (None, "auto") else np.dtype(args.dtype),
            val_fraction=_val_fraction(args),
            workers=args.workers or _available_cores(),
            restart=args.overwrite,
        )
        counts = _show(convert(job))
    except (SystemExit, KeyboardInterrupt):
        kept = [path for path in (output.workspace, folder) if path.exists()]
        if kept:
            print(f"\nStopped. The same command continues from {kept[0]}", file=sys.stderr)
        raise
    _report(output, counts, time.monotonic() - start)
    _print_kept(folder)
    print(f"Next: {train_on_tokens(output, counts.train + counts.val)}")


def _val_fraction(args: argparse.Namespace) -> float:
    return 0.1 if args.val_fraction is None else args.val_fraction


def _token_output(args: argparse.Namespace) -> TokenOutput:
    is_single = args.out.suffix in FORMATS
    has_val = not is_single and _val_fraction(args) > 0
    return TokenOutput(args.out, f".{args.format or 'bin'}", has_val)


def _load_tokenizer(name: str) -> Tokenizer:
    """Returns the tokenizer of this name, or the one that a description of token files holds."""
    if not name.endswith(("meta.json", "meta.pkl")):
        return build_tokenizer(TokenizerConfig(name=name))
    tokenizer = read_meta_file(Path(name)).tokenizer
    if tokenizer is None:
        raise DataError(f"{name}: names no tokenizer")
    return tokenizer


def _available_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _show(steps: Generator[Progress, None, None]) -> Counts:
    """Runs a conversion with a progress line for each of its stages; returns the final counts."""
    stage, line = "", ProgressLine("")
    counts = Counts()
    with contextlib.closing(steps):
        for step in steps:
            counts = step.counts
            if step.stage != stage:
                line.end()
                stage, line = step.stage, ProgressLine(step.stage, step.resumed_bytes)
            line.show(counts.bytes, step.total_bytes, counts.train + counts.val)
    return counts


def _report(output: TokenOutput, counts: Counts, seconds: float) -> None:
    files = [f"{path} ({counts.of(role):,} tokens)" for role, path in output.targets.items()]
    meta = read_meta_file(output.meta)
    assert meta.tokenizer is not None
    documents = format_plural(counts.documents, "document")
    skipped = f" ({counts.empty:,} empty ones skipped)" if counts.empty else ""
    print(
        f"Wrote {' and '.join(files)} and {output.meta} ({seconds:.1f} s)\n"
        f"{documents}{skipped}, tokenizer {meta.tokenizer.name}, "
        f"vocabulary {meta.vocab_size:,}, {meta.dtype}"
    )


@naming_own_options()
def train_tokenizer(args: argparse.Namespace) -> None:
    """Trains a byte-level BPE vocabulary and writes its tokenizer.json."""
    start = time.monotonic()
    files = local_files(args.source, False, _hidden_beside(args.out))
    sample: list[str] = []
    texts = _sampled(files, _text_column(args, files), sample)
    tokenizer = train_bpe(str(args.out), texts, args.vocab_size)
    if not sample:
        raise DataError("no text found in the source: nothing was written")
    with writing(args.out):
        args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, json.loads(tokenizer.to_dict()["json"]))
    size = sum(len(text.encode()) for text in sample)
    n_tokens = sum(len(tokenizer.encode(text)) for text in sample)
    source = without_query(args.source) if is_remote(args.source) else args.source
    command = ["python", "prepare.py", source, "data/NAME", "--tokenizer", str(args.out)]
    is_short = tokenizer.vocab_size < args.vocab_size
    print(
        f"Wrote {args.out} ({time.monotonic() - start:.1f} s): {tokenizer.vocab_size:,} tokens"
        f"{' (the text has no more pairs that occur twice)' if is_short else ''}; "
        f"{size / n_tokens:.2f} bytes per token on {size / 1e6:.1f} MB of the text\n"
        f"Next: {shlex.join(command)}"
    )


def _sampled(files: Sequence[Path], column: str, sample: list[str]) -> Iterator[str]:
    """Yields all documents; the first ones are also appended to `sample`."""
    size = 0
    for path in files:
        for text in read_documents(path, column):
            if size < _SAMPLE_CHARACTERS:
                sample.append(text)
                size += len(text)
            yield text


if __name__ == "__main__":
    exit_on_signals()
    sys.exit(main())
