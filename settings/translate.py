"""What other trainers mean where another name is not enough; schedules meant for longer runs.

Values under foreign names become options of ours here, each with a line for the user.
"""

from __future__ import annotations

from math import prod
from typing import Any

from settings.layers import Merged
from settings.problems import Problem
from settings.schema import Schema
from settings.values import to_text

_KERNELS = {"model.flash": "flash", "model.flex": "flex"}
_ATTENTION = "model.attention"
_STEPS, _TOKENS = "training.gradient_accumulation_steps", "training.tokens_per_step"
_MAX_ITERS = "training.max_iters"
_WARMUP, _DECAY_END = "schedule.warmup_iters", "schedule.lr_decay_iters"


def translate(schema: Schema, merged: Merged) -> None:
    """Turn foreign values into ours and shorten schedules meant for longer runs, in place."""
    _translate_kernel(merged)
    _translate_tokenizer(merged)
    _translate_run_name(merged)
    _choose_text(merged)
    if merged.nanogpt:
        _Nanogpt(schema, merged).translate()
    _Schedule(schema, merged).shorten()


def _translate_kernel(merged: Merged) -> None:
    """Two switches choose the kernel of attention; a later layer wins over an earlier one."""
    given = {key: merged.origins[key] for key in _KERNELS if key in merged.values}
    wanted = [kernel for key, kernel in _KERNELS.items() if merged.values.get(key)]
    for key in given:
        merged.drop(key)
    if not given:
        return
    origin, names = max(given.values()), " and ".join(given)
    mean, are = ("means", "is") if len(given) == 1 else ("mean", "are")
    if len(wanted) == 2:
        text = "model.flash=true and model.flex=true exclude each other; set one to false"
        merged.problems.append(Problem(origin, text))
        return
    kernel = wanted[0] if wanted else "auto"
    other = merged.origins.get(_ATTENTION)
    if other and other.layer > origin.layer:
        merged.note(f"{_ATTENTION} was given later than {names} and takes their place")
    elif other and other.layer == origin.layer and merged.values[_ATTENTION] != kernel:
        told = f"{_ATTENTION}={merged.values[_ATTENTION]}"
        text = f"{names} {mean} {_ATTENTION}={kernel}, and there is {told}. Keep one"
        merged.problems.append(Problem(max(origin, other), text))
    else:
        merged.put(_ATTENTION, kernel, origin)
        merged.note(f"{names} {are} read as {_ATTENTION}={kernel}")


def _translate_tokenizer(merged: Merged) -> None:
    """The tokenizer that made the tokens is the tokenizer."""
    used, ours = "dataset.tokenizer_used", "tokenizer.name"
    value, origin = merged.values.get(used), merged.origins.get(used)
    merged.drop(used)
    if value is None or origin is None:
        return
    name = merged.values.get(ours, "auto")
    if name == "auto":
        merged.put(ours, value, origin)
        merged.note(f"{used} is read as {ours}")
    elif name != value:
        text = f"{used}={to_text(value)} made the tokens, and {ours}={to_text(name)}; set one"
        merged.problems.append(Problem(max(origin, merged.origins[ours]), text))


def _translate_run_name(merged: Merged) -> None:
    """A section wandb_log with a name turns the log on."""
    name, switch = "logging.wandb_run_name", "logging.wandb_log"
    origin, other = merged.origins.get(name), merged.origins.get(switch)
    by_section = merged.spelled.get(name) == "wandb_log.name"
    if origin and by_section and (other is None or other.layer < origin.layer):
        merged.put(switch, True, origin)
        merged.note(f"wandb_log.name turns {switch} on")


def _choose_text(merged: Merged) -> None:
    """The text is where the last word says; the name of a data set beside a path is a label."""
    name, folder, files = "dataset.name", "dataset.parquet_dir", "dataset.train_data_path"
    path, written = merged.origins.get(folder), merged.spelled.get(folder, "")
    label = merged.values.get(name)
    beside = path is not None and label and merged.origins[name].layer == path.layer
    if beside and written.endswith(".path"):
        merged.drop(name)
        given = merged.spelled[name]
        merged.notes = [note for note in merged.notes if note != f"{given} is read as {name}"]
        merged.note(f"{given}={label} is a label beside {written}: ignored")
    for key in (name, files, "dataset.val_data_path"):
        value = merged.values.get(key)
        if value and path and merged.origins[key].layer < path.layer:
            merged.drop(key)
            merged.note(f"{folder} takes the place of {key}={value}")
    if merged.owns(name) and merged.values.get(files):
        merged.drop(name)
    if not (merged.values.get(name) or merged.values.get(files)) and merged.owns("tokenizer.name"):
        merged.drop("tokenizer.name")  # parquet holds text, not tokens


