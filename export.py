"""Writes a trained model for use elsewhere.

    python export.py checkpoints/run_20251108_143022 my-model
    python export.py CHECKPOINT OUT --format bnb4        # matrices in 4 bits
    python export.py CHECKPOINT OUT --format upstream    # a BDH for its authors' code

CHECKPOINT is a checkpoint, a run directory (its last checkpoint, or its best one with
training.always_save_checkpoint: false), a folder of run directories (its newest run) or weights of
another program, such as nanoGPT's ckpt.pt. OUT is a new folder (engine/checkpoint/export.py says
what is in it), which `sample.py` takes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from config import CheckpointError, Config, ConfigError, device_option
from settings.cli import exit_on_signals, run_command

if TYPE_CHECKING:
    from torch import Tensor, nn

_FORMATS = {
    "safetensors": "all weights as trained",
    "bnb4": "matrices in 4 bits, by the run's low_precision",
    "upstream": "BDH under the reference's names",
}
_DEVICE = "where 4 bits are computed, best where the run was trained: auto, cpu, cuda, cuda:N, mps"
_LOAD = "BDH(BDHConfig(**json.load(open('config.json')))).load_state_dict(load_file('{}'))"


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = read_arguments(argv)
    return run_command(lambda: print(*export(args), sep="\n"))


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line; leaves with exit code 2 and one line when it is wrong."""
    parser = argparse.ArgumentParser(
        prog="export.py", description="Writes a trained model as plain files.", allow_abbrev=False
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="checkpoint, run directory or folder of runs")
    add("out", metavar="OUT", type=Path, help="the folder to make")
    formats = "; ".join(f"{name}: {meaning}" for name, meaning in _FORMATS.items())
    add("--format", choices=_FORMATS, default="safetensors", help=formats)
    add("--dtype", choices=["float32", "bfloat16"], help="of --format safetensors (float32)")
    add("--device", default="auto", help=_DEVICE)
    args = parser.parse_args(argv)
    if os.path.lexists(args.out):
        parser.error(f"OUT: '{args.out}' exists; name another folder")
    if args.dtype and args.format != "safetensors":
        parser.error("--dtype is for --format safetensors")
    return args


def export(args: argparse.Namespace) -> list[str]:
    """Writes OUT; returns what to say of it. Raises UserError."""
    from data.sources.tokens.meta import open_tokenizer
    from engine.checkpoint.export import WEIGHTS, description, has_config, is_export, write_export
    from engine.checkpoint.trained_model import open_model  # torch is slow to import
    from engine.hardware.device import resolve_device
    from engine.precision.precision import DTYPES
    from engine.precision.weights_4bit import QuantizedWeights, unique_tensors
    from engine.run_directory.find_runs import find_by_name
    from settings.formatting import format_bytes

    given = find_by_name(args.checkpoint)
    if is_export(given) and has_config(given):
        raise CheckpointError(f"{args.checkpoint} is an export already; give a run's checkpoint.")
    device = resolve_device(device_option(args.device))
    model, config, tokenizer = open_model(args.checkpoint, device)
    texts = description(config, open_tokenizer(tokenizer).to_dict())
    weights, lines = unique_tensors(model), list[str]()
    parameters = dict(model.named_parameters())
    count = sum(value.numel() for value in parameters.values())
    following = f"Next: python sample.py {args.out}"
    if args.format == "upstream":
        weights, texts = _upstream(model, config)
        following = f"Next, in {args.out} beside bdh.py: {_LOAD.format(WEIGHTS)}"
    elif args.format == "bnb4":
        quantized = QuantizedWeights(model, config.low_precision)
        weights, lines = quantized.packed_tensors(), [quantized.description()]
    elif args.dtype:
        weights |= {name: value.to(DTYPES[args.dtype]) for name, value in parameters.items()}
    size = write_export(args.out, weights, texts)
    sizes = f"{format_bytes(size)}, {size / count:.2f} bytes per parameter"
    whole = f"{format_bytes(4 * count)} in float32"
    wrote = f"Wrote {args.out}: {WEIGHTS} ({sizes}; {whole}), {', '.join(texts)}"
    return [*lines, wrote, following]


def _upstream(model: nn.Module, config: Config) -> tuple[dict[str, Tensor], dict[str, str]]:
    from model.bdh import BDH, to_upstream

    if not isinstance(model, BDH):
        raise ConfigError(
            f"--format upstream is the layout of the public BDH, and the checkpoint's model.name "
            f"is {config.model.name}; leave it out, or use --format bnb4."
        )
    shape = json.dumps(asdict(config.to_bdh_config()), indent=2) + "\n"
    return to_upstream(model), {"config.json": shape}


if __name__ == "__main__":
    exit_on_signals()
    sys.exit(main())
