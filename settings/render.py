"""The text of `--help`, and a config as YAML with the meaning of each option beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from settings.schema import REQUIRED, Option, Schema, title
from settings.terminal import printable
from settings.values import to_text

WIDTH = 100
NAME_WIDTH = 29
DEFAULT_WIDTH = 19
VALUE_COLUMN = 34

USAGE = """\
usage: python train.py [FILE ...] [--config FILE] [key=value ...]
                       [--dry-run] [--show-config] [--check-resume[=STEPS]] [--help]
                       [--slurm time=HOURS:MINUTES [nodes=N] [gpus=N] ... [--submit]]
       python train.py --reproduce RUN

Train a small language model. Files (*.yaml, *.py) are applied in order, then overrides; without a
file, config.yaml of the current folder. Paths are relative to the current folder. A Python preset
of nanoGPT is read as literals, on top of nanoGPT's defaults (configs/nanogpt.yaml), and never run.

  python train.py                                    train config.yaml
  python train.py my.yaml max_iters=200 lr=3e-4      a file and overrides
  python train.py --config my.yaml --batch-size 16   the same in another spelling
  python train.py my.yaml --dry-run                  check everything, train nothing
  python train.py my.yaml lr=3e-4 --show-config      print the whole config that this makes
  python train.py my.yaml --check-resume             is a resumed run the same run, here?
  python train.py --reproduce report.html#run_a      does a run give the same losses, here?
  python train.py my.yaml --slurm nodes=2 gpus=8 time=24:00    print a batch script for SLURM
  python train.py config/train_gpt2.py lr=5e-4       a preset of nanoGPT
  python train.py dataset=openwebtext                GPT-2 on data/openwebtext/train.bin

An override is key=value, section.key=value, --key=value or --key value; --key alone is true.
null clears an optional value. Keys of --slurm: nodes, gpus (of each node), time (hours:minutes),
cpus (of each process), mem (of each node), partition, account, qos, constraint, name; --submit
gives the script to sbatch. RUN is a run directory, a checkpoint or the config.yaml in one, or a
report page, with #NAME for one of its runs: 50 steps are repeated in memory. Options, with their
defaults:
"""


def help_text(schema: Schema) -> str:
    """Returns usage, examples and every option with default, type, range and meaning."""
    lines = [USAGE]
    for section, section_class in schema.sections.items():
        lines.append(f"{section}: {title(section_class)}")
        for option in schema.in_section(section):
            lines += _option_lines(option)
            for own in option.entry_options:
                lines += _option_lines(own, "  . ")
        lines.append("")
    return "\n".join(lines)


def _option_lines(option: Option, margin: str = "  ") -> list[str]:
    """Returns name, default and meaning, with the type below where it does not fit."""
    default = "required" if option.default is REQUIRED else to_text(option.default)
    width = NAME_WIDTH + 2 - len(margin)
    head = f"{margin}{option.name:<{width}}{default:<{DEFAULT_WIDTH}}"
    kind = f"({option.describe()})"
    if len(head) + len(option.doc) + 1 + len(kind) <= WIDTH:
        return [f"{head}{option.doc} {kind}"]
    return [head + option.doc, " " * min(len(head), WIDTH - len(kind)) + kind]


def dump(
    schema: Schema, values: Mapping[str, Mapping[str, Any]], header: Sequence[str] = ()
) -> str:
    """Returns YAML below `header` comment lines; what is read back equals `values`."""
    lines = [f"# {printable(' '.join(line.split()))}".rstrip() for line in header]
    for section, section_class in schema.sections.items():
        if lines:
            lines.append("")
        lines += [f"# {title(section_class)}", f"{section}:"]
        for option in schema.in_section(section):
            value = values[section][option.name]
            entries = value if option.entry_options else ()
            setting = f"  {option.name}:" + ("" if entries else f" {to_text(value)}")
            meaning = f"{option.doc} ({option.describe()})"
            lines.append(f"{setting:<{VALUE_COLUMN}}  # {meaning}")
            lines += [f"    - {to_text(entry)}" for entry in entries]
    return "\n".join(lines) + "\n"
