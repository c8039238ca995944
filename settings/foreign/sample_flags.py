"""nanoGPT's way of calling `sample.py`, as words that its argument parser reads.

    sample.py config/train_shakespeare_char.py --num_samples=2
    -> sample.py --init-from=resume --out-dir=out-shakespeare-char --num-samples=2

nanoGPT runs a preset in place and lets the flags after it win; here the assignments of a preset are
read (never run) and stand where its name stood.
"""

from __future__ import annotations

from collections.abc import Sequence

from settings.errors import raise_problems
from settings.foreign.preset_file import read_preset
from settings.values import Scalar
from settings.yaml_reader import PythonValue

# nanoGPT's sample.py has these defaults where the user says nothing.
OUT_DIR, NUM_SAMPLES, TOP_K = "out", 10, 200
# what a preset may say that sampling has a use for
_TAKEN = (
    *("init_from", "out_dir", "start", "num_samples", "max_new_tokens", "temperature", "top_k"),
    *("seed", "device", "dtype", "compile"),
)


def expand_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the words with presets as flags and with dashes in flags, and notes for the user.

    Raises ConfigError for a preset that cannot be read.
    """
    expanded, notes = list[str](), list[str]()
    for word in words:
        if word.endswith(".py") and not word.startswith("-"):
            flags, told = _read_flags(word)
            expanded += flags
            notes += told
        elif word.startswith("--"):
            name, equals, value = word.partition("=")
            expanded.append(name.replace("_", "-") + equals + value)
        else:
            expanded.append(word)
    return expanded, notes


def _read_flags(path: str) -> tuple[list[str], list[str]]:
    """Returns the assignments of a preset as flags, and what to tell of it."""
    entries, problems, notes = read_preset(path, layer=1)
    raise_problems(problems)
    # A preset that trains from nothing says nothing of where to sample from.
    flags, skipped = {"init_from": "resume"}, []
    for entry in entries:
        value = entry.value
        if entry.key not in _TAKEN:
            skipped.append(entry.key)
        elif isinstance(value, Scalar):
            flags[entry.key] = value.text
        elif isinstance(value, PythonValue) and value.value is not None:
            flags[entry.key] = str(value.value)
    if flags["init_from"] == "scratch":
        flags["init_from"] = "resume"
    if skipped:
        notes.append(f"{path}: ignored, of training: {', '.join(dict.fromkeys(skipped))}")
    return [f"--{key.replace('_', '-')}={text}" for key, text in flags.items()], notes
