"""The YAML of fivezeroes/bdh, a trainer of BDH whose first config has our own names.

Its later configs have a scheduler, tokenizers and TensorBoard. `max_iters`, `log_freq`, `test_freq`
and `checkpoint_freq` count micro-steps there (its loop takes one batch per turn); the scheduler's
`warmup_steps` and `T_max` count optimizer steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from settings.errors import Problem
from settings.foreign.edit import fill, ignore, origin_of, refuse, take, written_names
from settings.merge import Layer, assignments, read_layer
from settings.schema import Option, Schema, extra_option
from settings.values import to_text
from settings.yaml_reader import Entry

# Names that only its files have: one of them makes a file one of its own.
MARKS = (
    *("scheduler.type", "tensorboard.enabled", "tokenizer.type", "training.runs_dir"),
    *("training.compile_model", "dataset.val_split", "dataset.val_batches"),
)
_SCHEDULERS = Literal["none", "cosine", "linear", "exponential", "plateau"]
_TOKENIZERS = Literal["byte", "tiktoken", "huggingface", "sentencepiece"]
_HISTOGRAMS = [f"tensorboard.log_{name}" for name in ("gradients", "weights", "scheduler_state")]
_TOKEN_IDS = [f"tokenizer.{name}_token_id" for name in ("pad", "eos", "bos")]
_OPTIONS: dict[str, Option] = {
    option.key: option
    for option in (
        extra_option("scheduler.type", _SCHEDULERS),
        extra_option("scheduler.warmup_steps", int, ge=0),
        extra_option("scheduler.warmup_type", str),
        extra_option("scheduler.min_lr", float, ge=0),
        extra_option("scheduler.T_max", int | None, ge=1),
        *(extra_option(f"scheduler.{name}", float) for name in ("gamma", "factor", "threshold")),
        extra_option("scheduler.patience", int),
        extra_option("tokenizer.type", _TOKENIZERS),
        extra_option("tensorboard.log_dir", str | None),
        *(extra_option(key, bool) for key in _HISTOGRAMS),
        *(extra_option(key, int | None) for key in _TOKEN_IDS),
    )
}
_COUNTED = ("max_iters", "log_freq", "test_freq", "checkpoint_freq")  # of section training
_DEFAULT_TOKENIZER = "gpt2"


def recognises(entries: Sequence[Entry]) -> bool:
    """Returns whether a file has a name that only this trainer's files have."""
    return not written_names(entries).isdisjoint(MARKS)


def read(schema: Schema, number: int, source: str, entries: Sequence[Entry]) -> Layer:
    """Returns the layer of a file: tokenizer, schedule and counts in our names and units."""
    # There, a tokenizer's name may be null.
    name = {"tokenizer.name": extra_option("tokenizer.name", str | None)}
    theirs = Schema(schema.sections, {**schema.options, **name}, {**schema.extra, **_OPTIONS})
    layer = read_layer(theirs, number, source, entries)
    # Aliases are told last: first what the file as a whole means.
    told, layer.notes = layer.notes, [f"{source} is read as a config of fivezeroes/bdh"]
    why = "event files go into the run's directory, without histograms"
    ignore(layer, ["tensorboard.log_dir", *_HISTOGRAMS], why)
    _translate_tokenizer(layer)
    if any(entry.key == "schedule" for entry in entries):
        _refuse_scheduler(layer)
    else:
        _translate_schedule(schema, layer)
    _count_optimizer_steps(schema, layer)
    constants = {"optimizer.beta2": 0.999, "optimizer.grad_clip": 0.0}
    fill(layer, constants, "its AdamW has torch's betas, and it does not clip gradients")
    layer.notes += told
    return layer


