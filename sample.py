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
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from types import FrameType
from typing import TYPE_CHECKING, Any


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
from settings import sampling as nanogpt

if TYPE_CHECKING:
    from data.tokenizers.base import StreamDecoder, Tokenizer

_LARGEST = 2**63 - 1  # what a random generator takes
_TOGETHER = 8  # samples drawn at once, where their states fit in so many bytes
_STATE_BYTES = 2**31
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
    add("--num-samples", type=_number(int, 1), metavar="N", help="default: 1")
    add("--max-new-tokens", type=_number(int, 1), default=500, metavar="N", help="default: 500")
    add("--temperature", type=_number(float, 0), default=0.8, metavar="T", help="0: greedy")
    add("--top-k", type=_number(int, 1), metavar="K", help="draw from the K likeliest tokens")
    add("--top-p", type=_number(float, 0, 1), metavar="P", help="draw from this much probability")
    add("--context", type=_number(int, 0), metavar="N", help=_CONTEXT)
    add("--seed", type=_number(int, 0), default=1337, metavar="S", help="default: 1337")
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
            found.notes.append(f"--{name} is ignored: text is computed in float32, not compiled")
    found.prompt = found.start if found.prompt is None else found.prompt
    found.from_file = found.start is not None and found.start.startswith("FILE:")
    if not ours:
        for name, default in (("num_samples", nanogpt.NUM_SAMPLES), ("top_k", nanogpt.TOP_K)):
            if getattr(found, name) is None:
                setattr(found, name, default)
                flag = name.replace("_", "-")
                found.notes.append(f"--{flag} is {default}, as in nanoGPT's sample.py")
    found.num_samples = found.num_samples or 1


def _number(
    kind: type[int] | type[float], least: float, most: float = _LARGEST
) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not least <= value <= most:
            one_sided = most == _LARGEST and not value > most
            limit = f">= {least}" if one_sided else f"in [{least}, {most}]"
            raise argparse.ArgumentTypeError(f"must be {limit}, got {text}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"  # argparse names it in errors
    return parse


def write_samples(arguments: argparse.Namespace) -> None:
    """Loads the model and writes the samples; raises UserError."""
    import torch  # slow to import: a wrong command line is answered before

    from engine.checkpoint.save_load import open_model
    from engine.hardware.device import resolve_device
    from engine.hardware.memory import keep_freed_memory
    from model.generate import Sampling, generate

    device = resolve_device(device_option(arguments.device))
    if device.type == "cpu":
        keep_freed_memory()
    if arguments.from_file:
        arguments.prompt = _read_text(arguments.prompt.removeprefix("FILE:"))
    try:
        model, config, spec = open_model(arguments.path, device)
    except CheckpointError as error:  # its remedies name the option of training
        message = str(error).replace("training.init_from", "--init-from")
        raise CheckpointError(message if arguments.published else str(error)) from error
    tokenizer = open_tokenizer(arguments.path, spec, config)
    arguments.prompt, ids = read_prompt(arguments.prompt, tokenizer)
    prompt = torch.tensor([ids])
    temperature = 0.0 if arguments.temperature < _GREEDY else arguments.temperature
    sampling = Sampling(temperature=temperature, top_k=arguments.top_k, top_p=arguments.top_p)
    began, count, drawn = time.monotonic(), arguments.num_samples, 0
    end = tokenizer.separator if config.model.mask == "causal_document" else None
    asked = config.training.block_size if arguments.context is None else arguments.context
    context = model.max_context if asked == 0 else min(asked, model.max_context or asked)
    length = prompt.shape[1] + arguments.max_new_tokens
    together = max(1, min(_TOGETHER, _STATE_BYTES // model.cache_bytes(length)))
    for first in range(0, count, together):
        numbers = range(first, min(first + together, count))
        seeds = [(arguments.seed + number) % (_LARGEST + 1) for number in numbers]
        generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        tokens = generate(model, prompt.to(device), sampling, generators, context)
        decoders = [tokenizer.stream_decoder() for _ in numbers]
        for decoder in decoders:
            decoder.decode(ids)  # what follows may depend on it: a blank, half a character
        steps = (step.tolist() for step in islice(tokens, arguments.max_new_tokens))
        drawn += write_together(arguments, numbers, decoders, steps, end)
    seconds = time.monotonic() - began
    print(f"{drawn:,} tokens in {seconds:.1f} s: {drawn / seconds:.0f} tokens/s", file=sys.stderr)


def open_tokenizer(path: str, spec: dict[str, Any], config: Config) -> Tokenizer:
    """What makes text of the model's tokens; raises CheckpointError that names the file."""
    from data.sources import meta

    try:
        tokenizer = meta.open_tokenizer(spec)
    except DataError as error:
        raise CheckpointError(f"{path}: its tokenizer: {error}") from error
    size, rows = tokenizer.vocab_size, config.model.vocab_size
    if not 0 < size <= (rows or size):
        raise CheckpointError(f"{path}: its tokenizer has {size} tokens, and its model {rows}.")
    return tokenizer


def _read_text(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8"
        raise DataError(f"--start: {path}: cannot be read: {reason}") from None


def read_prompt(text: str | None, tokenizer: Tokenizer) -> tuple[str, list[int]]:
    """The prompt as text and as tokens, of which there is at least one; raises DataError."""
    try:
        ids = tokenizer.encode("\n" if text is None else text).tolist()
    except UserError:
        if text is not None:
            raise
        ids = []  # these tokens have no line break
    if not ids:
        ids = [tokenizer.separator or 0]
    return (tokenizer.decode(ids) if text is None else text), ids


def write_together(
    arguments: argparse.Namespace,
    numbers: range,
    decoders: Sequence[StreamDecoder],
    steps: Iterator[list[int]],
    end: int | None,
) -> int:
    """Streams the first of the samples drawn together; the others follow when all are done.

    A sample ends before the token `end`. Returns how many tokens all of them have, prompts aside.
    """
    total = arguments.num_samples
    titles = [f"--- sample {n + 1} of {total}\n" if total > 1 else "" for n in numbers]
    texts = [[title, arguments.prompt] for title in titles]
    _write("".join(texts[0]))
    ended, drawn = [False for _ in numbers], 0
    for tokens in steps:
        ended = [was or token == end for was, token in zip(ended, tokens, strict=True)]
        if all(ended):
            break
        for number, token in enumerate(tokens):
            if not ended[number]:
                drawn += 1
                texts[number].append(decoders[number].decode([token]))
                if number == 0:
                    _write(texts[0][-1])
    for number, (decoder, text) in enumerate(zip(decoders, texts, strict=True)):
        _write(("".join(text) if number else "") + decoder.decode([], final=True) + "\n")
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
    arguments = read_arguments(sys.argv[1:])
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without UTF-8 shows '?'
        sys.stdout.reconfigure(errors="replace")
    for note in arguments.notes:
        print(f"note: {note}", file=sys.stderr)
    try:
        write_samples(arguments)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