class _Nanogpt:
    """What nanoGPT's names mean where ours mean something else."""

    def __init__(self, schema: Schema, merged: Merged) -> None:
        self._merged = merged
        self._schema = schema

    def translate(self) -> None:
        self._count_over_all_processes()
        if self._says("schedule.decay_lr") and not self._value("schedule.decay_lr"):
            self._start_at_full_rate()
        freq = "training.checkpoint_freq"
        if 0 in self._merged.nanogpt and freq not in self._merged.values:
            self._merged.values[freq] = self._value("training.test_freq")

    def _says(self, key: str) -> bool:
        """Return whether the value of `key` was said in nanoGPT's words."""
        origin = self._merged.origins.get(key)
        return origin is not None and origin.layer in self._merged.nanogpt

    def _value(self, key: str) -> Any:
        return self._merged.values.get(key, self._schema.options[key].default)

    def _count_over_all_processes(self) -> None:
        """Its accumulation is the total of a step, whatever the number of processes."""
        merged = self._merged
        if not self._says(_STEPS):
            return
        if merged.owns(_STEPS) and any(o.source.endswith(".py") for o in merged.origins.values()):
            # nanoGPT's 40 are those of its GPT-2; each of its presets that trains says its own.
            merged.put(_STEPS, 1, merged.origins[_STEPS])
        origin, steps = merged.origins[_STEPS], merged.values[_STEPS]
        tokens_layer = merged.layer(_TOKENS) if merged.values.get(_TOKENS) else -1
        if tokens_layer == origin.layer:
            return  # a rule says that they exclude each other
        if tokens_layer > origin.layer:
            merged.drop(_STEPS)
            merged.note(f"{_TOKENS} takes the place of gradient_accumulation_steps={steps}")
            return
        factors = [steps, self._value("training.batch_size"), self._value("training.block_size")]
        if "auto" in factors:
            return  # a rule asks for tokens_per_step
        merged.put(_TOKENS, prod(factors), origin)
        merged.put(_STEPS, 1, origin)
        merged.note(
            f"gradient_accumulation_steps={steps} is over all processes, as in nanoGPT: "
            f"{_TOKENS} = {' * '.join(map(str, factors))} = {prod(factors)}"
        )

    def _start_at_full_rate(self) -> None:
        """Without decay it warms nothing up."""
        merged = self._merged
        if self._says(_WARMUP) and merged.values[_WARMUP]:
            merged.put(_WARMUP, 0, merged.origins[_WARMUP])
            merged.note("schedule.decay_lr=false means no warm-up either, as in nanoGPT")


class _Schedule:
    """A schedule that was meant for a longer run gives way to one that a later layer makes short.

    That of a base gives way where it would take much of the run; that of a file of the user's only
    where the run would end during its warm-up, which a rule forbids.
    """

    def __init__(self, schema: Schema, merged: Merged) -> None:
        self._merged = merged
        self._schema = schema

    def shorten(self) -> None:
        values, steps = self._merged.values, self._value(_MAX_ITERS)
        warmup = 0 if self._yields(_WARMUP) else (self._value(_WARMUP) or 0)
        if not warmup <= (self._value(_DECAY_END) or steps) <= steps:
            self._yield(_DECAY_END, None, f"{_MAX_ITERS}={steps}")
        end = values.get(_DECAY_END) or steps
        if (self._value(_WARMUP) or 0) > min(end, steps) // 4:  # meant for a longer run
            key, end = (_DECAY_END, end) if end < steps else (_MAX_ITERS, steps)
            self._yield(_WARMUP, end * 3 // 100, f"{key}={end}")

    def _value(self, key: str) -> Any:
        return self._merged.values.get(key, self._schema.options[key].default)

    def _yields(self, key: str) -> bool:
        origins = self._merged.origins
        if key not in origins or self._merged.owns(key):
            return key in origins
        end, steps = self._value(_DECAY_END), self._value(_MAX_ITERS)
        last = _DECAY_END if end and end < steps else _MAX_ITERS
        too_short = (self._value(_WARMUP) or 0) > self._value(last)
        return too_short and origins[key].layer < self._merged.layer(last)

    def _yield(self, key: str, value: int | None, to: str) -> None:
        if not self._yields(key):
            return
        merged = self._merged
        place, was = merged.origins[key], merged.values[key]
        merged.put(key, value, place)
        if key == _WARMUP or self._value("schedule.decay_lr"):  # else nothing follows from it
            merged.note(f"{key}={to_text(was)} of {place.source} yields to {to}: {to_text(value)}")
