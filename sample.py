"""Writes text with a trained model.

    python sample.py checkpoints/run_20251108_143022 --prompt "def " --num-samples 3

RUN_OR_CHECKPOINT is a checkpoint, a run directory (its last checkpoint, or its best one with
training.always_save_checkpoint: false), a folder of run directories (its newest run), an export
(export.py) or weights of another program: nanoGPT's ckpt.pt, a state dict of BDH or of CS336. Text
streams to the terminal (of several samples, drawn together, the first); equal seeds write equal
text. A model of single documents stops at the end of one. How fast it was goes to standard error.

nanoGPT's commands work too: --out_dir=out, a preset (config/x.py), --start=FILE:prompt.txt,
--init_from=gpt2-xl (published weights, or a folder that holds such).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from types import FrameType
from typing import TYPE_CHECKING


def _leave(_signal: int, _frame: FrameType | None) -> None:
    os.write(2, b"\n")
    os._exit(130)


if __name__ == "__main__":  # there is nothing to save: Ctrl-C works in the middle of an import too
    signal.signal(signal.SIGINT, _leave)

from config import (
    GPT2_NAMES,
    CheckpointError,
    Config,
    ConfigError,
    DataError,
    UserError,
    WriteError,
    device_option,
)
from settings.cli import LARGEST, number_type, run_command
from settings.foreign import sample_flags as nanogpt

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from data.tokenizers.base import StreamDecoder, Tokenizer
    from model.generate import RecordedDecoder
    from model.interface import LanguageModel

_MAX_BATCH = 8  # samples drawn at once, if their caches fit in _MAX_CACHE_BYTES
_MAX_CACHE_BYTES = 2**31
_CONTEXT = "tokens the model looks back on; 0: all (default: block_size, as in training)"
_GREEDY = 1e-6  # a lower temperature draws the likeliest token anyway, or overflows


def read_arguments(arguments: list[str]) -> argparse.Namespace:
    """Returns the command line; leaves with exit code 2 and one line when it is wrong.

    `path` is what to sample from; `published` says that it names weights as `init_from` does.
    """
    parser = argparse.ArgumentParser(
        prog="sample.py", description="Writes text with a trained model.", allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "path",
        metavar="RUN_OR_CHECKPOINT",
        nargs="?",
        help="checkpoint, run, folder of runs or export",
    )
    add("--prompt", metavar="TEXT", help="text to continue (default: a line break)")
    add("--num-samples", type=number_type(int, 1), metavar="N", help="default: 1")
    add("--max-new-tokens", type=number_type(int, 1), default=500, metavar="N", help="default: 500")
    add("--temperature", type=number_type(float, 0), default=0.8, metavar="T", help="0: greedy")
    add("--top-k", type=number_type(int, 1), metavar="K", help="draw from the K likeliest tokens")
    add(
        "--top-p",
        type=number_type(float, 0, 1),
        metavar="P",
        help="draw from this much probability",
    )
    add("--context", type=number_type(int, 0), metavar="N", help=_CONTEXT)
    add("--seed", type=number_type(int, 0), default=1337, metavar="S", help="default: 1337")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add = parser.add_argument_group(
        "nanoGPT's names",
        "Also a preset, config/x.py, and _ for - in all names. With any of these, --num-samples is "
        f"{nanogpt.NUM_SAMPLES} and --top-k {nanogpt.TOP_K} unless given.",
    ).add_argument
    add("--out-dir", metavar="PATH", help="as RUN_OR_CHECKPOINT")
    add("--init-from", metavar="NAME", help=f"resume, {', '.join(GPT2_NAMES)} or a folder")
    add("--start", metavar="TEXT", help="as --prompt; FILE:prompt.txt is the text of a file")
    add("--dtype", help="ignored")
    add("--compile", nargs="?", const="True", help="ignored")
    try:
        words, notes = nanogpt.expand_words(arguments)
    except ConfigError as error:
        parser.error(str(error))
    found = parser.parse_args(words)
    found.notes = notes
    _resolve_names(parser, found)
    return found


def _resolve_names(parser: argparse.ArgumentParser, found: argparse.Namespace) -> None:
    """Turns nanoGPT's names into ours, in place, with a note on each that has no meaning here."""
    ours = found.out_dir is found.init_from is found.start is None
    found.published = found.init_from not in (None, "resume")
    if found.init_from == "scratch":
        parser.error("--init-from=scratch: random weights write no text. Write resume or gpt2")
    if found.path is not None and (found.out_dir is not None or found.published):
        other = "--init-from" if found.published else "--out-dir"
        parser.error(f"{found.path} and {other}: two models to sample from. Keep one")
    if found.prompt is not None and found.start is not None:
        parser.error("--prompt and --start: two texts to continue. Keep one")
    if found.path is None and ours:
        parser.error("RUN_OR_CHECKPOINT is missing: a checkpoint, a run or a folder of runs")
    if found.published and found.out_dir is not None:
        found.notes.append(f"--out-dir is ignored beside --init-from={found.init_from}")
    if found.published:
        found.path = found.init_from
    elif found.path is None:
        found.path = nanogpt.OUT_DIR if found.out_dir is None else found.out_dir
    for name in ("dtype", "compile"):
        if getattr(found, name) is not None:
            found.notes.append(
                f"--{name} is ignored: text is computed in float32, on CUDA as in training"
            )
    found.prompt = found.start if found.prompt is None else found.prompt
    found.from_file = found.start is not None and found.start.startswith("FILE:")
    if not ours:
        for name, default in (("num_samples", nanogpt.NUM_SAMPLES), ("top_k", nanogpt.TOP_K)):
            if getattr(found, name) is None:
                setattr(found, name, default)
                flag = name.replace("_", "-")
                found.notes.append(f"--{flag} is {default}, as in nanoGPT's sample.py")
    found.num_samples = found.num_samples or 1