def _translate_tokenizer(layer: Layer) -> None:
    """A type and a name are one name here. The vocabulary is the tokenizer's, whatever is given."""
    why = "a tokenizer knows its own, and there nothing reads them"
    ignore(layer, _TOKEN_IDS, why)
    line = origin_of(layer, "tokenizer.type")
    kind, given = take(layer, "tokenizer.type"), layer.given.get("tokenizer.name")
    if kind is None:
        return
    name = "bytes" if kind == "byte" else (given and given.value) or _DEFAULT_TOKENIZER
    remedy = "Take tokenizer.name=gpt2, a Hugging Face name or the path of a tokenizer.json"
    if kind == "sentencepiece":
        text = f"tokenizer.type=sentencepiece cannot be read. {remedy}"
        refuse(layer, line, text, ["tokenizer.name"])
    elif kind == "tiktoken" and name != _DEFAULT_TOKENIZER:
        text = f"tokenizer.name={to_text(name)} of tiktoken cannot be read, only gpt2. {remedy}"
        refuse(layer, line, text, ["tokenizer.name"])
    else:
        layer.put("tokenizer.name", name, line)
        also = f" and name={to_text(given.value)}" if given and given.value else ""
        layer.note(f"tokenizer.type={kind}{also} is read as tokenizer.name={to_text(name)}")
    size = layer.given.get("model.vocab_size")
    if size is not None and size.value is not None and (kind, size.value) != ("byte", 256):
        layer.put("model.vocab_size", None)
        layer.note(f"model.vocab_size={size.value}: null, the tokenizer's, as there")


def _translate_schedule(schema: Schema, layer: Layer) -> None:
    """A rate without a scheduler is constant; with one it begins and ends where that says."""
    line = origin_of(layer, "scheduler.type")
    kind = take(layer, "scheduler.type")
    ours: dict[str, Any] = {"schedule.decay_lr": False, "schedule.warmup_iters": 0}
    told = f"scheduler.type={kind}" if kind else "no scheduler"
    if kind not in (None, "none"):
        warmup = take(layer, "scheduler.warmup_steps", 0)
        period = take(layer, "scheduler.T_max")
        floor = take(layer, "scheduler.min_lr", 0.0)
        ours = {"schedule.warmup_iters": warmup, "schedule.min_lr": floor}
        steps, accumulated = _value(schema, layer, "max_iters"), _accumulation(schema, layer)
        if kind in ("cosine", "linear"):
            ours["schedule.name"] = kind
        if kind == "cosine" and period is not None:
            ours["schedule.lr_decay_iters"] = end = warmup + period
            told += f" with warmup_steps + T_max = {end}"
            if end < steps // accumulated:
                layer.note(f"after {end} steps the rate stays low; there it rises again")
        elif kind == "linear" and accumulated > 1:
            # It ends at its max_iters, which counts micro-steps, in optimizer steps.
            ours["schedule.lr_decay_iters"] = steps
    if kind in ("exponential", "plateau"):
        text = (
            f"scheduler.type={kind} is not available. Take another with schedule.name=cosine, "
            "linear or wsd, or schedule.decay_lr=false for a constant rate"
        )
        refuse(layer, line, text, ["schedule.name", "schedule.decay_lr"])
        told = "the rest of scheduler"
    for key, value in ours.items():
        layer.put(key, value, line)
    layer.note(f"{told} is read as {assignments(ours)}")
    rest = [key for key in _OPTIONS if key.startswith("scheduler.")]
    ignore(layer, rest, "no part of this schedule here")


def _refuse_scheduler(layer: Layer) -> None:
    for key in [key for key in layer.given if key.startswith("scheduler.")]:
        text = f"{key}: section schedule sets the rate too. Keep one of them"
        layer.problems.append(Problem(layer.given.pop(key).origin, text))


def _count_optimizer_steps(schema: Schema, layer: Layer) -> None:
    """Turns its counts of micro-steps into optimizer steps; its defaults are ours."""
    accumulated = _accumulation(schema, layer)
    theirs = {name: _value(schema, layer, name) for name in _COUNTED}
    if accumulated == 1:
        return
    ours = {name: max(1, count // accumulated) for name, count in theirs.items() if count}
    for name, count in ours.items():
        layer.put(f"training.{name}", count)
    layer.note(
        f"{assignments(theirs)} count micro-steps there, {accumulated} to an optimizer step: "
        f"{assignments(ours)}"
    )


def _accumulation(schema: Schema, layer: Layer) -> int:
    return int(_value(schema, layer, "gradient_accumulation_steps"))


def _value(schema: Schema, layer: Layer, name: str) -> Any:
    """Returns the value of an option of section training, or its default."""
    given = layer.given.get(f"training.{name}")
    return given.value if given else schema.options[f"training.{name}"].default