def write_samples(arguments: argparse.Namespace) -> None:
    """Loads the model and writes the samples; raises UserError."""
    import torch  # slow to import: a wrong command line is answered before

    from engine.hardware.device import prepare_device, resolve_device
    from model.generate import Sampling, generate

    device = resolve_device(device_option(arguments.device))
    prepare_device(device)
    given = arguments.prompt
    if arguments.from_file:
        given = _read_text(given.removeprefix("FILE:"))
    model, config, tokenizer = _load(arguments, device)
    prompt, ids = read_prompt(given, tokenizer)
    temperature = 0.0 if arguments.temperature < _GREEDY else arguments.temperature
    sampling = Sampling(temperature=temperature, top_k=arguments.top_k, top_p=arguments.top_p)
    separator = tokenizer.separator if config.model.mask == "causal_document" else None
    asked = config.training.block_size if arguments.context is None else arguments.context
    context = model.max_context if asked == 0 else min(asked, model.max_context or asked)
    cache_bytes = model.cache_bytes(len(ids) + arguments.max_new_tokens)
    batch_size = max(1, min(_MAX_BATCH, _MAX_CACHE_BYTES // cache_bytes))
    max_length = min(len(ids) + arguments.max_new_tokens, context or LARGEST)
    autocast: AbstractContextManager[None] = contextlib.nullcontext()
    if device.type == "cuda":
        from engine.precision.precision import round_linear_weights

        autocast = round_linear_weights(model, config.low_precision, device)
    began, count, drawn = time.monotonic(), arguments.num_samples, 0
    with autocast:
        for first in range(0, count, batch_size):
            numbers = range(first, min(first + batch_size, count))
            # Each sample has a generator of its own, so it does not depend on its batch.
            seeds = [(arguments.seed + number) % (LARGEST + 1) for number in numbers]
            generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
            decoder = None
            if device.type == "cuda":
                decoder = _recorded_decoder(model, len(numbers), max_length, device)
            start = torch.tensor([ids], device=device)
            tokens = generate(model, start, sampling, generators, context, decoder)
            samples = []
            for number in numbers:
                title = f"--- sample {number + 1} of {count}\n" if count > 1 else ""
                samples.append(Sample(tokenizer.stream_decoder(), [title, prompt]))
                # What follows may depend on the prompt's last token: a blank, half a character.
                samples[-1].decoder.decode(ids)
            steps = (step.tolist() for step in islice(tokens, arguments.max_new_tokens))
            drawn += write_batch(samples, steps, separator)
    seconds = time.monotonic() - began
    print(f"{drawn:,} tokens in {seconds:.1f} s: {drawn / seconds:.0f} tokens/s", file=sys.stderr)


def _recorded_decoder(
    model: LanguageModel, batch_size: int, max_length: int, device: torch.device
) -> RecordedDecoder:
    """Returns a decoder that launches all kernels of a token at once, as a CUDA graph, or one by
    one where they cannot be recorded.

    max_length: the most tokens of a sample.
    """
    from engine.hardware.cuda_graph import record_graph
    from model.generate import RecordedDecoder

    def record(step: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
        try:
            return record_graph(step, device)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            print(f"note: tokens are computed without a CUDA graph: {reason}", file=sys.stderr)
            return step

    return RecordedDecoder(model, batch_size, max_length, device, record)


def _load(
    arguments: argparse.Namespace, device: torch.device
) -> tuple[LanguageModel, Config, Tokenizer]:
    """Returns the model in eval mode, its config and tokenizer; raises CheckpointError that names
    the file."""
    from data.sources.tokens.meta import open_tokenizer
    from engine.checkpoint.trained_model import open_model

    path = arguments.path
    try:
        model, config, description = open_model(path, device)
    except CheckpointError as error:
        # Its remedies name the option of training, which is an option of this command too.
        message = str(error).replace("training.init_from", "--init-from")
        raise CheckpointError(message if arguments.published else str(error)) from error
    try:
        tokenizer = open_tokenizer(description)
    except DataError as error:
        raise CheckpointError(f"{path}: its tokenizer: {error}") from error
    size, vocab_size = tokenizer.vocab_size, config.model.vocab_size
    if not 0 < size <= (vocab_size or size):
        raise CheckpointError(f"{path}: its tokenizer has {size} tokens, its model {vocab_size}.")
    return model, config, tokenizer


def _read_text(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8"
        raise DataError(f"--start: {path}: cannot be read: {reason}") from None


def read_prompt(text: str | None, tokenizer: Tokenizer) -> tuple[str, list[int]]:
    """Returns the prompt as text and as at least one token; raises DataError."""
    try:
        ids = tokenizer.encode("\n" if text is None else text).tolist()
    except UserError:
        if text is not None:
            raise
        ids = []  # the vocabulary has no line break
    if not ids:
        ids = [tokenizer.separator or 0]
    return (tokenizer.decode(ids) if text is None else text), ids


@dataclass
class Sample:
    """A sample that is being drawn."""

    decoder: StreamDecoder
    pieces: list[str]
    ended: bool = False


def write_batch(samples: list[Sample], steps: Iterator[list[int]], separator: int | None) -> int:
    """Streams the first of the samples drawn together; the others follow when all are done.

    Args:
        samples: with their titles and prompts as the first pieces.
        steps: the next token of each sample, again and again.
        separator: the token before which a sample ends; None: none does.

    Returns how many tokens all samples have, prompts aside.
    """
    first, drawn = samples[0], 0
    _write("".join(first.pieces))
    for tokens in steps:
        for sample, token in zip(samples, tokens, strict=True):
            sample.ended = sample.ended or token == separator
            if not sample.ended:
                drawn += 1
                sample.pieces.append(sample.decoder.decode([token]))
                if sample is first:
                    _write(sample.pieces[-1])
        if all(sample.ended for sample in samples):
            break
    for sample in samples:
        rest = "" if sample is first else "".join(sample.pieces)
        _write(rest + sample.decoder.decode([], final=True) + "\n")
    return drawn


def _write(text: str) -> None:
    """Writes at once. Where the reader has left (`| head`), so does this program."""
    try:
        print(text, end="", flush=True)
    except OSError as error:
        # What is left in the buffer would raise again as Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise SystemExit(0) from None
        raise WriteError(f"standard output: cannot be written: {error.strerror}") from None


def main() -> int:
    """Runs the command; returns its exit code."""
    arguments = read_arguments(sys.argv[1:])
    for note in arguments.notes:
        print(f"note: {note}", file=sys.stderr)
    return run_command(lambda: write_samples(arguments))


if __name__ == "__main__":
    sys.exit(main())
